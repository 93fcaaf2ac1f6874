"""Targets that read what is kept: the rows of a home's database, and backups in folders and archives."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from lora_engine.files import sha256_bytes
from registry.errors import RegistryError
from registry.home import Home
from registry.maintenance.backup import backup
from registry.maintenance.fsck import fsck
from registry.maintenance.repair import repair
from registry.maintenance.restore import restore_backup
from registry.versions.promotion import promote, read_log
from registry.versions.versions import Versions
from tests.fuzz.files import Files, read_files, write_files
from tests.fuzz.target import Target
from tests.registry.conftest import register_adapter

_DATABASE = "lineage.db"


@functools.cache
def _home(folder: Path) -> Home:
    """Returns a home with two versions and aliases; MLflow, which takes seconds, is not written."""
    home = Home.open(folder)
    unsynced = patch("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    with unsynced, closing(Versions(home)) as versions:
        register_adapter(versions, b"first weights", alias_request="staging")
        register_adapter(versions, b"second weights", alias_request="staging")
        promote(versions, "zorb", 1, "production", reason="looks right", override=True)
    home.reserve.unlink(missing_ok=True)
    (folder / "policy.yaml").write_text("recall: flag\n")
    return home


def _seed_rows(folder: Path) -> list[Files]:
    return [{name: content for name, content in read_files(_home(folder).path).items() if not name.endswith(".lock")}]


def _seed_backups(folder: Path) -> list[Files]:
    backup(_home(folder / "home"), folder / "backup")
    return [read_files(folder / "backup")]


def _seed_archives(folder: Path) -> list[Files]:
    backup(_home(folder / "home"), folder / "backup.tar")
    return [{"backup.tar": (folder / "backup.tar").read_bytes()}]


def check_rows(folder: Path, output: Path) -> None:
    """Reads the versions, the log and the lineage of a home, checks it, and repairs a copy of it."""
    shutil.copytree(folder, output / "home")
    home = Home.open(output / "home")
    for _ in _refusals(home):
        pass
    problems = fsck(home, mlflow=False)
    assert all(problem.what for problem in problems)
    repair(home, mlflow=False)
    fsck(home, mlflow=False)


def _refusals(home: Home) -> Iterator[RegistryError]:
    """Yields the refusals of what reads a home."""
    try:
        with closing(Versions(replace(home, read_only=True))) as versions:
            for read in (
                versions.list,
                lambda: versions.show("zorb", 1),
                lambda: versions.get("zorb", "staging"),
                lambda: read_log(versions),
                lambda: versions.lineage.walk("zorb@1", subjects=True),
            ):
                try:
                    read()
                except RegistryError as error:
                    yield error
    except RegistryError as error:
        yield error


def _with_digests(folder: Path) -> None:
    """Gives the manifest the digests of the changed files, half of the time, so that more than digests is checked."""
    for path in folder.rglob("manifest.json"):
        try:
            manifest = json.loads(path.read_bytes())
            names = list(manifest["files"])
            if sum(path.read_bytes()) % 2 == 0:
                continue
            for name in names:
                manifest["files"][name] = sha256_bytes((path.parent / name).read_bytes())
        except (ValueError, KeyError, TypeError, OSError, AttributeError):
            continue
        write_files(path.parent, {path.name: json.dumps(manifest).encode()})


def check_backup(folder: Path, output: Path) -> None:
    """Restores a backup, whole or not at all; a restored home can be checked."""
    archive = folder / "backup.tar"
    source = archive if archive.is_file() else shutil.copytree(folder, output / "source")
    if source is not archive:
        _with_digests(source)
    place = output / "restored"
    place.mkdir()
    try:
        restored = restore_backup(source, place / "home")
    except RegistryError:
        left = [path.name for path in place.iterdir()]
        assert not left, f"a refused restore left {left}"
        raise
    assert [path.name for path in place.iterdir()] == ["home"]
    fsck(Home.open(restored.home), mlflow=False)


HOMES = (
    Target("rows", _seed_rows, check_rows, 0.2),
    Target("backups", _seed_backups, check_backup, 0.3),
    Target("archives", _seed_archives, check_backup, 0.3),
)
"""Targets of homes and backups."""
