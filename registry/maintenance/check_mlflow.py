"""Whether MLflow shows what the registry says: part of `registry.maintenance.fsck`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lora_engine.files import sha256_file
from registry.entities import AdapterVersion, Problem
from registry.errors import MlflowError
from registry.home import Home
from registry.store.artifacts import Store
from registry.versions.mlflow_writer import MlflowVersion, MlflowWriter

SYNC = "`loraline fsck --repair` brings MLflow level again, or builds it anew"


def check_mlflow(
    home: Home, store: Store, versions: Iterable[AdapterVersion], aliases: Mapping[tuple[str, str], int]
) -> Iterator[Problem]:
    """Compares versions, digests, aliases and copies.

    Args:
        home: The home.
        store: Its store.
        versions: What is registered.
        aliases: (name, alias) -> number.
    """
    try:
        with home.lock("mlflow"):
            mirrored = {(entry.name, entry.version): entry for entry in MlflowWriter(home, store).versions()}
    except MlflowError as error:
        yield Problem(error.problem, "MLflow", error.remedy)
        return
    for version in versions:
        entry = mirrored.pop((version.name, version.version), None)
        where = f"MLflow's {version.ref}"
        if entry is None:
            yield Problem("MLflow does not have this version", where, SYNC)
            continue
        if entry.sha256 != version.sha256:
            yield Problem(f"tagged with digest {entry.sha256!r} instead of {version.sha256}", where, SYNC)
        here = (version.name, version.version)
        wanted = tuple(sorted(alias for (name, alias), number in aliases.items() if (name, number) == here))
        if entry.aliases != wanted:
            yield Problem(f"has the aliases {list(entry.aliases)} instead of {list(wanted)}", where, SYNC)
        yield from _check_copy(entry, version, where)
    for name, number in sorted(mirrored):
        yield Problem("MLflow has a version that was never registered here", f"MLflow's {name}@{number}", SYNC)


def _check_copy(entry: MlflowVersion, version: AdapterVersion, where: str) -> Iterator[Problem]:
    if entry.source is None or version.state == "DELETED":
        return
    copy = entry.source / Path(version.adapter_path).name
    if not copy.is_file():
        yield Problem("MLflow's copy of the adapter is gone", f"{where}: {copy}", SYNC)
        return
    actual = sha256_file(copy)
    if actual != version.sha256:
        yield Problem(f"MLflow's copy has digest {actual} instead of {version.sha256}", f"{where}: {copy}", SYNC)
