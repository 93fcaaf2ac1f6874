"""Tests one fault point of each kind, a few random trials, and the checks; `make faults` runs the campaigns."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

import lora_engine.files
import registry.store.local
from registry.entities import is_digest
from registry.home import Home
from registry.maintenance.backup import backup
from registry.maintenance.restore import restore_backup
from tests.faults.campaigns import change_bytes, kill_at_random, race, sweep
from tests.faults.invariants import violations
from tests.faults.points import Points, forked
from tests.faults.training import import_all, train
from tests.faults.work import WORKS, copy_home, prepare, promised_by, put

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


FILES = {"os.mkdir", "open partial", "fsync after open partial", "os.rename", "fsync after os.rename"}
KINDS = {
    "put": FILES | {"open lock"},
    "register": FILES | {"BEGIN", "SELECT", "INSERT versions", "INSERT events", "UPDATE aliases", "commit"},
    "promote": {"BEGIN", "SELECT", "INSERT events", "INSERT aliases", "UPDATE aliases", "commit"},
    "train": FILES | {"os.remove"},
}
"""Kinds of points that a sweep of each piece of work must cover."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a home with three versions; tests work on copies."""
    return prepare(tmp_path_factory.mktemp("prepared") / "trial")


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    import_all(tmp_path_factory.mktemp("imported"))


@pytest.fixture
def trial_home(whole: Path, tmp_path: Path) -> Path:
    return copy_home(whole, tmp_path / "trial")


@pytest.mark.parametrize("work", WORKS)
def test_a_kill_at_any_kind_of_point_leaves_all_or_nothing(tmp_path, work):
    result = sweep(tmp_path, work, "kill")
    assert result.violations == []
    assert set(result.kinds) >= KINDS[work]
    # Only the trial without a fault succeeds.
    assert (result.hits, "none" in result.kinds) == (result.trials - 1, False)


@pytest.mark.parametrize(
    ("work", "mode"), [("register", "full"), ("promote", "full-once"), ("put", "full-once"), ("train", "full")]
)
def test_a_full_disk_at_any_kind_of_point_leaves_all_or_nothing(tmp_path, work, mode):
    result = sweep(tmp_path, work, mode)
    assert result.violations == []
    # Cleanup, and operations that work on a full disk, may succeed.
    assert set(result.kinds) >= KINDS[work] - {"os.mkdir", "open lock", "fsync after os.rename", "os.remove"}
    assert "none" not in result.kinds


@pytest.mark.parametrize("mode", ["kill", pytest.param("full-once", marks=pytest.mark.nightly)])
def test_a_training_that_fails_at_any_kind_of_point_ends_with_the_same_bytes(trial_home, tmp_path, mode):
    def attempt(home, at=0, kind=None):
        points = Points(str(home), at, mode, kind)

        def work(tell):
            train(home, 7, tell)
            for kind in points.kinds:
                tell(f"point {kind}")

        return forked(work, before=points.install).finish()

    status, lines = attempt(copy_home(trial_home, tmp_path / "counted"))
    assert status == 0
    expected = [line for line in lines if line.startswith("trained")]
    assert len(expected) == 2
    counts = Counter(line.removeprefix("point ") for line in lines if line.startswith("point "))
    failures = 0
    # The last point of each kind is in the long run, which continues the short one.
    for number, (kind, at) in enumerate(counts.items()):
        home = copy_home(trial_home, tmp_path / str(number))
        failures += attempt(home, at, kind)[0] != 0
        assert violations(home) == []
        status, lines = attempt(home)
        assert (status, [line for line in lines if line.startswith("trained")]) == (0, expected), (kind, at)
    # Deleting an old checkpoint is the only operation that may fail.
    assert failures >= len(counts) - (mode != "kill")


RESTORE = {"os.mkdir", "open partial", "fsync after open partial", "os.rename", "fsync after os.rename", "os.remove"}


