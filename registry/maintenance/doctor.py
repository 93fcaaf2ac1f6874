"""What is wrong with an installation, and how to mend it. Looks at packages, folders, databases and places; no bytes.

Whether what is registered is whole is `registry.maintenance.fsck`'s affair. What computes (CUDA, MPS) is told by the caller.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from filelock import Timeout
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_engine.files import atomic_write
from registry.errors import HomeError, RegistryError, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.probes import Finding, Level, file_system_of, probe_database
from registry.settings import NAME
from registry.store.database import Database, name_of, sqlite_file
from registry.store.remote import FsspecBlobs, open_blobs
from registry.store.schema import file_schema
from registry.versions.mlflow_sync import is_synced

__all__ = ["Finding", "doctor"]

KNOWN_BREAKS: Mapping[str, tuple[str, str, str]] = {
    "fastapi": (">=0.151", "<0.151", "Prefect 3.8.8 cannot start its server with it"),
    "sqlalchemy": (">=2.1.dev0", "<2.1", "Prefect 3.8.8 never runs a schedule with it"),
    "pillow": ("<13", ">=13", "a picture can take over the process that opens it (GHSA-8g5g-8vmr-9782)"),
    "torch": ("<2.10", ">=2.10", "a pickled file can take over the process that opens it (CVE-2026-24747)"),
}
"""Package -> versions that are known to break, those to install instead, and what breaks."""

_LITTLE, _HARDLY_ANY = 5 << 30, 200 << 20
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afpfs", "ceph", "glusterfs", "lustre"}
)


def doctor(
    path: Path,
    *,
    probe: Callable[[], list[Finding]] = list,
    installed: Callable[[str], str | None] | None = None,
) -> list[Finding]:
    """Looks at everything that a home needs; changes nothing but for a file that it writes and deletes.

    Args:
        path: The home; need not be there.
        probe: Gives what the engine sees: devices and the like.
        installed: Gives the version of a package or None; asks this environment by default.
    """
    found = [*check_packages(installed or _installed), *_check_home(path)]
    if all(finding.level != "broken" for finding in found if finding.about in {"home", "settings"}) and path.is_dir():
        home = Home(path.absolute())
        found += [*_check_databases(home), *_check_store(home), *_check_mlflow(home), *_check_locks(home)]
    return [*found, *_check_prefect(path), *_check_hugging_face(), *probe()]


def check_packages(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Python and every package, against what Loraline asks for and what is known to break."""
    try:
        about = metadata.distribution("loraline")
        python = about.metadata["Requires-Python"] or ">=3.11"
        wanted = about.requires or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "warning", "loraline itself is not installed", "pip install loraline")
        wanted, python = [], ">=3.11"
    version = ".".join(map(str, sys.version_info[:3]))
    fits = SpecifierSet(python).contains(version)
    yield Finding("python", "ok" if fits else "broken", version, "" if fits else f"use Python {python}")
    wrong = 0
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _check_package(requirement, installed(requirement.name))
        if finding is not None:
            wrong += 1
            yield finding
    for name, (versions, instead, why) in KNOWN_BREAKS.items():
        version_of = installed(name)
        if version_of is not None and SpecifierSet(versions).contains(version_of, prereleases=True):
            wrong += 1
            yield Finding("packages", "broken", f"{name} {version_of}: {why}", f"pip install '{name}{instead}'")
    if not wrong:
        yield Finding("packages", "ok", "all are as Loraline asks for")


def _check_package(requirement: Requirement, version: str | None) -> Finding | None:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding("packages", "broken", f"{requirement.name} is not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", "broken", f"{requirement.name} {version} is not {requirement.specifier}", remedy)
    return None


