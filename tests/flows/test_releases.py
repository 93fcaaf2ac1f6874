"""Tests releases in two steps: what was reviewed is what is done, by the user who reviewed it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from flows.web.studio.page_messages import show_error
from registry.errors import Conflict, PromotionError, Refused
from registry.versions.endorsement import list_endorsements
from registry.versions.promotion import promote, read_log
from registry.versions.versions import Versions
from tasks.operations.releases import carry_out, read_release_events, read_releases, review_release
from tests.flows.shared import Trained

OPEN = "aliases: {production: {needs_consent: none, needs_licence: none}}\n"


@pytest.fixture
def two(trained: Trained) -> Trained:
    """Returns the trained home with a second version of the same bytes under another report, and an open policy."""
    (trained.home.path / "policy.yaml").write_text(OPEN)
    with closing(Versions(trained.home)) as versions:
        first = versions.show("small", 1)
        versions.register(
            "small", first.artifact, first.adapter_path, metrics=first.metrics, gates=first.gates, passed=True
        )
    return trained


def last_event(trained: Trained):
    with closing(Versions(trained.home)) as versions:
        return read_log(versions)[-1]


def test_a_reviewed_promotion_is_carried_out_and_logged_with_user_and_reason(two):
    review = review_release(two.home, "promote", "small", "2", "production", actor="ann")
    assert (review.summary, review.reasons) == ("move production from nothing to small@2", ())
    event = carry_out(two.home, review, "release 12", actor="ann")
    assert (event.actor, event.reason, event.before, event.after) == ("ann", "release 12", None, 2)
    assert [(state.alias, state.version, state.actor) for state in read_releases(two.home, "small")] == [
        ("production", 2, "ann"),
        ("staging", 1, read_releases(two.home, "small")[1].actor),
    ]
    assert read_release_events(two.home, "small")[0] == event


@pytest.mark.parametrize("action", ["promote", "rollback", "unalias", "endorse", "withdraw"])
def test_an_alias_that_moved_since_the_review_is_a_conflict_and_nothing_changes(two, action):
    with closing(Versions(two.home)) as versions:
        for number in (1, 2):
            promote(versions, "small", number, "canary", reason="r")
        review = review_release(two.home, action, "small", "2", "canary")
        if action == "withdraw":
            promote(versions, "small", 2, "beta", reason="meanwhile")
        else:
            promote(versions, "small", 1, "canary", reason="meanwhile")
        before = last_event(two)
        with pytest.raises(Conflict):
            carry_out(two.home, review, "r")
        assert last_event(two) == before


def test_each_action_is_done_as_reviewed(two):
    with closing(Versions(two.home)) as versions:
        for number in (1, 2):
            promote(versions, "small", number, "canary", reason="r")
        back = review_release(two.home, "rollback", "small", "", "canary")
        assert back.summary == "move canary from small@2 to small@1"
        assert carry_out(two.home, back, "worse").action == "rollback"
        carry_out(
            two.home, review_release(two.home, "endorse", "small", "2", "production", actor="ann"), "good", actor="ann"
        )
        assert [entry.actor for entry in list_endorsements(versions, versions.show("small", 2))] == ["ann"]
        assert (
            carry_out(two.home, review_release(two.home, "unalias", "small", "", "canary"), "over").action == "remove"
        )
        gone = review_release(two.home, "withdraw", "small", "2", "")
        assert gone.summary == "withdraw small@2"
        carry_out(two.home, gone, "bad eyes")
        assert versions.show("small", 2).state == "WITHDRAWN"
        again = review_release(two.home, "withdraw", "small", "2", "")
        assert again.reasons == ("it was withdrawn",)


def test_a_review_has_every_reason_and_a_refusal_is_logged(two):
    (two.home.path / "policy.yaml").write_text(
        "aliases: {production: {needs_signature: true, needs_approvals: 2, movers: [carl]}}\n"
    )
    review = review_release(two.home, "promote", "small", "2", "production", actor="ann")
    assert len(review.reasons) >= 3
    with pytest.raises(Refused) as refusal:
        carry_out(two.home, review, "r", actor="ann")
    assert set(review.reasons) <= set(refusal.value.reasons)
    assert (last_event(two).action, last_event(two).actor) == ("refuse", "ann")
    text = show_error(refusal.value)
    assert text.count("<li>") == len(refusal.value.reasons)
    assert "(1)" not in text


def test_only_the_user_who_reviewed_confirms_and_a_reason_is_needed(two):
    review = review_release(two.home, "promote", "small", "2", "production", actor="ann")
    with pytest.raises(Conflict, match="ann reviewed this, not ben"):
        carry_out(two.home, review, "r", actor="ben")
    with pytest.raises(PromotionError, match="without a reason"):
        carry_out(two.home, review, " ", actor="ann")
    with pytest.raises(Conflict):
        carry_out(two.home, replace(review, sha256="0" * 64), "r", actor="ann")


def test_a_version_without_earlier_ones_cannot_be_rolled_back(two):
    with pytest.raises(PromotionError, match="'staging' cannot be rolled back"):
        review_release(two.home, "rollback", "small", "", "staging")


def test_an_error_is_shown_as_text():
    assert "<script>" not in show_error(PromotionError("<script>alert(1)</script>", where="<b>"))
    assert "<img" not in show_error(Refused("no", reasons=("<img src=x>",), where="a@1"))
