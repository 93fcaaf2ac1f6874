"""Tests the tabs Votes, Releases, Trainings and Datasets in a real browser, against a real server."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from flows.approval import RETRAIN, ApprovalAnswer, make_request, read_answer_of, suspend_for_approval
from lora_engine.progress import Point
from registry.entities import AdapterVersion
from registry.lineage.record import Lineage
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.operations.ballots import open_ballot
from tasks.progress import StepEvent, publish
from tasks.run_entry import recording
from tests.flows.compared import PROMPTS, compared_home
from tests.flows.shared import draw_noise
from tests.flows.studio_page import ROLES, WITHOUT_VOTES, studio
from tests.flows.test_schedule import post
from tests.flows.web.studio_server import UNLABELED

__all__ = ["compared_home", "studio"]

pytestmark = pytest.mark.needs("chromium")


def test_a_voter_judges_pairs_by_keyboard_and_the_page_never_says_which_image_is_whose(studio):
    with closing(Versions(studio.home)) as versions:
        positions = open_ballot(versions, studio.digest, actor="ann").positions
    studio.open("ann", "Votes")
    keys = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"]
    for number, key in enumerate(keys):
        studio.page.wait_for_text(f"{number} of {len(PROMPTS)} pairs judged")
        html = str(studio.page.evaluate("document.querySelector('#votes-ballot').outerHTML"))
        assert html.count("<img") == 2
        assert not [word for word in ("candidate", "small@1", "lora:", ".png") if word in html]
        if number == 1:
            studio.page.press("Backspace")
            studio.page.wait_for_text(f"Pair 1 of {len(PROMPTS)}")
            studio.page.press("ArrowRight")
            studio.page.wait_for_text(f"Pair 2 of {len(PROMPTS)}")
        studio.page.press(key)
    studio.page.wait_for_text("All pairs are judged. Your votes are final, and count.")
    votes = {event.details["pair"]: event.details for event in studio.events("vote") if event.actor == "ann"}
    answers = ["right", "right", "tie", "skip", "left", "right"]
    assert [votes[one.pair]["choice"] for one in positions] == [
        one.choice_of(answer) for one, answer in zip(positions, answers, strict=True)
    ]
    assert [votes[one.pair]["left"] for one in positions] == [one.left for one in positions]
    studio.expand("Results")
    studio.page.wait_for_text("small@1 against base: win rate")


def test_pairs_are_judged_by_touch_at_390_pixels(studio):
    studio.open("ben", "Votes")
    studio.page.wait_for_text("0 of 6 pairs judged")
    studio.page.resize(390, 844)
    image = "document.querySelector('#votes-ballot [data-vote=left] img').getBoundingClientRect()"
    studio.page.wait_for(f"{image}.width > 0 && {image}.width < 195", "the images are not beside each other")
    assert studio.page.evaluate("document.documentElement.scrollWidth") <= 390
    heights = studio.page.evaluate(
        "[...document.querySelectorAll('.votes-keys button')].map(one => one.getBoundingClientRect())"
        ".map(one => [one.height, one.bottom])"
    )
    assert len(heights) == 4
    assert all(height >= 44 and bottom <= 844 for height, bottom in heights)
    place = studio.page.evaluate(f"({{x: {image}.x + 20, y: {image}.y + 20}})")
    studio.page.click_at(place["x"], place["y"])
    studio.page.wait_for_text("1 of 6 pairs judged")
    (vote,) = [event for event in studio.events("vote") if event.actor == "ben"]
    assert vote.details["choice"] == vote.details["left"]


@pytest.mark.nightly
def test_the_tabs_of_the_registry_fit_390_pixels_and_label_their_controls(studio):
    studio.open("carl", "Releases")
    studio.page.wait_for_text("small@staging")
    studio.page.resize(390, 844)
    for tab in ("Votes", "Releases", "Trainings", "Datasets"):
        studio.show_from_menu(tab)
        studio.page.wait_for(f"document.querySelector('[role=tab][aria-selected=true]').innerText.trim() === '{tab}'")
        assert studio.page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        assert studio.page.evaluate(UNLABELED) == [], tab


@pytest.mark.nightly
def test_trainings_are_read_again_only_while_their_tab_is_shown(studio):
    studio.open("ann", "Trainings")
    studio.page.wait_for_text("No training yet")
    count = "performance.getEntriesByType('resource').filter(one => one.name.includes('/queue/join')).length"
    before = studio.page.evaluate(count)
    studio.page.wait_for(f"{count} > {before} + 2", "the timer does not run")
    studio.show("Draw")
    time.sleep(1)
    before = studio.page.evaluate(count)
    time.sleep(2)
    assert studio.page.evaluate(count) == before


def test_a_user_without_a_role_sees_pairs_and_cannot_vote_or_learn_results(studio):
    studio.open("eve", "Votes")
    studio.page.wait_for_text("pairs judged")
    studio.expand("Results")
    studio.page.wait_for_text("Results are shown once you have judged every pair")
    studio.page.press("ArrowLeft")
    studio.page.wait_for_text("eve has no role that may vote small")
    assert not [event for event in studio.events("vote") if event.actor == "eve"]
    assert studio.events("refuse")[-1].actor == "eve"


@pytest.mark.nightly
def test_a_comparison_is_drawn_with_the_queue_of_the_server(studio):
    studio.open("ann", "Votes")
    studio.page.wait_for_text("pairs judged")
    studio.expand("Prepare a comparison")
    chosen = "[...document.querySelectorAll('input')].some(field => field.value === 'small@2')"
    studio.wait(lambda: studio.page.evaluate(chosen))
    studio.page.type("Prompts, one per line", "a ring\n\na red zorb")
    studio.page.type("Seeds per prompt", "1")
    studio.page.type("Steps", "1")
    studio.page.click("Draw the pairs")
    studio.page.wait_for_text("small@2 against small@1: 2 pairs.")
    studio.page.wait_for_text("0 of 2 pairs judged")
    event = studio.events("compare")[-1]
    assert (event.actor, event.name, event.after, event.details["against"]) == ("ann", "small", 2, "small@1")
    studio.open("eve", "Votes")
    studio.page.wait_for_text("0 of 2 pairs judged")
    studio.expand("Prepare a comparison")
    studio.wait(lambda: studio.page.evaluate(chosen))
    studio.page.type("Prompts, one per line", "a star")
    studio.page.click("Draw the pairs")
    studio.page.wait_for_text("eve has no role that may vote small")
    assert studio.events("compare")[-1] == event


def test_a_promotion_shows_all_reasons_happens_after_confirmation_and_is_rolled_back(studio):
    (studio.home.path / "policy.yaml").write_text(ROLES)
    studio.open("carl", "Releases")
    studio.page.wait_for_text("small@staging")
    studio.page.click("Review")
    studio.page.wait_for_text("there is no reason")
    studio.page.type("Reason, stored in the log", "release 12")
    studio.page.click("Review")
    studio.page.wait_for_text("Refused: move production from nothing to small@2")
    studio.page.wait_for_text("votes against base: 0 of 6 are cast")
    studio.page.wait_for_text("votes against base: 0 of 1 users voted")
    (studio.home.path / "policy.yaml").write_text(WITHOUT_VOTES)
    studio.page.click("Review")
    studio.page.wait_for_text("As carl: move production from nothing to small@2")
    studio.page.click("Confirm")
    studio.page.wait_for_text("Done: move production from nothing to small@2")
    studio.page.wait_for_text("small@production")
    (event,) = studio.events("promote")
    assert (event.actor, event.reason, event.alias, event.after) == ("carl", "release 12", "production", 2)
    with closing(Versions(studio.home)) as versions:
        promote(versions, "small", 1, "production", reason="worse", actor="carl")
    studio.page.click("Roll back")
    studio.page.click("Review")
    studio.page.wait_for_text("As carl: move production from small@1 to small@2")
    studio.page.click("Confirm")
    studio.page.wait_for_text("Done: move production from small@1 to small@2")
    assert [(event.actor, event.after) for event in studio.events("rollback")] == [("carl", 2)]


@pytest.mark.nightly
def test_an_alias_that_moved_since_the_review_is_a_conflict(studio):
    (studio.home.path / "policy.yaml").write_text(WITHOUT_VOTES)
    studio.open("carl", "Releases")
    studio.page.wait_for_text("small@staging")
    studio.page.type("Reason, stored in the log", "looks right")
    studio.page.click("Endorse")
    studio.page.click("Review")
    studio.page.wait_for_text("As carl: endorse small@2 for production")
    with closing(Versions(studio.home)) as versions:
        promote(versions, "small", 2, "beta", reason="meanwhile", actor="carl")
    studio.page.click("Confirm")
    studio.page.wait_for_text("the aliases changed since the review")
    assert studio.events("endorse") == []


def suspend_run(api: str, version: AdapterVersion) -> UUID:
    """Returns a flow run that waits for an approval; it has begun in this process, and no worker continues it."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.exceptions import Pause
    from prefect.flow_engine import run_flow

    def ask() -> None:
        raise suspend_for_approval(make_request(version, "staging", "production", 1.0))

    name = f"nightly-{version.version}"
    scheduled = post(api, "flows/", {"name": RETRAIN})["id"]
    deployment = post(api, "deployments/", {"name": name, "flow_id": scheduled})["id"]
    run = post(api, f"deployments/{deployment}/create_flow_run", {"name": name, "state": {"type": "PENDING"}})["id"]
    with get_client(sync_client=True) as client:
        begun = client.read_flow_run(run)
    with pytest.raises(Pause):
        run_flow(flow(name=RETRAIN)(ask), flow_run=begun)
    return UUID(run)


