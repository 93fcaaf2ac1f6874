"""Tests that one changed bit of a stored file, a document, a signature or a row of the log is named."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from registry.home import Home
from registry.maintenance.fsck import fsck
from registry.store.chain import FIELDS
from tasks.operations.verify_files import verify_files
from tests.flows.commands import say
from tests.flows.made import sign_zorb

PLACES = ("export", "store", "log")
COLUMNS = ("previous", "digest", *FIELDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a home, whose `zorb@1` is signed twice, and its export with records."""
    folder = tmp_path_factory.mktemp("flips")
    home = sign_zorb(folder)
    say("promote", "zorb@1", "--to", "trial", "--reason", "to compare", home=home)
    say("export", "zorb@1", "--to", "kohya", "-o", folder / "out", "--with-records", home=home)
    # No process has the copy open, so its database is one file.
    with closing(sqlite3.connect(home / "lineage.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(home, folder / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    return folder


@contextmanager
def flipped(path: Path, position: int) -> Iterator[None]:
    original = path.read_bytes()
    content = bytearray(original)
    content[position // 8 % len(content)] ^= 1 << position % 8
    try:
        path.write_bytes(content)
        yield
    finally:
        path.write_bytes(original)


def name_in_export(folder: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Flips a bit of an exported file, and returns the file and the findings of `verify FOLDER --key`."""
    path = chance.choice(sorted(path for path in (folder / "out").rglob("*") if path.is_file()))
    with flipped(path, chance.randrange(1 << 40)):
        result = verify_files(folder / "out", [folder / "release.pub", folder / "review.pub"])
    # A signature whose key is no longer known is named in a note, and its key in a finding.
    return path.name, [*result.findings, *result.notes] if result.findings else []


def name_in_store(folder: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Flips a bit of a blob, and returns its digest and the problems of `fsck`."""
    blobs = [path for path in (folder / "copy" / "store").rglob("*") if path.is_file() and len(path.name) >= 60]
    path = chance.choice(sorted(blobs))
    path.chmod(0o644)
    with flipped(path, chance.randrange(1 << 40)):
        problems = fsck(Home.open(folder / "copy"), mlflow=False)
    return path.name[-60:], [f"{problem.what} {problem.where}" for problem in problems]


def name_in_log(folder: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Flips a bit of a cell of the log, and returns the event and the problems of `fsck`."""
    file = folder / "copy" / "lineage.db"
    original = file.with_name("original.db")
    shutil.copy(file, original)
    try:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            (count,) = connection.execute("SELECT count(*) FROM events").fetchone()
            value = None
            while value is None or value == "":
                seq, column = chance.randint(1, count), chance.choice(COLUMNS)
                (value,) = connection.execute(f"SELECT {column} FROM events WHERE seq = ?", (seq,)).fetchone()
            if isinstance(value, int):
                change = str(value ^ 1 << chance.randrange(62))
            else:
                content = bytearray(value.encode())
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                change = f"CAST(x'{content.hex()}' AS TEXT)"
            connection.execute(f"UPDATE events SET {column} = {change} WHERE seq = {seq}")
            for _, sql in triggers:
                connection.execute(sql)
        problems = fsck(Home.open(folder / "copy"), mlflow=False)
    finally:
        shutil.move(original, file)
    return f"event {seq}:", [problem.what for problem in problems]


FLIPS = {"export": name_in_export, "store": name_in_store, "log": name_in_log}


def check(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    place = PLACES[seed % len(PLACES)]
    name, findings = FLIPS[place](folder, chance)
    assert any(name in finding for finding in findings), (place, name, findings)


@pytest.mark.parametrize("seed", range(30))
def test_a_changed_bit_is_named(folder: Path, seed: int) -> None:
    check(folder, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_changed_bits_are_named(folder: Path, hundred: int) -> None:
    for seed in range(30 + 100 * hundred, 130 + 100 * hundred):
        check(folder, seed)


def test_nothing_is_named_without_a_change(folder: Path) -> None:
    assert fsck(Home.open(folder / "copy"), mlflow=False) == []
    assert verify_files(folder / "out", [folder / "release.pub", folder / "review.pub"]).holds
