"""Training in a child process, or several, that can be stopped, watched and killed. Torch-free: for whoever calls.

A child speaks JSON, a line an event, on its standard output; see `__main__`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lora_engine import errors
from lora_engine.errors import EngineError, InterruptedRun, TrainingError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.progress import Progress, no_progress

GRACE = 60.0
MOST = 1024
LOST = "the other processes of the run cannot be reached any more"
RENDEZVOUS = "LORALINE_RENDEZVOUS"
"""The variable that tells a process of several the file by which they find each other."""
_PARTING = 5.0
_TICK = 0.2
_STDERR_LINES = 20


def train_in_child(
    job: Mapping[str, Any],
    progress: Progress = no_progress,
    *,
    python: str = sys.executable,
    stop: Callable[[], bool] | None = None,
    grace: float = GRACE,
    inherit: Sequence[int] = (),
) -> dict[str, Any]:
    """Runs `lora_engine.training` on a job in a process of its own, or in `running.processes`, and waits for it.

    Args:
        job: `settings` (of `TrainSettings`, as JSON), `base`, `dataset`, `out`, `work` and, where runs
            share one, `cache` (paths as text).
        progress: Told what the child tells.
        python: The interpreter.
        stop: Asked several times a second; True asks the child to write its checkpoint and end.
        grace: Seconds that the child has for that before it is killed.
        inherit: Open descriptors that the child keeps open until it ends, such as those of locks.

    Returns:
        What the training computed with, as `describe_compute` tells it.

    Raises:
        EngineError: What the child met, in the class that it met it in; `InterruptedRun` where it was stopped;
            `TrainingError` where it died.
        KeyboardInterrupt: Of the caller, after the child was stopped.
    """
    work = Path(str(job["work"]))
    path = work / "job.json"
    atomic_write(path, canonical_json(dict(job)))
    with tempfile.TemporaryDirectory(dir=work) as meeting, tempfile.TemporaryFile(dir=work) as stderr:
        children = [
            subprocess.Popen(
                [python, "-m", "lora_engine.training", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A group of its own: Ctrl-C in a terminal reaches the caller alone, who then stops the child in order.
                start_new_session=True,
                pass_fds=tuple(inherit),
                env=environment,
            )
            for environment in _environments(_processes(job), Path(meeting) / "meeting")
        ]
        watch = _Watch(children, progress, grace)
        try:
            watch.listen(stop)
        finally:
            watch.end()
        watch.report(stderr)
        return watch.compute


def _processes(job: Mapping[str, Any]) -> int:
    # What is wrong with the settings, the child says.
    settings = job.get("settings")
    running = settings.get("running") if isinstance(settings, Mapping) else None
    count = running.get("processes", 1) if isinstance(running, Mapping) else 1
    return count if isinstance(count, int) and 1 <= count <= MOST else 1


def _environments(processes: int, meeting: Path) -> list[dict[str, str]]:
    # Threads that wait by spinning starve each other where steps run side by side: measured, a forward pass on a busy
    # machine took over ten times as long.
    plain = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if processes == 1:
        return [plain]
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **plain,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        RENDEZVOUS: str(meeting),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class _Watch:
    """The processes of one run, from their start to their end. The first of them leads, and tells the progress."""

    def __init__(self, children: Sequence[subprocess.Popen[bytes]], progress: Progress, grace: float) -> None:
        self._children, self._progress, self._grace = children, progress, grace
        self._failures: list[EngineError] = []
        self._finished: set[int] = set()
        self._told: set[int] = set()
        self._ended: list[int] = []
        self._deadline: float | None = None
        self.compute: dict[str, Any] = {}

    def listen(self, stop: Callable[[], bool] | None) -> None:
        """Returns when all have ended; has them ended where one of them fails."""
        lines: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
        for rank, child in enumerate(self._children):
            threading.Thread(target=_pump, args=(child.stdout, rank, lines), daemon=True).start()
        asked = False
        while len(self._ended) < len(self._children):
            if not asked and stop is not None and stop():
                asked = True
                self._hurry(self._grace)
                self._signal(signal.SIGTERM)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
            try:
                rank, line = lines.get(timeout=_TICK)
            except queue.Empty:
                continue
            self._hear(rank, line)

    def _hear(self, rank: int, line: bytes | None) -> None:
        if line is None:
            self._ended.append(rank)
            if rank not in self._finished:
                # Whoever is left waits for one who never comes; only in order, by all at once, does a run stop.
                self._hurry(self._grace if _stopped_in_order(self._failures) else _PARTING)
            return
        event = _parse(line)
        if event.get("event") == "progress" and rank == 0:
            self._progress(int(event["done"]), int(event["total"]), event["values"])
        elif event.get("event") == "error":
            self._failures.append(_error(event))
            self._told.add(rank)
        elif event.get("event") == "done":
            self._finished.add(rank)
            if rank == 0:
                self.compute = dict(event.get("compute") or {})

    def _hurry(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def end(self) -> None:
        """Ends those that are left, also where the caller was interrupted in the middle of listening."""
        self._signal(signal.SIGTERM, but=self._ended)
        deadline = time.monotonic() + self._grace
        for child in self._children:
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _signal(self, number: signal.Signals, but: Sequence[int] = ()) -> None:
        for rank, child in enumerate(self._children):
            # One that said its last is leaving by itself; a signal would be taken for the cause.
            if rank not in but and child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)

    def report(self, stderr: IO[bytes]) -> None:
        """Raises what went wrong, if anything did: the cause, and not what followed from it in the others."""
        causes = [failure for failure in self._failures if LOST not in failure.problem]
        if causes:
            raise causes[0]
        # In the order of their ends: the first is the one that the others then missed.
        failed = [rank for rank in self._ended if rank not in self._finished or self._children[rank].returncode]
        silent = [rank for rank in failed if rank not in self._told]
        if silent:
            raise _unexplained(self._children[silent[0]].returncode, stderr)
        if self._failures:
            raise self._failures[0]


def _stopped_in_order(failures: Sequence[EngineError]) -> bool:
    return bool(failures) and all(isinstance(failure, InterruptedRun) for failure in failures)


def _pump(stream: IO[bytes] | None, rank: int, lines: queue.SimpleQueue[tuple[int, bytes | None]]) -> None:
    if stream is not None:
        # The stream is closed under the reader where the caller gives up.
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                lines.put((rank, line))
    lines.put((rank, None))


def _unexplained(code: int, stderr: IO[bytes]) -> TrainingError:
    stderr.seek(0)
    last = [line.decode(errors="replace").rstrip() for line in deque(stderr, maxlen=_STDERR_LINES)]
    said = f"; it said last:\n{chr(10).join(last)}" if last else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "the system was out of memory, or somebody ended it; " if name == "SIGKILL" else ""
        return TrainingError(
            f"the training process was killed by {name}{said}",
            remedy=f"{hint}the next run continues from the last checkpoint",
        )
    return TrainingError(f"the training process ended with code {code} and no result{said}")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _error(event: Mapping[str, Any]) -> EngineError:
    kind = getattr(errors, str(event.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, EngineError)):
        kind = TrainingError
    parts = {name: str(event.get(name, "")) for name in ("where", "allowed", "remedy")}
    return kind(str(event.get("message", "")), **parts)


__all__ = ["GRACE", "InterruptedRun", "train_in_child"]