def test_runs_that_wait_are_rejected_and_approved_with_a_reason_by_a_user_who_may(studio, prefect_server, monkeypatch):
    from prefect import context
    from prefect.client.orchestration import get_client

    # The thread of the server has no settings of its own, as a process that was started with PREFECT_API_URL.
    monkeypatch.setattr(context, "GLOBAL_SETTINGS_CONTEXT", context.SettingsContext.get())
    # The Prefect server is that of all tests, and others approve versions of `small`.
    with closing(Versions(studio.home)) as versions:
        older, newer = versions.show("waiting", "1"), versions.show("waiting", "2")
    runs = {version.ref: suspend_run(prefect_server.rstrip("/"), version) for version in (older, newer)}
    studio.open("eve", "Releases")
    studio.expand("Waiting for approval")
    studio.page.wait_for_text(f"{newer.ref} (sha256 {newer.sha256[:16]}) waits to become production")
    studio.page.wait_for_text(f"{older.ref} (sha256 {older.sha256[:16]}) waits to become production")
    studio.page.type("Reason of the decision", "mine")
    studio.page.click("Approve")
    studio.page.wait_for_text("eve has no role that may")
    studio.open("carl", "Releases")
    studio.expand("Waiting for approval")
    studio.page.wait_for_text(newer.ref)
    studio.page.click("Reject")
    studio.page.wait_for_text("cannot be decided")
    studio.page.resize(390, 844)
    assert studio.page.evaluate("document.documentElement.scrollWidth") <= 390
    studio.page.type("Reason of the decision", "blurred")
    studio.page.click("Reject")
    studio.page.wait_for_text(f"Rejected {newer.ref} for production.")
    studio.page.wait_for(f"!document.body.innerText.includes('{newer.ref} (sha256')", "the list is not read again")
    studio.page.type("Reason of the decision", "sharp")
    field = "[...document.querySelectorAll('label')].filter(one => one.innerText.includes('Reason of the decision'))[0]"
    studio.page.evaluate(f"{field}.querySelector('input, textarea').focus()")
    studio.page.press("Tab")
    assert studio.page.evaluate("document.activeElement.innerText.trim()") == "Approve"
    studio.page.press("Enter")
    studio.page.wait_for_text(f"Approved {older.ref} for production.")
    studio.page.wait_for_text("No run waits for an approval.")
    with get_client(sync_client=True) as client:
        answers = {ref: read_answer_of(client, run) for ref, run in runs.items()}
    assert {ref: answer and answer[1] for ref, answer in answers.items()} == {
        newer.ref: ApprovalAnswer("reject", "blurred", "carl", newer.sha256),
        older.ref: ApprovalAnswer("approve", "sharp", "carl", older.sha256),
    }


