"""Tests blind votes as a gate: what counts, when votes are final, what a promotion needs, and what is kept."""

from __future__ import annotations

import sqlite3

import pytest

from registry import event_log
from registry.entities import AdapterVersion, Execution, now
from registry.errors import GoneVersion, PolicyError, Refused, VoteError
from registry.identity import Actor
from registry.maintenance.fsck import fsck
from registry.maintenance.gc import collect
from registry.policy.policy_file import read_policies
from registry.policy.votes import KIND
from registry.versions import promotion, voting
from registry.versions.deletion import withdraw
from registry.versions.promotion import promote, read_log, remove, rollback
from registry.versions.revocation import revoke
from registry.versions.versions import Versions
from registry.versions.voting import count_votes, find_unmet_votes, list_comparisons, log_comparison, vote

GATE = (
    "aliases: {production: {votes: {against: production, at_least: %s%s}, needs_licence: none, needs_consent: none}}\n"
)


def set_gate(versions: Versions, least: int = 6, more: str = "", extra: str = "") -> None:
    (versions.home.path / "policy.yaml").write_text(GATE % (least, more) + extra)


@pytest.fixture
def released(versions: Versions, register) -> Versions:
    """Returns versions in which zorb@1 is in production, and bob registered zorb@2 for a gate of six votes."""
    set_gate(versions, more=", missing: skip")
    register(versions, b"1", actor="bob")
    promote(versions, "zorb", 1, "production", reason="first", actor="bob")
    set_gate(versions, more=", by_others: false")
    register(versions, b"2", actor="bob")
    return versions


def compare(versions: Versions, pairs: int = 6, number: int = 2, against: str = "zorb@1", *, prompts: int = 0) -> str:
    """Records a comparison as `loraline vote prepare` does, and returns its digest."""
    store, lineage, count = versions.store, versions.lineage, len(read_log(versions))
    artifact = store.put_files(KIND, {"comparison.json": b"%d" % count, "pairs/0.png": b"image %d" % count})
    run = lineage.start_run("vote", {})
    inputs = {"adapter": versions.show("zorb", number).artifact}
    step = Execution(
        f"{run.id}-c", run.id, KIND, "compare", "1", f"key {run.id}", inputs=inputs, output=artifact, ended_at=now()
    )
    lineage.log_execution(step, contents=store.files(artifact))
    lineage.finish_run(run.id, "COMPLETED")
    digests = [f"{pair % (prompts or pairs):032x}" for pair in range(pairs)]
    log_comparison(versions, "zorb", number, against=against, artifact=artifact, prompts=digests, actor="ann")
    return artifact.sha256


def cast(versions: Versions, digest: str, choices: str, actor: str = "ann", *, start: int = 0, number: int = 2) -> None:
    """Votes on pairs: `w`in, `l`oss, `t`ie, `s`kip; the sides alternate."""
    words = {"w": "candidate", "l": "against", "t": "tie", "s": "skip"}
    for pair, letter in enumerate(choices, start):
        left = ("candidate", "against")[pair % 2]
        values = {"comparison": digest, "pair": pair, "choice": words[letter], "left": left}
        vote(versions, "zorb", number, actor=actor, **values)


def release(versions: Versions, number: int = 2, **options: object):
    return promote(versions, "zorb", number, "production", reason="release", actor="bob", **options)


def second(versions: Versions) -> AdapterVersion:
    return versions.show("zorb", 2)


def test_a_version_is_promoted_once_its_votes_win_and_not_before(released):
    with pytest.raises(Refused, match=r"votes against zorb@1: 0 of 6 are cast in finished ballots.*0 of 1 users"):
        release(released)
    digest = compare(released)
    cast(released, digest, "wwwww")
    with pytest.raises(Refused, match="0 of 6 are cast"):
        release(released)
    cast(released, digest, "w", start=5)
    assert find_unmet_votes(released, second(released)) == {"production": ()}
    assert release(released).after == 2
    assert fsck(released.home, grace=0, mlflow=False) == []


def test_all_reasons_are_given_at_once_and_a_lost_comparison_does_not_pass(released):
    set_gate(released, least=20, more=", voters: 2, win_rate: 0.4")
    cast(released, compare(released), "wwlltt")
    with pytest.raises(Refused) as refusal:
        release(released)
    text = "\n".join(refusal.value.reasons)
    assert "6 of 20 are cast" in text
    assert "1 of 2 users voted" in text
    assert "win rate 0.50 on 6 prompts, 0.12 to 0.88; its lower bound must exceed 0.4" in text


def test_a_bound_that_is_only_reached_does_not_pass(released):
    cast(released, compare(released), "wwwwww")
    low = count_votes(released, second(released), "zorb@1").interval[0]
    set_gate(released, more=f", win_rate: {low!r}")
    with pytest.raises(Refused, match="its lower bound must exceed"):
        release(released)
    set_gate(released, more=f", win_rate: {low - 1e-6!r}")
    assert release(released).after == 2


