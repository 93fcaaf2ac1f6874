"""Tests the release of a staged version: promotion by policy, the check afterwards, rollback, and who decided."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lora_engine.files import sha256_file
from lora_engine.formats import write_adapter
from registry.entities import AdapterVersion
from registry.errors import PromotionError
from registry.home import Home
from registry.identity import current_user
from registry.versions.promotion import history, promote, rollback
from registry.versions.versions import Versions
from tasks.operations.release import ReleaseOutcome, find_obstacle, finish_checks, log_decision, promote_and_check
from tasks.operations.release_check import ReleaseCheck, find_release_problems, is_flat
from tests.flows.made import bring_in, random_adapter
from tests.flows.shared import draw_noise, fill_once

OPEN: dict[str, Any] = {
    "needs_evaluation": False,
    "needs_gate": False,
    "needs_licence": "none",
    "needs_consent": "none",
}
NO_SAMPLE = ReleaseCheck(sample=False)
HUGE = 1e15
"""Scale of factors that are finite, but whose image is not."""
PIPELINE = """\
name: mixed
base: tiny
retraining: {release: automatic, check: {steps: 1, prompt: a photo}}
steps:
  mix: {uses: merge, adapters: [one@1, SECOND@1], weights: [1.0, 0.5]}
  release: {uses: register, adapter: mix, alias: trial}
"""


@pytest.fixture(scope="session")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a home with `ring@1`, `ring@2` and `ring@3`, of which the last draws no image; anyone may promote."""

    def fill(folder: Path) -> None:
        made = Home.open(folder)
        set_policy(made)
        for seed, scale in enumerate((0.1, 0.1, HUGE)):
            register(made, "ring", seed, scale, tmp_path_factory.mktemp("ring"))

    return fill_once(tmp_path_factory, "rings", fill)


@pytest.fixture
def opened(rings: Path, tmp_path: Path) -> Home:
    """Returns a copy of that home."""
    return Home.open(Path(shutil.copytree(rings, tmp_path / "home")))


def register(home: Home, name: str, seed: int, scale: float, folder: Path) -> None:
    file = folder / f"{name}-{seed}.safetensors"
    write_adapter(file, random_adapter(seed, scale=scale), format="kohya")
    bring_in(home, file, name)


def set_policy(home: Home, **changes: Any) -> None:
    (home.path / "policy.yaml").write_text(yaml.safe_dump({"aliases": {"production": OPEN | changes}}))


def show(home: Home, number: int) -> AdapterVersion:
    with closing(Versions(home)) as versions:
        return versions.show("ring", number)


def release(home: Home, number: int, **options: Any) -> ReleaseOutcome:
    settings: dict[str, Any] = {"actor": "anna", "reason": "sharp", "check": NO_SAMPLE}
    return promote_and_check(home, show(home, number), "production", **settings | options)


def events(home: Home, name: str = "ring") -> list[tuple[str, int | None, str]]:
    with closing(Versions(home)) as versions:
        return [(event.action, event.after, event.actor) for event in history(versions, name, "production")]


def obstacle(home: Home, number: int) -> str:
    with closing(Versions(home)) as versions:
        return find_obstacle(versions, show(home, number), "production")


def test_a_version_whose_image_cannot_be_drawn_is_rolled_back(opened: Home) -> None:
    check = ReleaseCheck(prompt="a photo", steps=1)
    assert release(opened, 1, check=check) == ReleaseOutcome("Promoted", "ring@1 is production")
    outcome = release(opened, 3, check=check)
    assert (outcome.state, outcome.failed) == ("RolledBack", True)
    assert outcome.message.startswith("ring@3: sample: ")
    assert outcome.message.endswith("; production is ring@1 again")
    assert events(opened) == [("promote", 1, "anna"), ("promote", 3, "anna"), ("rollback", 1, "anna")]
    assert obstacle(opened, 3) == "it had production before (event 5); promote it by hand"
    assert obstacle(opened, 2) == ""


def test_without_an_earlier_version_a_failed_check_removes_the_alias(opened: Home) -> None:
    corrupt(opened, 1)
    outcome = check_promoted(opened, 1)
    assert outcome.state == "RolledBack"
    assert "production was removed, because no earlier version may have it" in outcome.message
    assert events(opened) == [("promote", 1, "anna"), ("remove", None, current_user())]


def test_without_rollback_a_failed_check_leaves_the_alias_and_fails(opened: Home) -> None:
    corrupt(opened, 1)
    outcome = check_promoted(opened, 1, roll_back=False)
    assert (outcome.state, outcome.failed) == ("CheckFailed", True)
    assert outcome.message.startswith("ring@1 is production, but its check failed: registry: ")
    assert events(opened) == [("promote", 1, "anna")]


def corrupt(home: Home, number: int) -> None:
    """Promotes a version, then damages its adapter file in the store."""
    version = show(home, number)
    with closing(Versions(home)) as versions:
        promote(versions, "ring", number, "production", reason="sharp", actor="anna")
        files = versions.store.files(version.artifact)
    assert overwrite(home, {files[version.adapter_path].sha256})


def overwrite(home: Home, digests: Collection[str]) -> int:
    """Overwrites files of a home by their digests, and returns how many."""
    paths = [path for path in home.path.rglob("*") if path.is_file() and sha256_file(path) in digests]
    for path in paths:
        path.chmod(0o644)
        path.write_bytes(b"no tensors")
    return len(paths)


