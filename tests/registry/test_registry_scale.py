"""The work of a command does not grow with the versions of other numbers: statements and opened files are counted."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry.home import Home
from registry.maintenance.backup import backup
from registry.maintenance.gc import collect
from registry.policy.conditions import read_alias_states
from registry.policy.rights import resolve_rights
from registry.versions.promotion import history, promote, rollback
from registry.versions.versions import Versions
from tests.registry.conftest import register_adapter

FEW, MANY = 3, 12
ROOT = Path(__file__).parents[2]
_counters: list[Counter[str]] = []


def _count_open(name: str, arguments: tuple[object, ...]) -> None:
    if name == "open" and isinstance(arguments[0], str | Path):
        for counter in _counters:
            counter[str(arguments[0])] += 1


sys.addaudithook(_count_open)


@contextmanager
def counted(home: Home) -> Iterator[dict[str, int]]:
    """Counts the SQL statements in the block, and the blobs that are opened."""
    counts: Counter[str] = Counter()
    opened: Counter[str] = Counter()

    def count(*_: object) -> None:
        counts["statements"] += 1

    event.listen(Engine, "before_cursor_execute", count)
    _counters.append(opened)
    try:
        yield counts
    finally:
        event.remove(Engine, "before_cursor_execute", count)
        _counters.remove(opened)
        blobs = str(home.store / "blobs")
        inside = {path: times for path, times in opened.items() if path.startswith(blobs) and "locks" not in path}
        counts["blobs"] = sum(inside.values())


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Home]:
    """Returns two homes, with few and with many versions of one adapter; MLflow is never written."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
        for count in (FEW, MANY):
            made[count] = Home.open(tmp_path_factory.mktemp(f"of-{count}") / "home")
            with closing(Versions(made[count])) as versions:
                for number in range(count):
                    register_adapter(versions, f"weights {number}".encode(), alias_request="staging")
                promote(versions, "zorb", 1, "production", reason="first")
    return made


def promoted_and_back(versions: Versions) -> None:
    promote(versions, "zorb", 2, "production", reason="better")
    rollback(versions, "zorb", reason="worse")


def rights(versions: Versions) -> None:
    with versions.lineage.database.read() as session:
        resolve_rights(session, versions, versions.show("zorb", 1))


def alias_states(versions: Versions) -> None:
    with versions.lineage.database.read() as session:
        assert [(state.alias, state.reasons) for state in read_alias_states(versions, session)]


WORK: dict[str, Callable[[Versions], object]] = {
    "show": lambda versions: versions.show("zorb", "production"),
    "list": lambda versions: versions.list(),
    "log": lambda versions: history(versions, "zorb"),
    "lineage": lambda versions: versions.lineage.walk("zorb@1", subjects=True),
    "rights": rights,
    "status of all aliases": alias_states,
    "promote and roll back": promoted_and_back,
    "register": lambda versions: register_adapter(versions, b"one more"),
    "collect": lambda versions: collect(versions.home, dry_run=True),
}


@pytest.mark.parametrize("work", WORK)
def test_statements_and_opened_blobs_do_not_grow_with_the_number_of_versions(homes, monkeypatch, work):
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    counts = {}
    for count, home in homes.items():
        with closing(Versions(home)) as versions:
            WORK[work](versions)  # what the first call caches
            with counted(home) as counts[count]:
                WORK[work](versions)
    assert counts[FEW]["statements"] > 0
    assert counts[MANY] == counts[FEW]


def test_a_read_per_version_is_counted(homes):
    counts = {}
    for count, home in homes.items():
        with closing(Versions(home)) as versions, counted(home) as counts[count]:
            for version in versions.list():
                versions.read_adapter(versions.show("zorb", version.version))
    assert counts[MANY]["statements"] >= counts[FEW]["statements"] + MANY - FEW
    assert counts[MANY]["blobs"] >= counts[FEW]["blobs"] + MANY - FEW


def test_a_backup_reads_the_lists_of_all_artifacts_at_once_and_each_blob_once(homes, tmp_path):
    counts = {}
    for count, home in homes.items():
        with counted(home) as counts[count]:
            done = backup(home, tmp_path / str(count))
        assert not done.problems
        assert counts[count]["blobs"] == done.copied == done.blobs
    assert counts[MANY]["statements"] == counts[FEW]["statements"]


IMPORTS = """
import sys
from registry.home import Home
from registry.versions.promotion import promote, rollback
from registry.versions.versions import Versions
from tasks.operations.promote import find_structure
from tests.registry.conftest import register_adapter
versions = Versions(Home(__import__("pathlib").Path(sys.argv[1])))
promote(versions, "zorb", 2, "production", reason="better")
rollback(versions, "zorb", reason="worse")
promote(versions, "zorb", 2, "trial", reason="another alias")
assert find_structure(versions, versions.show("zorb", 1)), "the bytes are no adapter"
assert versions.is_synced()
print(sorted({"mlflow", "torch"} & set(sys.modules)))
register_adapter(versions, b"one more")
print(sorted({"mlflow", "torch"} & set(sys.modules)))
"""


def test_a_promotion_reaches_mlflow_without_importing_mlflow_or_torch(good, close_mlflow):
    good.close()
    close_mlflow()
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(good.home.path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["[]", "['mlflow']"], done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=good.home.mlflow_url, registry_uri=good.home.mlflow_url)
    aliases = client.get_registered_model("zorb").aliases
    assert {alias: int(number) for alias, number in aliases.items()} == {"production": 1, "staging": 2, "trial": 2}