def _check_home(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield Finding("home", "warning", f"{path} is not there yet", "`loraline init`, or set LORALINE_HOME")
        return
    probe = path / f".doctor-{os.getpid()}"
    try:
        with disk_errors(path):
            atomic_write(probe, b"can this be written?")
            probe.unlink()
    except HomeError as error:
        yield Finding("home", "broken", f"{path}: {error.problem}", error.remedy)
        return
    free = shutil.disk_usage(path).free
    level: Level = "broken" if free < _HARDLY_ANY else "warning" if free < _LITTLE else "ok"
    remedy = "" if level == "ok" else "`loraline gc`, or free some space"
    yield Finding("home", level, f"{path.absolute()}, {free / (1 << 30):.1f} GiB left", remedy)
    try:
        settings = Home(path).settings
    except HomeError as error:
        yield Finding("settings", "broken", error.problem, error.remedy)
        return
    said = {key: value for key, value in settings.model_dump().items() if value}
    shown = ", ".join(f"{key}: {name_of(value) if '@' in str(value) else value}" for key, value in said.items())
    yield Finding("settings", "ok", shown or f"no {NAME}: all is in the home")


def _check_databases(home: Home) -> Iterator[Finding]:
    for about, url in (("database", home.lineage_url), ("MLflow's database", home.mlflow_url)):
        try:
            file = sqlite_file(url)
            if file is None:
                yield probe_database(about, url)
                continue
            schema = file_schema(file) if about == "database" else None
        except RegistryError as error:
            yield Finding(about, "broken", f"{error.where}: {error.problem}", error.remedy)
            continue
        system = file_system_of(file)
        if system in _NETWORK:
            yield Finding(
                about,
                "broken",
                f"{file} is SQLite on {system}, whose locks do not hold",
                "keep the home on a local disk, or name a PostgreSQL database in loraline.yaml",
            )
        elif not file.exists():
            yield Finding(about, "ok", f"{file} will be made on first use")
        else:
            yield Finding(about, "ok", f"{file}" + (f", schema {schema}" if schema is not None else ""))


def _check_store(home: Home) -> Iterator[Finding]:
    url = home.store_url
    if url is None:
        yield Finding("store", "ok", str(home.store))
        return
    try:
        blobs = open_blobs(url)
        if isinstance(blobs, FsspecBlobs):
            blobs.check()
    except StoreError as error:
        yield Finding("store", "broken", f"{url}: {error.problem}", error.remedy)
        return
    yield Finding("store", "ok", url)


def _check_mlflow(home: Home) -> Iterator[Finding]:
    file = sqlite_file(home.lineage_url)
    if file is not None and not file.exists():
        return
    try:
        with closing(Database(home.lineage_url)) as database:
            level = is_synced(home, database)
    except HomeError:
        return  # told with the databases
    if level:
        yield Finding("MLflow", "ok", "shows all that is registered")
    else:
        yield Finding(
            "MLflow", "warning", "is behind", "the next command brings it level; `loraline fsck --repair` at once"
        )


def _check_locks(home: Home) -> Iterator[Finding]:
    files = sorted(home.locks.glob("*.lock"))
    held = []
    for path in files:
        try:
            with home.lock(path.stem, timeout=0):
                pass
        except Timeout:
            held.append(path.stem[:12])
    told = f"; held now: {', '.join(held)}" if held else ""
    yield Finding("locks", "ok", f"{len(files)} lock files, which are harmless{told}")


def _check_prefect(path: Path) -> Iterator[Finding]:
    url = os.environ.get("PREFECT_API_URL")
    if url is None:
        place = os.environ.get("PREFECT_HOME") or path / "prefect"
        yield Finding("Prefect", "ok", f"starts a server of its own for each run, in {place}")
        return
    remedy = "start it (`prefect server start`), or unset PREFECT_API_URL"
    if not url.startswith(("http://", "https://")):
        yield Finding("Prefect", "broken", f"PREFECT_API_URL is {url!r}, no address of a server", remedy)
        return
    try:
        with urlopen(f"{url.rstrip('/')}/health", timeout=3):  # noqa: S310
            yield Finding("Prefect", "ok", f"server at {url}")
    except (URLError, OSError, ValueError) as error:
        yield Finding("Prefect", "broken", f"no server answers at {url} ({error})", remedy)


def _check_hugging_face() -> Iterator[Finding]:
    root = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or root / "hub")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = [name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}]
    held = sum(1 for _ in cache.glob("models--*")) if cache.is_dir() else 0
    found = f"{held} models in {cache}" + (f"; offline ({', '.join(offline)})" if offline else "")
    if offline and not held:
        yield Finding("Hugging Face", "warning", found, f"only the base 'tiny' can be used: unset {', '.join(offline)}")
    else:
        yield Finding("Hugging Face", "ok", found)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
