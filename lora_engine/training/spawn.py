"""Training in a child process that can be stopped, watched and killed. Torch-free: for whoever calls.

The child speaks JSON, a line an event, on its standard output; see `__main__`.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from lora_engine import errors
from lora_engine.errors import EngineError, InterruptedRun, TrainingError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.progress import Progress, no_progress

GRACE = 60.0
_TICK = 0.2
_STDERR_LINES = 20


def train_in_child(
    job: Mapping[str, Any],
    progress: Progress = no_progress,
    *,
    python: str = sys.executable,
    stop: Callable[[], bool] | None = None,
    grace: float = GRACE,
) -> None:
    """Runs `lora_engine.training` on a job in a process of its own and waits for it.

    Args:
        job: `settings` (of `TrainSettings`, as JSON), `base`, `dataset`, `out` and `work` (paths as text).
        progress: Told what the child tells.
        python: The interpreter.
        stop: Asked several times a second; True asks the child to write its checkpoint and end.
        grace: Seconds that the child has for that before it is killed.

    Raises:
        EngineError: What the child met, in the class that it met it in; `InterruptedRun` where it was stopped;
            `TrainingError` where it died.
        KeyboardInterrupt: Of the caller, after the child was stopped.
    """
    work = Path(str(job["work"]))
    path = work / "job.json"
    atomic_write(path, canonical_json(dict(job)))
    with tempfile.TemporaryFile(dir=work) as stderr:
        child = subprocess.Popen(
            [python, "-m", "lora_engine.training", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # A group of its own: Ctrl-C in a terminal reaches the caller alone, who then stops the child in order.
            start_new_session=True,
            # Threads that wait by spinning starve each other where steps run side by side: measured, a forward pass on
            # a busy machine took over ten times as long.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )
        try:
            failure, finished = _listen(child, progress, stop, grace)
        finally:
            _end(child, grace)
        _report(child, failure, finished, stderr)


def _listen(
    child: subprocess.Popen[bytes], progress: Progress, stop: Callable[[], bool] | None, grace: float
) -> tuple[EngineError | None, bool]:
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    failure: EngineError | None = None
    finished = False
    deadline: float | None = None
    while True:
        if deadline is None and stop is not None and stop():
            deadline = time.monotonic() + grace
            _signal(child, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _signal(child, signal.SIGKILL)
        try:
            line = lines.get(timeout=_TICK)
        except queue.Empty:
            continue
        if line is None:
            return failure, finished
        event = _parse(line)
        if event.get("event") == "progress":
            progress(int(event["done"]), int(event["total"]), event["values"])
        elif event.get("event") == "error":
            failure = _error(event)
        finished = finished or event.get("event") == "done"


def _pump(stream: IO[bytes] | None, lines: queue.SimpleQueue[bytes | None]) -> None:
    if stream is not None:
        # The stream is closed under the reader where the caller gives up.
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    # Also where the caller was interrupted in the middle of listening.
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        try:
            child.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def _report(child: subprocess.Popen[bytes], failure: EngineError | None, finished: bool, stderr: IO[bytes]) -> None:
    if failure is not None:
        raise failure
    if finished and child.returncode == 0:
        return
    stderr.seek(0)
    last = [line.decode(errors="replace").rstrip() for line in deque(stderr, maxlen=_STDERR_LINES)]
    said = f"; it said last:\n{chr(10).join(last)}" if last else ""
    code = child.returncode
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "the system was out of memory, or somebody ended it; " if name == "SIGKILL" else ""
        raise TrainingError(
            f"the training process was killed by {name}{said}",
            remedy=f"{hint}the next run continues from the last checkpoint",
        )
    raise TrainingError(f"the training process ended with code {code} and no result{said}")


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
