"""Every fifth fault point, a few random trials, and the checks themselves; `make faults` runs the long campaigns."""

import sqlite3
from contextlib import closing

import pytest

import lora_engine.files
from registry.entities import is_digest
from tests.faults.campaigns import change_bytes, go_through, kill_at_random, race
from tests.faults.invariants import violations
from tests.faults.points import Points, forked
from tests.faults.work import WORKS, prepare, put, without_mlflow

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize(("work", "mode"), [*((work, "kill") for work in WORKS), ("register", "full")])
def test_a_fault_at_any_point_leaves_all_or_nothing(tmp_path, work, mode):
    result = go_through(tmp_path / "trials", work, mode, every=5)
    assert result.points[work] > 20
    # The last trial is the one that gets through; a full disk may be borne before.
    assert result.hits == result.trials - 1 if mode == "kill" else result.hits > 4
    assert result.found == []


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS)
def test_what_was_promised_survives_a_kill_at_any_moment(tmp_path, work):
    result = kill_at_random(tmp_path, work, 10, seed=2)
    assert result.trials == 10
    assert result.found == []


@pytest.mark.slow
def test_registering_with_mlflow_survives_a_kill_at_any_moment(tmp_path):
    assert kill_at_random(tmp_path, "register", 10, seed=2, with_mlflow=True).found == []


@pytest.mark.slow
def test_of_several_promotions_one_wins(tmp_path):
    result = race(tmp_path / "trials", 10)
    assert (result.trials, result.found) == (10, [])


@pytest.mark.slow
def test_changed_bytes_are_noticed_and_never_served(tmp_path):
    result = change_bytes(tmp_path / "trials", 10, seed=3)
    assert (result.hits, result.found) == (10, [])


@pytest.mark.slow
def test_a_point_that_is_not_reached_disturbs_nothing(tmp_path):
    home = prepare(tmp_path / "trial")
    points = Points(str(home), 10_000, "kill")
    status, lines = forked(lambda tell: put(home, 1, tell), before=points.install).finish()
    assert (status, len(lines)) == (0, 3)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        ("UPDATE aliases SET version = 1", "I3"),
        ("UPDATE versions SET sha256 = 'ab' WHERE version = 2", "I2"),
        ("DELETE FROM versions WHERE version = 2", "I2"),
    ],
)
def test_the_checks_see_a_harmed_database(tmp_path, harm, named):
    home = prepare(tmp_path / "trial")
    assert violations(home) == []
    with closing(sqlite3.connect(home / "lineage.db")) as connection:
        connection.execute(harm)
        connection.commit()
    assert any(found.startswith(named) for found in violations(home))


def test_the_checks_see_harmed_files_and_broken_promises(tmp_path):
    home = prepare(tmp_path / "trial")
    assert violations(home, ["registered zorb 9 ab", f"put {'0' * 64}", "moved zorb production 99"])[:3] == [
        "lost: registered zorb 9 ab",
        f"lost: put {'0' * 64}",
        "lost: moved zorb production 99",
    ]
    (home.parent / "canary").write_bytes(b"dead")
    (home.parent / "stray").touch()
    assert {found[:2] for found in violations(home)} == {"I4", "I5"}


@pytest.mark.slow
def test_the_trials_catch_a_write_that_is_not_atomic(tmp_path):
    home = prepare(tmp_path / "trial")

    def write_in_place(path, content):
        with path.open("wb") as file:
            lora_engine.files.os.fsync(file.fileno())
            content(file)

    def harmed():
        without_mlflow()
        import registry.store.local

        registry.store.local.atomic_write = write_in_place

    found = []
    for at in range(1, 30):
        points = Points(str(home), at, "kill")

        def before(points=points):
            harmed()
            points.install()

        _, lines = forked(lambda tell, at=at: WORKS["put"](home, at, tell), before=before).finish()
        found += violations(home, lines)
    # Nothing refers to a half-written blob until it is put again; but the bytes under its digest are others.
    blobs = [path for path in (home / "store" / "blobs").glob("??/*") if is_digest(path.name)]
    assert found or any(lora_engine.files.sha256_file(path) != path.name for path in blobs)