def test_more_seeds_and_voters_do_not_replace_prompts(released):
    digest = compare(released, pairs=30, prompts=5)
    for voter in ("ann", "ben"):
        cast(released, digest, "w" * 30, voter)
    with pytest.raises(Refused, match=r"win rate 1.00 on 5 prompts, 0.48 to 1.00"):
        release(released)


def test_the_newest_vote_counts_until_the_ballot_is_finished_and_then_votes_are_final(released):
    digest = compare(released)
    cast(released, digest, "lwwww")
    cast(released, digest, "w")
    cast(released, digest, "t", start=5)
    summary = count_votes(released, second(released), "zorb@1")
    assert (summary.wins, summary.losses, summary.ties, summary.votes) == (5, 0, 1, 6)
    with pytest.raises(VoteError, match="ann has voted on all pairs, and the votes are final"):
        cast(released, digest, "w", start=5)
    with pytest.raises(VoteError, match="final"):
        cast(released, digest, "w", actor="ANN")
    assert count_votes(released, second(released), "zorb@1") == summary


def test_a_skipped_pair_finishes_a_ballot_and_counts_in_no_rate(released):
    cast(released, compare(released), "wwwwws")
    summary = count_votes(released, second(released), "zorb@1")
    assert (summary.votes, summary.skipped, summary.win_rate) == (5, 1, 1.0)
    with pytest.raises(Refused, match="5 of 6"):
        release(released)


def test_votes_of_all_comparisons_count_so_none_can_be_left_out(released):
    cast(released, compare(released), "llllll")
    cast(released, compare(released, pairs=6), "wwwwww", actor="ben")
    summary = count_votes(released, second(released), "zorb@1")
    assert (summary.votes, summary.win_rate, summary.prompts) == (12, 0.5, 6)
    with pytest.raises(Refused, match=r"win rate 0.50"):
        release(released)


def test_nobody_votes_on_withdrawn_versions_or_revoked_images(released, register):
    register(released, b"3", actor="bob")
    digest, other = compare(released), compare(released, number=3, against="zorb@2")
    withdraw(released, "zorb", 2, reason="r", actor="bob")
    before = read_log(released)
    for comparison, number in ((digest, 2), (other, 3)):
        with pytest.raises(GoneVersion, match="zorb@2: was withdrawn by bob"):
            cast(released, comparison, "w", number=number)
    with pytest.raises(GoneVersion):
        compare(released)
    assert [event.action for event in read_log(released)] == [event.action for event in before]


def test_nobody_votes_on_a_version_whose_images_were_revoked(released):
    digest = compare(released)
    revoke(released, "5" * 64, reason="r", actor="bob", policy="flag")
    with pytest.raises(Refused, match="was revoked"):
        cast(released, digest, "w")
    assert read_log(released)[-1].details["refused"] == "vote"


def test_votes_need_a_role_and_stop_counting_without_it(released):
    digest = compare(released)
    cast(released, digest, "wwwwww")
    roles = "roles: {all: {may: [promote], members: [bob]}, voter: {may: [vote], members: [%s], adapters: ['%s']}}\n"
    set_gate(released, extra=roles % ("ann", "zorb"))
    assert count_votes(released, second(released), "zorb@1").votes == 6
    with pytest.raises(Refused, match="eve has no role that may vote zorb"):
        cast(released, digest, "w", actor="eve")
    for member, adapter in (("ben", "zorb"), ("ann", "star")):
        set_gate(released, extra=roles % (member, adapter))
        with pytest.raises(Refused, match="0 of 6 are cast"):
            release(released)


def test_votes_of_the_user_who_registered_the_version_do_not_count_if_the_policy_says_so(versions, register):
    set_gate(versions, more=", by_others: true, missing: skip")
    register(versions, b"1", actor="bob")
    promote(versions, "zorb", 1, "production", reason="first", actor="bob")
    register(versions, b"2", actor="Bob")
    digest = compare(versions)
    cast(versions, digest, "wwwwww", actor="BOB")
    with pytest.raises(Refused, match="0 of 6"):
        release(versions)
    cast(versions, digest, "wwwwww", actor="ann")
    assert release(versions).after == 2


@pytest.mark.parametrize("key", ["sha256", "against_sha256"])
def test_a_comparison_of_other_digests_does_not_count(released, key):
    digest = compare(released)
    cast(released, digest, "wwwwww")
    (event,) = (event for event in read_log(released) if event.action == "compare")
    with released.lineage.database.write() as session:
        details = {**event.details, "set": "0" * 64, key: "1" * 64}
        event_log.log_event(
            session, "compare", actor=Actor("eve"), reason="r", version=second(released), details=details
        )
    assert [entry.artifact.sha256 for entry, _ in list_comparisons(released, second(released))] == [digest]
    with pytest.raises(VoteError, match="no comparison"):
        cast(released, "0" * 64, "w")


