"""Checks an installation: packages, folders, databases and servers, with a remedy for each problem.

`registry.maintenance.fsck` checks the registered data. The caller probes the devices (CUDA, MPS).
"""

from __future__ import annotations

import os
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote
from urllib.request import Request, urlopen

from filelock import Timeout
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lora_engine.files import atomic_write
from registry.errors import DiskFull, HomeError, MlflowError, RegistryError, StoreError, disk_errors
from registry.home import Home
from registry.maintenance.probes import Finding, Level, file_system_of, probe_database
from registry.settings import NAME
from registry.store.database import Database, name_of, sqlite_file
from registry.store.redaction import redact, redact_url
from registry.store.remote import FsspecBlobs, open_blobs
from registry.store.schema import file_schema
from registry.store.snapshot import readable
from registry.versions.mlflow_drift import RESTORE, find_drift
from registry.versions.mlflow_sync import is_synced

__all__ = ["Finding", "doctor"]

KNOWN_BREAKS: Mapping[str, tuple[str, str, str]] = {
    "fastapi": (">=0.151", "<0.151", "Prefect 3.8.8 cannot start its server with it"),
    "sqlalchemy": (">=2.1.dev0", "<2.1", "Prefect 3.8.8 never runs a schedule with it"),
    "pillow": ("<13", ">=13", "an image can execute code in the process that opens it (GHSA-8g5g-8vmr-9782)"),
    "torch": ("<2.10", ">=2.10", "a pickle can execute code in the process that opens it (CVE-2026-24747)"),
}
"""Package -> versions with a known fault, versions to install instead, and the fault."""

_LOW_SPACE, _NO_SPACE = 5 << 30, 200 << 20
_SHOWN = 12
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afpfs", "ceph", "glusterfs", "lustre"}
)


def doctor(
    path: Path,
    *,
    probe: Callable[[], list[Finding]] = list,
    installed: Callable[[str], str | None] | None = None,
) -> list[Finding]:
    """Checks everything that a home needs. Changes nothing, except that it writes and deletes one probe file.

    Args:
        path: The home; may be missing.
        probe: Returns the engine's findings, such as devices.
        installed: Returns the version of a package or None; None checks this environment.
    """
    findings = [*check_packages(installed or _installed), *_check_home(path)]
    is_usable = all(finding.level != "broken" for finding in findings if finding.about == "settings")
    if is_usable and path.is_dir():
        home = Home.open_to_read(path)
        findings += [*_check_databases(home), *_check_store(home), *_check_mlflow(home), *_check_locks(home)]
    return [*findings, *_check_prefect(path), *_check_hugging_face(), *probe()]


def check_packages(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Checks Python and every package against Loraline's requirements and the versions with known faults."""
    try:
        distribution = metadata.distribution("loraline")
        python = distribution.metadata["Requires-Python"] or ">=3.11"
        requirements = distribution.requires or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "warning", "loraline itself is not installed", "pip install loraline")
        requirements, python = [], ">=3.11"
    version = ".".join(map(str, sys.version_info[:3]))
    is_supported = SpecifierSet(python).contains(version)
    remedy = "" if is_supported else f"use Python {python}"
    yield Finding("python", "ok" if is_supported else "broken", version, remedy)
    problems = 0
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        finding = _check_package(requirement, installed(requirement.name))
        if finding is not None:
            problems += 1
            yield finding
    for name, (versions, instead, fault) in KNOWN_BREAKS.items():
        version_of = installed(name)
        if version_of is not None and SpecifierSet(versions).contains(version_of, prereleases=True):
            problems += 1
            yield Finding("packages", "broken", f"{name} {version_of}: {fault}", f"pip install '{name}{instead}'")
    if not problems:
        yield Finding("packages", "ok", "all requirements are met")


def _check_package(requirement: Requirement, version: str | None) -> Finding | None:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Finding("packages", "broken", f"{requirement.name} is not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", "broken", f"{requirement.name} {version} is not {requirement.specifier}", remedy)
    return None


def _check_home(path: Path) -> Iterator[Finding]:
    if not path.exists():
        remedy = "`loraline run` or `loraline import` creates it; or correct LORALINE_HOME"
        yield Finding("home", "warning", f"{path} does not exist", remedy)
        return
    yield _check_folder(path)
    if not path.is_dir():
        return
    try:
        settings = Home(path).settings
    except HomeError as error:
        yield Finding("settings", "broken", error.problem, error.remedy)
        return
    values = {key: value for key, value in settings.model_dump().items() if value}
    shown = ", ".join(f"{key}: {redact_url(value)}" for key, value in values.items())
    yield Finding("settings", "ok", shown or f"no {NAME}: everything is in the home")


