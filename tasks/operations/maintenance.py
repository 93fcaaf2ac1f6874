"""Implements garbage collection and the doctor, which combine the registry and the engine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry.context import RegistryContext
from registry.home import Home
from registry.maintenance.doctor import Finding, doctor
from registry.maintenance.gc import Collection, collect
from registry.maintenance.repair import Repair, repair
from registry.policy.identity_policy import IdentityPolicy
from registry.policy.policy_file import read_policies
from registry.versions.guard import require_permission
from tasks.errors import SpecError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
CACHE = 20 << 30
"""Default size of the training cache (encoded images and texts) after a collection, in bytes."""


@dataclass(frozen=True)
class Upkeep:
    """Result of a collection, or of its dry run.

    Args:
        collection: Result for the store and the work folders.
        cache: Bytes deleted from the training cache.
    """

    collection: Collection
    cache: int


def collect_garbage(home: Home, *, grace: float, keep_runs: float, cache: int = CACHE, dry_run: bool = False) -> Upkeep:
    """Deletes unreferenced artifacts (see `registry.maintenance.gc`) and the least recently used cache entries.

    Args:
        home: The home.
        grace: Grace period in seconds; younger items are kept.
        keep_runs: Age in days of runs whose artifacts are kept.
        cache: Maximum size of the training cache in bytes.
        dry_run: True deletes nothing and ignores the cache.

    Raises:
        Refused: The user has no role that may; logged.
    """
    if not dry_run:
        _require_administration(home, "gc")
    collection = collect(home, grace=grace, keep_runs=keep_runs, dry_run=dry_run)
    if dry_run:
        return Upkeep(collection, 0)
    from lora_engine.training.cache import prune

    return Upkeep(collection, prune(home.cache, cache))


def repair_home(home: Home, *, mlflow: bool = True, grace: float = 3600.0) -> list[Repair]:
    """Repairs a home if the user may administer it; see `registry.maintenance.repair.repair`.

    Raises:
        Refused: The user has no role that may; logged.
    """
    _require_administration(home, "repair")
    return repair(home, mlflow=mlflow, grace=grace)


def _require_administration(home: Home, operation: Literal["gc", "repair"]) -> None:
    policies = read_policies(home.path)
    if not policies.roles and policies.identity.accept == IdentityPolicy().accept:
        return  # every user may: a database that must be repaired first is not opened for it
    with closing(RegistryContext(home)) as context:
        require_permission(context, operation)


def examine(home: Path) -> list[Finding]:
    """Returns the findings of the doctor, devices included."""
    return doctor(home, probe=_probe_devices)


def _probe_devices() -> list[Finding]:
    try:
        from lora_engine.bases.base import default_device
        from lora_engine.compute import describe_compute
    except (ImportError, OSError) as error:
        return [Finding("device", "broken", f"torch cannot be loaded ({error})", "reinstall torch for this machine")]
    compute = describe_compute(default_device())
    name = f" ({compute['device_name']})" if compute["device_name"] else ""
    return [
        Finding("device", "ok", f"{compute['device']}{name}, {compute['threads']} threads, torch {compute['torch']}")
    ]


def parse_time(text: str) -> float:
    """Parses `90s`, `15m`, `24h`, `7d` or a number of seconds; returns seconds.

    Raises:
        SpecError: The text is none of these.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SpecError(f"invalid time {text!r}", allowed="0 or more, such as 90s, 15m, 24h, 7d")
    return seconds
