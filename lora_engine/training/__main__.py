"""`python -m lora_engine.training JOB.json`: runs one training job in its own process.

Writes events to standard output, one JSON object per line:

    {"event": "progress", "done": 3, "total": 400, "values": {"loss": 0.21}}
    {"event": "error", "type": "SettingsError", "message": ..., "where": ..., "allowed": ..., "remedy": ...}
    {"event": "done", "compute": {"device": "cpu", "threads": 2, ...}}

SIGTERM, SIGINT and, if standard input is a pipe, its end (the caller died) make it write a checkpoint and exit with
code 130 and an `InterruptedRun`. Other errors exit with code 1.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from lora_engine.lean import collection_paused, optional_hidden

INTERRUPTED = 130
_INTERVAL = 0.2
_OPTIONAL_PATHS = ("cache", "class_dataset", "embedder", "init", "state")
"""Optional folders and files of a job."""


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit code."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    _watch_stdin(stopped)
    channel = _take_stdout()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m lora_engine.training JOB.json\n")
        return 2
    return _run(Path(arguments[0]), stopped, channel)


def _run(path: Path, stopped: threading.Event, channel: TextIO) -> int:
    from pydantic import ValidationError

    from lora_engine.bases.source import resolve_base
    from lora_engine.errors import EngineError, InterruptedRun, SettingsError, TrainingError
    from lora_engine.training.spec import TrainSettings

    try:
        try:
            job = json.loads(path.read_bytes())
            settings = TrainSettings.model_validate(job["settings"])
            dataset, out, work = (Path(job[name]) for name in ("dataset", "out", "work"))
            base = str(job["base"])
            paths = {name: Path(job[name]) if job.get(name) else None for name in _OPTIONAL_PATHS}
            origin, fresh = str(job.get("origin", "")), bool(job.get("fresh"))
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise SettingsError(f"invalid job ({error!r})", where=str(path)) from error
        # A missing base is reported before the imports, which take seconds.
        source = resolve_base(base)
        # Heavy imports come after the signal handlers, so that a signal during an import is handled.
        with optional_hidden(), collection_paused():
            importlib.import_module(source.module)
            from lora_engine.training.run import train

        progress = _ProgressWriter(channel)
        train(
            settings,
            base,
            dataset,
            out,
            work,
            cache=paths["cache"],
            class_dataset=paths["class_dataset"],
            embedder=paths["embedder"],
            init=paths["init"],
            state=paths["state"],
            origin=origin,
            fresh=fresh,
            progress=progress,
            stop=stopped.is_set,
        )
    except OSError as error:
        _send_error(channel, TrainingError(f"a file cannot be read or written ({error})"))
        return 1
    except EngineError as error:
        _send_error(channel, error)
        return INTERRUPTED if isinstance(error, InterruptedRun) else 1
    # Imported last, since they import torch.
    from lora_engine.compute import describe_compute
    from lora_engine.training.device import choose_device

    _send(channel, {"event": "done", "compute": describe_compute(choose_device(settings.running))})
    return 0


class _ProgressWriter:
    """Writes progress events: at most five per second, and always the first and the last."""

    def __init__(self, channel: TextIO) -> None:
        self._channel, self._next = channel, 0.0

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + _INTERVAL
            _send(self._channel, {"event": "progress", "done": done, "total": total, "values": dict(values)})


def _send_error(channel: TextIO, error: Exception) -> None:
    fields = {name: getattr(error, name, "") for name in ("where", "allowed", "remedy")}
    message = getattr(error, "problem", str(error))
    _send(channel, {"event": "error", "type": type(error).__name__, "message": message, **fields})


def _send(channel: TextIO, event: Mapping[str, object]) -> None:
    try:
        channel.write(json.dumps(event) + "\n")
        channel.flush()
    except BrokenPipeError:
        # The caller died. The end of standard input stops the run.
        logging.getLogger(__name__).warning("the caller closed the pipe: %s", event)


def _take_stdout() -> TextIO:
    # Redirects prints of libraries to standard error, so that standard output has events only.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _watch_stdin(stopped: threading.Event) -> None:
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stopped.set()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
