"""Checks MLflow against the registry. Part of `registry.maintenance.fsck`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lora_engine.files import sha256_file
from registry.entities import AdapterVersion, Problem
from registry.errors import MlflowError
from registry.home import Home
from registry.store.artifacts import Store
from registry.versions.mlflow_writer import MlflowVersion, MlflowWriter

SYNC = "`loraline fsck --repair` syncs MLflow, or rebuilds it"


def check_mlflow(
    home: Home, store: Store, versions: Iterable[AdapterVersion], aliases: Mapping[tuple[str, str], int]
) -> Iterator[Problem]:
    """Compares versions, digests, aliases and file copies, and yields the differences.

    Args:
        home: The home.
        store: Its store.
        versions: The registered versions.
        aliases: (name, alias) -> version number.
    """
    try:
        with home.lock("mlflow"):
            synced = {(entry.name, entry.version): entry for entry in MlflowWriter(home, store).versions()}
    except MlflowError as error:
        yield Problem(error.problem, "MLflow", error.remedy)
        return
    for version in versions:
        entry = synced.pop((version.name, version.version), None)
        where = f"MLflow's {version.ref}"
        if entry is None:
            yield Problem("MLflow does not have this version", where, SYNC)
            continue
        if entry.sha256 != version.sha256:
            yield Problem(f"tagged with digest {entry.sha256!r} instead of {version.sha256}", where, SYNC)
        key = (version.name, version.version)
        expected = tuple(sorted(alias for (name, alias), number in aliases.items() if (name, number) == key))
        if entry.aliases != expected:
            yield Problem(f"has the aliases {list(entry.aliases)} instead of {list(expected)}", where, SYNC)
        yield from _check_copy(entry, version, where)
    for name, number in sorted(synced):
        yield Problem("MLflow has a version that the registry does not have", f"MLflow's {name}@{number}", SYNC)


def _check_copy(entry: MlflowVersion, version: AdapterVersion, where: str) -> Iterator[Problem]:
    if entry.source is None or version.state == "DELETED":
        return
    copy = entry.source / Path(version.adapter_path).name
    if not copy.is_file():
        yield Problem("MLflow's copy of the adapter is missing", f"{where}: {copy}", SYNC)
        return
    actual = sha256_file(copy)
    if actual != version.sha256:
        yield Problem(f"MLflow's copy has digest {actual} instead of {version.sha256}", f"{where}: {copy}", SYNC)