@pytest.mark.nightly
def test_a_user_without_a_role_cannot_promote(studio):
    before = studio.events("promote")
    studio.open("eve", "Releases")
    studio.page.wait_for_text("small@staging")
    studio.page.type("Reason, stored in the log", "mine")
    studio.page.click("Review")
    studio.page.wait_for_text("eve has no role that may")
    assert studio.events("promote") == before


def test_a_training_is_followed_while_it_runs(studio):
    studio.open("ann", "Trainings")
    studio.page.wait_for_text("No training yet")
    samples = {"prompts": ["a red zorb"], "every": 5}
    with closing(Lineage(studio.home.lineage_url)) as lineage:
        run = lineage.start_run("rings", {"steps": {"adapter": {"uses": "train", "samples": samples}}})
        image = studio.home.cache / "states" / "samples" / "step-000005" / "00-0.png"
        draw_noise_at(image)
        with recording(studio.home, run.id, {"adapter": "train"}):
            for done in range(1, 6):
                point = Point(done, time.time(), {"loss": 0.5 / done, "learning_rate": 0.001})
                publish(StepEvent("adapter", "measured", done=done, points=(point,)))
            publish(StepEvent("adapter", "progress", 5, 20, {"loss": 0.1}))
            publish(StepEvent("adapter", "drawn", done=5, files=(image,)))
            studio.page.wait_for_text("rings: adapter")
            studio.page.wait_for_text("a red zorb, seed 1")
            studio.wait(lambda: "over 5 steps" in str(studio.page.evaluate("document.body.innerHTML")))
            time.sleep(1.1)  # an entry is written at most once a second
            publish(StepEvent("adapter", "progress", 15, 20, {"loss": 0.0625}))
            studio.page.wait_for_text("15 of 20")
            studio.page.wait_for_text("0.0625")
            publish(StepEvent("adapter", "completed"))
        lineage.finish_run(run.id, "COMPLETED")
    studio.page.wait_for_text("completed")


