"""Defines the pieces of work for fault trials; each reports its result once the call returned."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import registry.versions.versions
from registry.home import Home
from registry.store.artifacts import open_store
from registry.versions import promotion
from registry.versions.versions import Versions
from tests.faults.points import forked
from tests.faults.training import train

Tell = Callable[[str], None]
NAME = "zorb"
GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}


def put(home: Path, seed: int, tell: Tell) -> None:
    """Stores three artifacts that share a file."""
    store, source = open_store(Home.open(home)), random.Random(seed)
    shared = source.randbytes(70_000)
    for number in range(3):
        files = {"shared.bin": shared, f"own/{number}.bin": source.randbytes(200_000)}
        tell(f"put {store.put_files('adapter', files).sha256}")


def register(home: Path, seed: int, tell: Tell) -> None:
    """Registers a new adapter with its report, and requests `staging`."""
    versions, source = Versions(Home.open(home)), random.Random(seed)
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": source.randbytes(50_000)})
    report = versions.store.put_files("report", {"report.json": source.randbytes(2_000)})
    version = versions.register(
        NAME,
        artifact,
        report=report,
        metrics={"clip_t": {"adapter": 0.3}},
        gates=[GATE],
        passed=True,
        alias_request="staging",
        pictures={"before.png": source.randbytes(5_000)},
        card=CARD,
    )
    tell(f"registered {NAME} {version.version} {version.sha256}")


def promote(home: Path, seed: int, tell: Tell) -> None:
    """Moves `production` to a random version, then to another, then back."""
    versions, source = Versions(Home.open(home)), random.Random(seed)
    numbers = [version.version for version in versions.list(NAME)]
    current = next((version.version for version in versions.list(NAME) if "production" in version.aliases), None)
    for number in source.sample([number for number in numbers if number != current], 2):
        event = promotion.promote(versions, NAME, number, "production", reason="a trial")
        tell(f"moved {NAME} production {event.seq}")
    event = promotion.rollback(versions, NAME, reason="a trial")
    tell(f"moved {NAME} production {event.seq}")


CARD = {"title": NAME, "base": "tiny", "license": "apache-2.0"}
WORKS: Mapping[str, Callable[[Path, int, Tell], None]] = {
    "put": put,
    "register": register,
    "promote": promote,
    "train": train,
}


def without_mlflow() -> None:
    """Disables MLflow in this process, which is many times faster; some trials run with it."""
    registry.versions.versions.sync_mlflow = lambda *_arguments, **_settings: None


def prepare(folder: Path, versions: int = 3) -> Path:
    """Creates a home with some versions, in a folder with a canary file; returns the home.

    A forked process creates it, because a process that forks must not have open SQLite connections.
    """
    folder.mkdir(parents=True)
    (folder / "canary").write_bytes(b"alive")
    home = folder / "home"

    def make(tell: Tell) -> None:
        for seed in range(versions):
            register(home, -1 - seed, tell)

    status, lines = forked(make, before=without_mlflow).finish()
    if status:
        raise RuntimeError(f"the home could not be created: {lines}")
    return home


def copy_home(home: Path, folder: Path) -> Path:
    """Copies a closed home with its canary file into a new folder; returns the copy."""
    shutil.copytree(home.parent, folder)
    return folder / home.name


def promised_by(home: Path) -> list[str]:
    """Returns the promises of a closed home for `violations`: a line per version and per move of an alias."""
    with closing(sqlite3.connect(home / "lineage.db")) as connection:
        versions = connection.execute("SELECT name, version, sha256 FROM versions").fetchall()
        moves = connection.execute("SELECT name, alias, seq FROM events WHERE alias IS NOT NULL").fetchall()
    return [f"registered {name} {number} {digest}" for name, number, digest in versions] + [
        f"moved {name} {alias} {seq}" for name, alias, seq in moves
    ]
