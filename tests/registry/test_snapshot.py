"""Tests databases that are read from a copy, because SQLite cannot open them where they are."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from registry.errors import HomeError
from registry.store.database import Database
from registry.store.snapshot import readable
from registry.store.tables import MetaRow


def test_a_read_only_database_has_the_rows_that_a_killed_process_left_in_the_log(tmp_path: Path) -> None:
    file, killed = tmp_path / "lineage.db", tmp_path / "killed"
    Database(f"sqlite:///{file}").close()
    killed.mkdir()
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("INSERT INTO meta (key, value) VALUES ('mark', 'in the log')")
        writer.commit()
        for name in ("lineage.db", "lineage.db-wal"):
            shutil.copyfile(tmp_path / name, killed / name)
    with closing(Database(f"sqlite:///{killed / 'lineage.db'}?mode=ro")) as database, database.read() as session:
        assert session.scalar(select(MetaRow.value).where(MetaRow.key == "mark")) == "in the log"
    assert {path.name for path in killed.iterdir()} == {"lineage.db", "lineage.db-wal"}


def test_a_read_only_database_refuses_to_write(tmp_path: Path) -> None:
    with (
        closing(Database(f"sqlite:///{tmp_path / 'absent.db'}?mode=ro")) as database,
        pytest.raises(HomeError, match="cannot be written"),
        database.write(),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_database_that_is_changed_meanwhile_is_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.db"
    file.write_bytes(b"old")
    copies: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        copies.append(target)
        if len(copies) == 1:
            file.write_bytes(b"newer")

    monkeypatch.setattr("registry.store.snapshot.shutil.copyfile", copy)
    with readable(file, copy=True) as scratch:
        assert scratch.read_bytes() == b"newer"
    assert not scratch.parent.exists()
