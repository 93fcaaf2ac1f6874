"""Trains in one or more child processes that can be monitored, stopped and killed. Must not import torch.

A child writes JSON events to its standard output, one per line; see `__main__`.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lora_engine import errors
from lora_engine.errors import EngineError, InterruptedRun, TrainingError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.progress import Point, Progress, Unwatched, Watcher, no_progress

GRACE = 60.0
MAX_PROCESSES = 1024
LOST = "the other processes of the run are unreachable"
RENDEZVOUS = "LORALINE_RENDEZVOUS"
"""Environment variable with the rendezvous file of the processes of a run."""
_SHORT_GRACE = 5.0
_TICK = 0.2
_STDERR_LINES = 20


def train_in_child(
    job: Mapping[str, Any],
    progress: Progress = no_progress,
    *,
    watcher: Watcher | None = None,
    python: str = sys.executable,
    stop: Callable[[], bool] | None = None,
    grace: float = GRACE,
    inherit: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs `lora_engine.training` on a job in a child process, or in `running.processes` of them, and waits.

    Args:
        job: `settings` (of `TrainSettings`, as JSON), `base`, `dataset`, `out`, `work` and further arguments of `train`
            (paths as text).
        progress: Called with the child's progress.
        watcher: Receives what the child measures, draws and warns of; None ignores it.
        python: Python interpreter.
        stop: Polled several times a second; True makes the child write a checkpoint and exit.
        grace: Seconds that the child has to do so before it is killed.
        inherit: Open descriptors that the child keeps open until it ends, such as those of locks.
        variables: Environment variables of the child, beside those of this process.

    Returns:
        The compute environment of the training; see `describe_compute`.

    Raises:
        EngineError: The child's error, in its class: `InterruptedRun` if it was stopped, `TrainingError` if it crashed.
        KeyboardInterrupt: The caller was interrupted; the child is stopped first.
    """
    work = Path(str(job["work"]))
    path = work / "job.json"
    atomic_write(path, canonical_json(dict(job)))
    with tempfile.TemporaryDirectory(dir=work) as rendezvous, tempfile.TemporaryFile(dir=work) as stderr:
        children = [
            subprocess.Popen(
                [python, "-m", "lora_engine.training", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # A separate session: Ctrl-C in a terminal reaches the caller only, which then stops the child cleanly.
                start_new_session=True,
                pass_fds=tuple(inherit),
                env=environment | dict(variables or {}),
            )
            for environment in _environments(_processes(job), Path(rendezvous) / "rendezvous")
        ]
        monitor = _ProcessMonitor(children, progress, watcher or Unwatched(), grace)
        try:
            monitor.wait(stop)
        finally:
            monitor.terminate()
        if not monitor.silent:  # else the lines are part of the error
            monitor.warn(_plain_lines(stderr))
        monitor.report(stderr)
        return monitor.compute


def _processes(job: Mapping[str, Any]) -> int:
    # The child reports invalid settings.
    settings = job.get("settings")
    running = settings.get("running") if isinstance(settings, Mapping) else None
    count = running.get("processes", 1) if isinstance(running, Mapping) else 1
    return count if isinstance(count, int) and 1 <= count <= MAX_PROCESSES else 1


def _environments(processes: int, rendezvous: Path) -> list[dict[str, str]]:
    # Spinning threads starve each other when steps run concurrently. Measured: a forward pass on a busy machine took
    # over ten times as long.
    plain = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if processes == 1:
        return [plain]
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        **plain,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        RENDEZVOUS: str(rendezvous),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


class _ProcessMonitor:
    """Monitors the processes of one run until all have exited. Rank 0 reports the progress."""

    def __init__(
        self, children: Sequence[subprocess.Popen[bytes]], progress: Progress, watcher: Watcher, grace: float
    ) -> None:
        self._children, self._progress, self._watcher, self._grace = children, progress, watcher, grace
        self._warnings: set[str] = set()
        self._failures: list[EngineError] = []
        self._finished: set[int] = set()
        self._reported: set[int] = set()
        self._ended: list[int] = []
        self._deadline: float | None = None
        self.compute: dict[str, Any] = {}

    def wait(self, stop: Callable[[], bool] | None) -> None:
        """Waits until all processes have exited; stops the others if one fails."""
        lines: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
        for rank, child in enumerate(self._children):
            threading.Thread(target=_read_lines, args=(child.stdout, rank, lines), daemon=True).start()
        is_stopping = False
        while len(self._ended) < len(self._children):
            if not is_stopping and stop is not None and stop():
                is_stopping = True
                self._set_deadline(self._grace)
                self._signal(signal.SIGTERM)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
            try:
                rank, line = lines.get(timeout=_TICK)
            except queue.Empty:
                continue
            self._handle(rank, line)

    def _handle(self, rank: int, line: bytes | None) -> None:
        if line is None:
            self._ended.append(rank)
            if rank not in self._finished:
                # The others would block in the next collective; give them little time unless all were interrupted.
                self._set_deadline(self._grace if _all_interrupted(self._failures) else _SHORT_GRACE)
            return
        event = _parse(line)
        if event.get("event") == "progress" and rank == 0:
            if event.get("points"):
                self._watcher.on_points([Point(*point) for point in event["points"]])
            self._progress(int(event["done"]), int(event["total"]), event["values"])
        elif event.get("event") == "samples":
            self._watcher.on_samples(int(event["step"]), [Path(file) for file in event["files"]])
        elif event.get("event") == "warning":
            self.warn([str(event["text"])])
        elif event.get("event") == "error":
            self._failures.append(_error(event))
            self._reported.add(rank)
        elif event.get("event") == "done":
            self._finished.add(rank)
            if rank == 0:
                self.compute = dict(event.get("compute") or {})

    def warn(self, texts: Iterable[str]) -> None:
        """Passes on each warning once, also if several processes have it."""
        for text in texts:
            if text not in self._warnings:
                self._warnings.add(text)
                self._watcher.on_warning(text)

    def _set_deadline(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def terminate(self) -> None:
        """Terminates the remaining processes, also if the caller was interrupted while waiting."""
        self._signal(signal.SIGTERM, exclude=self._ended)
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

    def _signal(self, number: signal.Signals, exclude: Sequence[int] = ()) -> None:
        for rank, child in enumerate(self._children):
            # A process that closed its output is exiting; a signal would hide its exit code.
            if rank not in exclude and child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)

    @property
    def silent(self) -> list[int]:
        """The failed processes that reported no error, in order of exit: the others lost contact with the first."""
        failed = [rank for rank in self._ended if rank not in self._finished or self._children[rank].returncode]
        return [rank for rank in failed if rank not in self._reported]

    def report(self, stderr: IO[bytes]) -> None:
        """Raises the error that caused the failure, if there is one, not its consequences in other processes."""
        causes = [failure for failure in self._failures if LOST not in failure.problem]
        if causes:
            raise causes[0]
        if self.silent:
            raise _unreported_failure(self._children[self.silent[0]].returncode, stderr)
        if self._failures:
            raise self._failures[0]


def _all_interrupted(failures: Sequence[EngineError]) -> bool:
    return bool(failures) and all(isinstance(failure, InterruptedRun) for failure in failures)


def _read_lines(stream: IO[bytes] | None, rank: int, lines: queue.SimpleQueue[tuple[int, bytes | None]]) -> None:
    if stream is not None:
        # The stream is closed while it is read if the caller gives up.
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                lines.put((rank, line))
    lines.put((rank, None))


def _plain_lines(stderr: IO[bytes]) -> Iterator[str]:
    """Yields the lines that libraries printed, without progress bars, which return to the start of their line."""
    stderr.seek(0)
    for line in stderr:
        text = line.decode(errors="replace").rstrip("\n")
        if text.strip() and "\r" not in text:
            yield text.strip()


def _unreported_failure(code: int, stderr: IO[bytes]) -> TrainingError:
    stderr.seek(0)
    last = [line.decode(errors="replace").rstrip() for line in deque(stderr, maxlen=_STDERR_LINES)]
    output = f"; last lines of stderr:\n{chr(10).join(last)}" if last else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "free memory if the system ran out of it; " if name == "SIGKILL" else ""
        return TrainingError(
            f"the training process was killed by {name}{output}",
            remedy=f"{hint}run again to resume from the last checkpoint",
        )
    return TrainingError(f"the training process exited with code {code} and no result{output}")


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