def test_a_gate_against_an_alias_that_nothing_has_fails_unless_it_is_skipped(versions, register):
    set_gate(versions)
    register(versions, b"1", actor="bob")
    with pytest.raises(Refused, match="nothing has the alias 'production', so there are no votes against it"):
        release(versions, 1)
    set_gate(versions, more=", missing: skip")
    assert release(versions, 1).after == 1


def test_a_gate_against_the_base_takes_votes_against_the_base_alone(released):
    set_gate(released)
    text = (released.home.path / "policy.yaml").read_text().replace("against: production", "against: base")
    (released.home.path / "policy.yaml").write_text(text)
    cast(released, compare(released), "wwwwww")
    with pytest.raises(Refused, match="votes against base: 0 of 6"):
        release(released)
    cast(released, compare(released, against="base"), "wwwwww", actor="ben")
    assert release(released).after == 2


def test_votes_are_about_the_version_that_is_in_production_now(released, register):
    cast(released, compare(released), "wwwwww")
    register(released, b"3", actor="bob")
    cast(released, compare(released, number=3), "wwwwww", number=3)
    release(released, 3)
    with pytest.raises(Refused, match="votes against zorb@3: 0 of 6"):
        release(released, 2)


def test_a_production_that_moves_between_decision_and_transaction_is_noticed(released, register, monkeypatch):
    cast(released, compare(released), "wwwwww")
    text = (released.home.path / "policy.yaml").read_text().replace("against: production", "against: canary")
    (released.home.path / "policy.yaml").write_text(text)
    promote(released, "zorb", 1, "canary", reason="r", actor="bob")
    register(released, b"3", actor="bob")
    decide = promotion.evaluate_policy

    def decide_then_move(context, version, alias, **options):
        decision = decide(context, version, alias, **options)
        if alias == "production":
            promote(released, "zorb", 3, "canary", reason="meanwhile", actor="bob")
        return decision

    monkeypatch.setattr(promotion, "evaluate_policy", decide_then_move)
    with pytest.raises(Refused, match="votes against zorb@3: 0 of 6"):
        release(released)
    assert released.show("zorb", "production").version == 1


def test_votes_can_be_overridden_and_neither_a_rollback_nor_a_use_needs_them(released):
    assert release(released, override=True).details["overridden"][0].startswith("votes against zorb@1: 0 of 6")
    assert released.use("zorb", "production").version == 2
    assert rollback(released, "zorb", reason="r", actor="bob").after == 1
    remove(released, "zorb", "production", reason="r", actor="bob")
    assert rollback(released, "zorb", reason="r", actor="bob").after == 1


def test_a_version_that_votes_put_into_production_stays_usable_when_later_votes_are_lost(released):
    digest = compare(released)
    cast(released, digest, "wwwwww")
    release(released)
    cast(released, digest, "llllll", actor="ben")
    assert count_votes(released, second(released), "zorb@1").win_rate == 0.5
    assert released.use("zorb", "production").version == 2


def test_a_collection_keeps_the_images_that_users_vote_on(released):
    digests = [compare(released), compare(released)]  # the last run of each name is kept anyway
    collect(released.home, grace=0, keep_runs=0)
    for (entry, _), digest in zip(list_comparisons(released, second(released)), digests, strict=True):
        assert entry.artifact.sha256 == digest
        assert released.store.read(entry.artifact, "pairs/0.png")


def test_a_changed_vote_breaks_the_chain_of_the_log(released):
    cast(released, compare(released), "wwwwwl")
    (seq,) = [event.seq for event in read_log(released) if event.details.get("choice") == "against"]
    database = released.home.lineage_db
    released.close()
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TRIGGER events_no_update")
        connection.execute(
            "UPDATE events SET details = json_set(details, '$.choice', 'candidate') WHERE seq = ?", (seq,)
        )
    connection.close()
    assert [problem for problem in fsck(released.home, grace=0, mlflow=False) if f"event {seq}" in str(problem)]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pair": 6}, "no pair 6"),
        ({"pair": -1}, "no pair -1"),
        ({"comparison": "f" * 64}, "no comparison"),
    ],
)
def test_a_vote_on_something_else_is_refused(released, values, problem):
    known = {"comparison": compare(released), "pair": 0, "choice": "tie", "left": "against"}
    with pytest.raises(VoteError, match=problem):
        vote(released, "zorb", 2, actor="ann", **{**known, **values})


def test_a_comparison_has_a_bounded_number_of_pairs(released, monkeypatch):
    monkeypatch.setattr(voting, "MAX_PAIRS", 5)
    with pytest.raises(VoteError, match="6 pairs"):
        compare(released)


@pytest.mark.parametrize(
    "text", ["win_rate: 1.0", "at_least: 0", "voters: 0", "missing: pass", "wins: 3", "win_rate: '0.5'"]
)
def test_an_invalid_gate_is_refused_with_its_key(versions, text):
    (versions.home.path / "policy.yaml").write_text(f"aliases: {{production: {{votes: {{{text}}}}}}}\n")
    with pytest.raises(PolicyError, match=f"aliases.production.votes.{text.partition(':')[0]}"):
        read_policies(versions.home.path)