def _check_folder(path: Path) -> Finding:
    """Returns if the folder is writable, and its free space."""
    probe = path / f".doctor-{os.getpid()}"
    try:
        with disk_errors(path):
            atomic_write(probe, b"can this be written?")
            probe.unlink()
    except DiskFull:
        pass  # the free space says it
    except HomeError as error:
        if path.is_dir():
            return Finding("home", "warning", f"{path}: {error.problem}; verbs that only read work", error.remedy)
        return Finding("home", "broken", f"{path}: {error.problem}", error.remedy)
    free = shutil.disk_usage(path).free
    level: Level = "broken" if free < _NO_SPACE else "warning" if free < _LOW_SPACE else "ok"
    remedy = "" if level == "ok" else "`loraline gc`, or free some space"
    return Finding("home", level, f"{path.absolute()}, {free / (1 << 30):.1f} GiB free", remedy)


def _check_databases(home: Home) -> Iterator[Finding]:
    for about, url in (("database", home.lineage_url), ("MLflow's database", home.mlflow_url)):
        try:
            file = sqlite_file(url)
            if file is None:
                yield probe_database(about, url)
                continue
            with readable(file, copy=home.read_only) as copy:
                schema = file_schema(copy) if about == "database" else None
        except RegistryError as error:
            yield Finding(about, "broken", f"{name_of(url)}: {error.problem}", error.remedy)
            continue
        system = file_system_of(file)
        if system in _NETWORK:
            yield Finding(
                about,
                "broken",
                f"{file} is SQLite on {system}, whose locks are unreliable",
                "move the home to a local disk, or name a PostgreSQL database in loraline.yaml",
            )
        elif not file.exists():
            yield Finding(about, "ok", f"{file} will be created on first use")
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
        yield Finding("store", "broken", f"{redact_url(url)}: {error.problem}", error.remedy)
        return
    yield Finding("store", "ok", redact_url(url))


def _check_mlflow(home: Home) -> Iterator[Finding]:
    file = sqlite_file(home.lineage_url)
    if file is not None and not file.exists():
        return
    try:
        with closing(Database(home.lineage_url)) as database:
            synced = is_synced(home, database)
            drift = find_drift(home, database)
    except (HomeError, MlflowError):
        return  # `_check_databases` reports it
    if not synced:
        yield Finding(
            "MLflow", "warning", "is behind", "the next command syncs it; `loraline fsck --repair` syncs it now"
        )
    for difference in drift[:_SHOWN]:
        yield Finding("MLflow", "warning", f"{difference.problem.where}: {difference.what}", RESTORE)
    if len(drift) > _SHOWN:
        yield Finding("MLflow", "warning", f"{len(drift) - _SHOWN} more differences", RESTORE)
    if synced and not drift:
        yield Finding("MLflow", "ok", "is in sync")


def _check_locks(home: Home) -> Iterator[Finding]:
    files = sorted(home.locks.glob("*.lock"))
    held = []
    for path in files if not home.read_only else []:
        try:
            with home.lock(path.stem, timeout=0):
                pass
        except Timeout:
            held.append(path.stem[:12])
    suffix = f"; held now: {', '.join(held)}" if held else ""
    yield Finding("locks", "ok", f"{len(files)} lock files, which are harmless{suffix}")


def _check_prefect(path: Path) -> Iterator[Finding]:
    url = os.environ.get("PREFECT_API_URL")
    if url is None:
        folder = os.environ.get("PREFECT_HOME") or path / "prefect"
        yield Finding("Prefect", "ok", f"starts its own server for each run, in {folder}")
        return
    remedy = "start it (`prefect server start`), or unset PREFECT_API_URL"
    if not url.startswith(("http://", "https://")):
        yield Finding("Prefect", "broken", f"PREFECT_API_URL is {redact_url(url)!r}, which is not a server URL", remedy)
        return
    try:
        with urlopen(_health_request(url), timeout=3):  # noqa: S310
            yield Finding("Prefect", "ok", f"server at {redact_url(url)}")
    except (URLError, OSError, ValueError, HTTPException) as error:
        problem = f"no server answers at {redact_url(url)} ({redact(str(error), url)})"
        yield Finding("Prefect", "broken", problem, remedy)


def _health_request(url: str) -> Request:
    """Returns the request for a server's state, with the user and password of its URL as Prefect sends them."""
    scheme, _, rest = url.rstrip("/").partition("://")
    userinfo, at, address = rest.rpartition("@")
    request = Request(f"{scheme}://{address}/health")  # noqa: S310 (`_check_prefect` allows http and https only)
    if at:
        request.add_header("Authorization", f"Basic {b64encode(unquote(userinfo).encode()).decode()}")
    return request


def _check_hugging_face() -> Iterator[Finding]:
    root = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or root / "hub")
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = [name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}]
    try:
        models = sum(1 for _ in cache.glob("models--*")) if cache.is_dir() else 0
    except OSError as error:
        yield Finding(
            "Hugging Face", "warning", f"{cache}: {error.strerror}", "set HF_HOME to a folder that you can read"
        )
        return
    state = f"{models} models in {cache}" + (f"; offline ({', '.join(offline)})" if offline else "")
    if offline and not models:
        yield Finding("Hugging Face", "warning", state, f"only the base 'tiny' can be used: unset {', '.join(offline)}")
    else:
        yield Finding("Hugging Face", "ok", state)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
