"""Implements the fault campaigns: fault points in turn, random kills, races, changed bytes."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from registry.entities import is_digest
from registry.errors import DamagedBlob, MissingBlob
from registry.home import Home
from registry.maintenance.fsck import fsck
from registry.versions import promotion
from registry.versions.versions import Versions
from tests.faults.invariants import violations
from tests.faults.points import Mode, Points, Trial, forked
from tests.faults.work import NAME, WORKS, Tell, copy_home, prepare, promised_by, register, without_mlflow

_FRESH_AFTER = 60  # trials per home, which keeps the checks fast
_SEED = 5  # one seed for all trials of a sweep, so that they have the same points


@dataclass
class Result:
    """Counts and violations of a campaign.

    Attributes:
        trials: Number of injected faults.
        hits: Number of faults with an effect: a process that was killed or refused, a change that was detected.
        violations: Violated invariants, each with its trial.
        points: Work -> number of its fault points.
        kinds: Kinds of points at which the work of a sweep failed.
    """

    trials: int = 0
    hits: int = 0
    violations: list[str] = field(default_factory=list)
    points: dict[str, int] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)

    def count(self, name: str, hit: bool, violations: list[str]) -> None:
        self.trials += 1
        self.hits += hit
        self.violations += [f"{name}: {entry}" for entry in violations]


def fail_at_each_point(folder: Path, work: str, mode: Mode, *, every: int = 1) -> Result:
    """Fails a piece of work at every n-th fault point in turn, until it passes all of them."""
    result = Result()
    home = prepare(folder)
    promised: list[str] = []
    for at in itertools.count(1, every):
        points = Points(str(home), at, mode)
        status, lines = _start(home, work, at, points.install, points=points).finish()
        promised += _promises(lines)
        result.count(f"{work}, {mode} at point {at}", status != 0, violations(home, promised))
        # Work may succeed on a full disk, so the exit status does not tell that no point is left.
        if any(line.startswith("points ") and int(line.split()[1]) < at for line in lines):
            result.points[work] = at - every
            break
    return result


def sweep(folder: Path, work: str, mode: Mode) -> Result:
    """Fails at one of the last fault points of each kind, each in a copy of the same home; one trial has no fault."""
    result = Result()
    whole = prepare(folder / "whole")
    promised = promised_by(whole)
    counts = Counter(_list_kinds(copy_home(whole, folder / "counted"), work))
    result.points[work] = counts.total()
    for number, (kind, count) in enumerate([*counts.items(), ("none", 1)]):
        home = copy_home(whole, folder / str(number))
        # The number of new folders depends on digests that contain the time, so the last of them may not exist.
        at = (count + 1) // 2 if "os.mkdir" in kind else count
        points = Points(str(home), at, mode, kind)
        status, lines = _start(home, work, _SEED, points.install).finish()
        result.count(f"{work}, {mode} at {kind}", status != 0, violations(home, [*promised, *_promises(lines)]))
        if status != 0:
            result.kinds.append(kind)
    return result


def _list_kinds(home: Path, work: str) -> list[str]:
    points = Points(str(home))

    def list_all(tell: Tell) -> None:
        WORKS[work](home, _SEED, lambda _: None)
        for kind in points.kinds:
            tell(kind)

    def before() -> None:
        without_mlflow()
        points.install()

    status, kinds = forked(list_all, before=before).finish()
    if status:
        raise RuntimeError(f"{work} failed without a fault: {kinds}")
    return kinds


def kill_at_random(folder: Path, work: str, trials: int, seed: int, *, with_mlflow: bool = False) -> Result:
    """Kills a piece of work at random moments, many times in the same homes.

    If a trial ends before its kill, later kills come within its duration. On a busy machine all may end before: then up
    to ten times as many trials run, until one is killed.
    """
    result, source, home, promised = Result(), random.Random(f"{work} {seed}"), folder, list[str]()
    longest = 0.0
    if with_mlflow:
        importlib.import_module("mlflow.tracking")  # once, instead of in every child
    for number in range(10 * trials):
        if number >= trials and result.hits:
            break
        if number % _FRESH_AFTER == 0:
            home, promised = prepare(folder / str(number)), []
            for warmup in (1, 2):  # the second one finds everything created
                began = time.monotonic()
                _start(home, work, seed - warmup, _nothing, with_mlflow=with_mlflow).finish()
                longest = time.monotonic() - began
        began = time.monotonic()
        trial = _start(home, work, number * 1000 + seed, _nothing, with_mlflow=with_mlflow)
        time.sleep(source.uniform(0, longest))
        trial.kill()
        status, lines = trial.finish()
        if status == 0:
            longest = min(longest, time.monotonic() - began)
        promised += _promises(lines)
        violated = violations(home, promised)
        if with_mlflow and (number % 10 == 9 or number >= trials - 1):
            violated += _check_mlflow(home)
        result.count(f"{work}, kill {number}", status < 0, violated)
    return result


def race(folder: Path, races: int, promoters: int = 3) -> Result:
    """Lets several processes move one alias from the same state at the same moment; exactly one must succeed."""
    result = Result()
    home = prepare(folder, versions=promoters + 1)
    for number in range(races):
        waiting, go = os.pipe()
        before = _answer(forked(lambda tell: tell(str(_production(home))), before=without_mlflow))
        current = None if before == "None" else int(before)
        candidates = [version for version in range(1, promoters + 2) if version != current][:promoters]
        trials = [
            forked(_promoter(home, version, current, waiting, go), before=without_mlflow) for version in candidates
        ]
        os.close(waiting)
        os.close(go)  # starts all promoters, which wait for the end of the pipe
        reports = [trial.finish()[1] for trial in trials]
        winners = sum(lines[-1].startswith("moved") for lines in reports)
        losers = sum("Conflict" in lines[-1] for lines in reports)
        violated = [] if (winners, losers) == (1, promoters - 1) else [f"{winners} winners: {reports}"]
        checked = number % 20 == 19 or number == races - 1
        result.count(f"race {number}", True, violated + (violations(home) if checked else []))
    return result


def change_bytes(folder: Path, trials: int, seed: int) -> Result:
    """Flips a byte of a stored file, truncates it, or deletes it; `fsck` must report it, and reading must fail."""
    result, source = Result(), random.Random(seed)
    home = prepare(folder, versions=4)
    # Without the lock files beside them.
    blobs = sorted(path for path in (home / "store" / "blobs").glob("??/*") if is_digest(path.name))
    for number in range(trials):
        path, how = source.choice(blobs), ("flip", "cut", "delete")[number % 3]
        content = path.read_bytes()
        if how == "delete":
            path.unlink()
        else:
            position = source.randrange(len(content))
            changed = bytes([content[position] ^ (1 << source.randrange(8))])
            path.write_bytes(content[:position] + (changed + content[position + 1 :] if how == "flip" else b""))
        status, lines = forked(lambda tell: _read_all(home, tell), before=without_mlflow).finish()
        violated = [] if status == 0 else [f"reading ended with {lines}"]
        touched = path.name
        served = [line for line in lines if line.startswith("served") and touched in line]
        violated += [f"damaged bytes were returned: {line}" for line in served]
        detected = any(touched in entry.what or touched in entry.where for entry in fsck(Home(home), mlflow=False))
        violated += [] if detected else ["fsck reported nothing"]
        path.write_bytes(content)
        result.count(f"{how} {path.name[:12]}", detected, violated)
    result.violations += violations(home)
    return result


def _start(
    home: Path,
    work: str,
    seed: int,
    before: Callable[[], None],
    *,
    with_mlflow: bool = False,
    points: Points | None = None,
) -> Trial:
    def prepare_child() -> None:
        if not with_mlflow:
            without_mlflow()
        before()

    def do(tell: Tell) -> None:
        WORKS[work](home, seed, tell)
        if points is not None:
            tell(f"points {points.count}")

    return forked(do, before=prepare_child)


def _promises(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(("error ", "points "))]


def _promoter(home: Path, version: int, expected: int | None, waiting: int, go: int) -> Callable[[Tell], None]:
    def promote(tell: Tell) -> None:
        os.close(go)
        versions = Versions(Home.open(home))
        os.read(waiting, 1)
        event = promotion.promote(versions, NAME, version, "production", reason="a race", expected=expected)
        tell(f"moved {NAME} production {event.seq}")

    return promote


def _production(home: Path) -> int | None:
    versions = Versions(Home.open(home)).list(NAME)
    return next((version.version for version in versions if "production" in version.aliases), None)


def _answer(trial: Trial) -> str:
    status, lines = trial.finish()
    if status:
        raise RuntimeError(f"a trial failed without a fault: {lines}")
    return lines[-1]


def _read_all(home: Path, tell: Tell) -> None:
    versions = Versions(Home.open(home))
    for version in versions.list(NAME):
        try:
            read = versions.read_adapter(version)
        except (DamagedBlob, MissingBlob) as error:
            tell(f"refused {version.ref} {error}")
        else:
            # The returned bytes and their tree are verified.
            tell(f"served {version.ref} {version.artifact.sha256} {version.sha256} {len(read)}")


def _check_mlflow(home: Path) -> list[str]:
    """Registers a version and returns disagreements with MLflow."""

    def register_and_check(tell: Tell) -> None:
        register(home, random.randrange(1 << 40), lambda line: None)
        for problem in fsck(Home(home)):
            if problem.severity == "damage":
                tell(f"fsck: {problem}")

    status, lines = forked(register_and_check).finish()
    return lines if status == 0 else [f"MLflow could not be synced: {lines}"]


def _nothing() -> None:
    pass