@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_restore_that_fails_at_any_kind_of_point_leaves_the_old_home_or_the_new_one(whole, tmp_path, mode):
    assert forked(lambda tell: tell(str(backup(Home(whole), tmp_path / "backups")))).finish()[0] == 0
    promised = promised_by(whole)

    def restore(name, at=0, kind=None):
        home = tmp_path / name / "home"
        (home / "work").mkdir(parents=True)
        (home / "work" / "mine").write_bytes(b"old")
        points = Points(str(tmp_path / name), at, mode, kind)

        def work(tell):
            restore_backup(tmp_path / "backups", home, replace=True)
            for kind in points.kinds:
                tell(kind)

        return home, *forked(work, before=points.install).finish()

    _, status, kinds = restore("counted")
    assert status == 0
    assert set(kinds) >= RESTORE
    counts = Counter(kinds)
    # The last renames put the home in its place.
    places = [("os.rename", counts["os.rename"] - last) for last in range(4)]
    places += [(kind, (count + 1) // 2) for kind, count in counts.items()]
    old = 0
    for number, (kind, at) in enumerate(places):
        home, status, _ = restore(str(number), at, kind)
        assert status != 0 or kind in {"os.remove", "os.rmdir"}
        assert len([*home.parent.rglob("mine")]) == 1, kind
        if (home / "work" / "mine").is_file():
            old += 1
            assert [path.name for path in home.rglob("*")] == ["work", "mine"]
            continue
        checked = tmp_path / "checked" / str(number)
        checked.mkdir(parents=True)
        (checked / "canary").write_bytes(b"alive")
        assert violations(home.rename(checked / "home"), promised) == []
    assert old >= 3


@pytest.mark.parametrize("work", WORKS)
def test_what_was_promised_survives_a_kill_at_any_moment(tmp_path, work):
    result = kill_at_random(tmp_path, work, 4, seed=2)
    assert result.violations == []
    assert result.trials >= 4
    assert result.hits > 0


def test_registering_with_mlflow_survives_a_kill_at_any_moment(tmp_path):
    result = kill_at_random(tmp_path, "register", 3, seed=2, with_mlflow=True)
    assert result.violations == []
    assert result.trials >= 3
    assert result.hits > 0


def test_of_several_promotions_one_wins(tmp_path):
    result = race(tmp_path / "trials", 5)
    assert (result.trials, result.violations) == (5, [])


def test_changed_bytes_are_noticed_and_never_served(tmp_path):
    result = change_bytes(tmp_path / "trials", 6, seed=3)
    assert (result.trials, result.hits, result.violations) == (6, 6, [])


def test_a_point_that_is_not_reached_disturbs_nothing(trial_home):
    points = Points(str(trial_home), 10_000, "kill")
    status, lines = forked(lambda tell: put(trial_home, 1, tell), before=points.install).finish()
    assert (status, len(lines)) == (0, 3)


@pytest.mark.parametrize(
    ("harm", "invariant"),
    [
        ("UPDATE aliases SET version = 1", "I3"),
        ("UPDATE versions SET sha256 = 'ab' WHERE version = 2", "I2"),
        ("DELETE FROM versions WHERE version = 2", "I2"),
    ],
)
def test_the_checks_see_a_harmed_database(trial_home, harm, invariant):
    assert violations(trial_home) == []
    with closing(sqlite3.connect(trial_home / "lineage.db")) as connection:
        assert connection.execute(harm).rowcount > 0
        connection.commit()
    assert any(violation.startswith(invariant) for violation in violations(trial_home))


def test_the_checks_see_harmed_files_and_broken_promises(trial_home):
    home = trial_home
    assert violations(home, ["registered zorb 9 ab", f"put {'0' * 64}", "moved zorb production 99"])[:3] == [
        "lost: registered zorb 9 ab",
        f"lost: put {'0' * 64}",
        "lost: moved zorb production 99",
    ]
    (home.parent / "canary").write_bytes(b"dead")
    (home.parent / "stray").touch()
    assert {violation[:2] for violation in violations(home)} == {"I4", "I5"}


def test_the_trials_catch_a_write_that_is_not_atomic(whole, tmp_path):
    def write_in_place(path, content):
        with path.open("wb") as file:
            lora_engine.files.os.fsync(file.fileno())
            content(file)

    def blobs_differ(home: Path) -> bool:
        # Nothing refers to a partial blob until it is put again, so only a check of its digest detects it.
        blobs = [path for path in (home / "store" / "blobs").glob("??/*") if is_digest(path.name)]
        assert blobs
        return any(lora_engine.files.sha256_file(path) != path.name for path in blobs)

    for at in range(1, 30):
        home = copy_home(whole, tmp_path / str(at))
        points = Points(str(home), at, "kill")

        def harm(points=points):
            registry.store.local.atomic_write = write_in_place
            points.install()

        _, lines = forked(lambda tell, home=home: put(home, 1, tell), before=harm).finish()
        if violations(home, lines) or blobs_differ(home):
            return
    pytest.fail("a blob that was written in place was complete after every kill")