def check_promoted(home: Home, number: int, *, roll_back: bool = True) -> ReleaseOutcome:
    """Runs the check that a process which died after the promotion left behind."""
    (home.path / "checks").mkdir()
    (home.path / "checks" / f"ring@{number}.production.json").write_text(
        f'{{"name": "ring", "version": {number}, "alias": "production"}}'
    )
    (outcome,) = finish_checks(home, ["ring"], check=NO_SAMPLE, roll_back=roll_back)
    assert finish_checks(home, ["ring"], check=NO_SAMPLE, roll_back=roll_back) == []
    return outcome


def test_a_check_that_was_left_behind_is_dropped_once_the_alias_moved_on(opened: Home) -> None:
    release(opened, 1)
    (opened.path / "checks" / "ring@3.production.json").write_text(
        '{"name": "ring", "version": 3, "alias": "production"}'
    )
    assert finish_checks(opened, ["ring"], check=NO_SAMPLE, roll_back=True) == []
    assert list((opened.path / "checks").iterdir()) == []


def test_who_may_not_move_the_alias_cannot_release_to_it(opened: Home) -> None:
    set_policy(opened, movers=["ben"])
    outcome = release(opened, 1)
    assert outcome == ReleaseOutcome("Refused", "ring@1 not production: anna may not move this alias; ben may")
    assert events(opened) == [], "a refusal that a schedule would repeat every night is not logged"
    assert release(opened, 1, actor="ben").state == "Promoted"


def test_a_version_that_lost_its_alias_is_not_promoted(opened: Home) -> None:
    with closing(Versions(opened)) as versions:
        promote(versions, "ring", 2, "trial", reason="newer", actor="anna")
    outcome = release(opened, 1, source="trial")
    assert outcome.state == "Refused"
    assert "this is ring@2" in outcome.message
    assert events(opened) == []
    assert release(opened, 2, source="trial").state == "Promoted"


def test_a_schedule_releases_only_newer_versions_that_nobody_decided_about(opened: Home) -> None:
    assert obstacle(opened, 1) == ""
    release(opened, 2)
    assert obstacle(opened, 1) == obstacle(opened, 2) == "production has ring@2"
    with closing(Versions(opened)) as versions:
        log_decision(versions, show(opened, 3), "production", "rejected", actor="ben", reason="blurred")
        assert obstacle(opened, 3).startswith("rejected by ben (event ")
        promote(versions, "ring", 3, "production", reason="looked again", actor="ben")
        rollback(versions, "ring", reason="bad", actor="ben")
    assert obstacle(opened, 3).startswith("it had production before")


def test_a_policy_refusal_is_no_decision(opened: Home) -> None:
    set_policy(opened, needs_signature=True)
    with closing(Versions(opened)) as versions, pytest.raises(PromotionError):
        promote(versions, "ring", 1, "production", reason="try", actor="anna")
    assert obstacle(opened, 1) == ""


def test_an_image_of_one_color_is_flat_and_noise_is_not(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "flat.png")
    draw_noise(tmp_path / "noise.png", 0)
    assert is_flat(tmp_path / "flat.png")
    assert not is_flat(tmp_path / "noise.png")


def test_a_broken_export_of_the_version_is_a_problem(opened: Home, tmp_path: Path) -> None:
    line = tmp_path / "export.yaml"
    line.write_text(
        "name: ring\nsteps:\n  exports: {uses: convert, adapter: ring@1, to: [kohya, peft]}\n"
        "  other: {uses: convert, adapter: ring@2, to: [kohya]}\n"
    )
    from flows.plan import plan_pipeline
    from flows.spec import load_spec
    from registry.lineage.record import Lineage
    from tasks.execution import execute

    release(opened, 1)
    with closing(Lineage(opened.lineage_url)) as lineage:
        run = lineage.start_run("ring", {}).id
        for step in plan_pipeline(load_spec(line), opened).steps:
            execute(step.job, step.inputs, opened, run)
        lineage.finish_run(run, "COMPLETED")
        (export,) = (e.output for e in lineage.executions(run) if e.step == "exports")
    version = show(opened, 1)
    assert find_release_problems(opened, version, "production", NO_SAMPLE) == []
    with closing(Versions(opened)) as versions:
        assert export is not None
        digests = {e.sha256 for path, e in versions.store.files(export).items() if "peft" in path}
    assert overwrite(opened, digests)
    (problem,) = find_release_problems(opened, version, "production", NO_SAMPLE)
    assert problem.startswith("exports: ")


def test_a_schedule_promotes_by_policy_and_never_repeats_a_version_that_was_rolled_back(
    prefect_server: str, tmp_path: Path
) -> None:
    from flows.retrain import retrain

    home, spec = Home.open(tmp_path / "home"), tmp_path / "mixed.yaml"
    set_policy(home)
    for seed, (name, scale) in enumerate({"one": 0.1, "two": 0.1, "huge": HUGE}.items()):
        register(home, name, seed, scale, tmp_path)

    def tick(text: str) -> tuple[str, str]:
        spec.write_text(text)
        state: Any = retrain(str(spec), str(home.path), return_state=True)
        return state.name, state.message

    good, bad = PIPELINE.replace("SECOND", "two"), PIPELINE.replace("SECOND", "huge")
    assert tick(good.replace("automatic", "none")) == ("Staged", "mixed@1 as trial")
    assert tick(good) == ("Promoted", "mixed@1 is production"), "what an earlier run staged is released"
    assert tick(good) == ("NothingChanged", "every step is cached")
    name, message = tick(bad)
    assert name == "RolledBack"
    assert message.startswith("mixed@2: sample: ")
    assert message.endswith("production is mixed@1 again")
    assert tick(bad) == ("NothingChanged", "every step is cached")
    assert [event[:2] for event in events(home, "mixed")] == [("promote", 1), ("promote", 2), ("rollback", 1)]