def draw_noise_at(path: Path) -> None:
    path.parent.mkdir(parents=True)
    draw_noise(path, 5)


def test_a_caption_is_edited_in_the_folder_and_the_change_is_taken_back(studio):
    file = studio.project / "images" / "3.txt"
    assert not file.exists()
    studio.open("carl", "Datasets")
    studio.page.wait_for_text("8 images, page 1 of 1")
    click = """(button => { if (button) button.click(); return Boolean(button); })(
      document.querySelector('#data-sheet button[data-image="3.png"]'))"""
    studio.page._wait(click, "no image")
    studio.wait(
        lambda: studio.page.evaluate("[...document.querySelectorAll('input,textarea')].some(f => f.value === '3.png')")
    )
    studio.page.type("Caption", "a ring of noise")
    studio.page.click("Save caption")
    studio.page.wait_for_text("Wrote 3.txt")
    assert file.read_text() == "a ring of noise\n"
    studio.page.wait_for_text("changed since the last run")
    studio.page.click("Undo last change")
    studio.page.wait_for_text("Removed 3.txt")
    assert not file.exists()


@pytest.mark.nightly
def test_a_user_who_may_not_train_cannot_edit_captions(studio):
    studio.open("ann", "Datasets")
    studio.page.wait_for_text("8 images, page 1 of 1")
    studio.page.click("Undo last change")
    studio.page.wait_for_text("ann has no role that may train")
