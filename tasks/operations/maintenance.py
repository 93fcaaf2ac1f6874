"""Keeping a home in order where registry and engine both have a part: collecting, and the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry.home import Home
from registry.maintenance.doctor import Finding, doctor
from registry.maintenance.gc import Collection, collect
from tasks.errors import SpecError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
CACHE = 20 << 30
"""Bytes of encoded pictures and texts that a collection leaves."""


@dataclass(frozen=True)
class Upkeep:
    """What a collection did, or would do.

    Args:
        collection: In the store and the folders of work.
        cache: Bytes that went from the training cache.
    """

    collection: Collection
    cache: int


def collect_garbage(home: Home, *, grace: float, keep_runs: float, cache: int = CACHE, dry_run: bool = False) -> Upkeep:
    """Deletes what nobody needs (see `registry.maintenance.gc`), and of the training cache what was not used for longest.

    Args:
        home: The home.
        grace: Seconds.
        keep_runs: Days.
        cache: Bytes that may stay in the training cache.
        dry_run: Only says what would go; the cache is then left out.
    """
    done = collect(home, grace=grace, keep_runs=keep_runs, dry_run=dry_run)
    if dry_run:
        return Upkeep(done, 0)
    from lora_engine.training.cache import prune

    return Upkeep(done, prune(home.cache, cache))


def examine(home: Path) -> list[Finding]:
    """All that the doctor finds, with what the engine sees."""
    return doctor(home, probe=_see_devices)


def _see_devices() -> list[Finding]:
    try:
        from lora_engine.bases.base import default_device
        from lora_engine.compute import describe_compute
    except (ImportError, OSError) as error:
        return [Finding("device", "broken", f"torch cannot be loaded ({error})", "install it again, for this machine")]
    seen = describe_compute(default_device())
    name = f" ({seen['device_name']})" if seen["device_name"] else ""
    return [Finding("device", "ok", f"{seen['device']}{name}, {seen['threads']} threads, torch {seen['torch']}")]


def parse_time(text: str) -> float:
    """Seconds of `90s`, `15m`, `24h`, `7d` or a bare number of seconds.

    Raises:
        SpecError: It is none of these.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise SpecError(f"{text!r} is no time", allowed="0 or more, such as 90s, 15m, 24h, 7d")
    return seconds
