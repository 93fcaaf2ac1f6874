"""`python -m lora_engine.training JOB.json`: runs one training job in its own process.

Writes events to standard output, one JSON object per line:

    {"event": "progress", "done": 3, "total": 400, "values": {"loss": 0.21}, "points": [[3, 1790000000.5, {...}]]}
    {"event": "samples", "step": 100, "files": ["/.../00-1.png"]}
    {"event": "warning", "text": "..."}
    {"event": "error", "type": "SettingsError", "message": ..., "where": ..., "allowed": ..., "remedy": ...}
    {"event": "done", "compute": {"device": "cpu", "threads": 2, ...}}

`points` has the measurements of every step since the last such event: step, time, values. Records of `logging` and
`warnings` become warnings; other output of libraries goes to standard error, which the caller reads at the end.

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
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lora_engine.files import FilePath
from lora_engine.lean import collection_paused, optional_hidden

INTERRUPTED = 130
_INTERVAL = 0.2
_OPTIONAL_PATHS = ("cache", "class_dataset", "embedder", "init", "state")
"""Optional folders and files of a job."""
_OWN_HANDLERS = ("diffusers", "transformers")


def main(arguments: list[str]) -> int:
    """Runs a job; returns the exit code."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    _watch_stdin(stopped)
    channel = _Channel()
    _send_warnings(channel)
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m lora_engine.training JOB.json\n")
        return 2
    return _run(Path(arguments[0]), stopped, channel)


def _run(path: Path, stopped: threading.Event, channel: _Channel) -> int:
    from pydantic import ValidationError

    from lora_engine.bases.source import resolve_base
    from lora_engine.errors import EngineError, InterruptedRun, SettingsError, TrainingError
    from lora_engine.training.spec import TrainSettings

    progress = _ProgressWriter(channel)
    try:
        try:
            job = json.loads(path.read_bytes())
            settings = TrainSettings.model_validate(job["settings"])
            dataset, out, work = (Path(job[name]) for name in ("dataset", "out", "work"))
            base, vae = str(job["base"]), job.get("vae")
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
        _adopt_loggers()
        on_samples = partial(_send_samples, channel)
        try:
            train(
                settings,
                base,
                dataset,
                out,
                work,
                **paths,
                vae=vae,
                origin=origin,
                fresh=fresh,
                progress=progress,
                on_samples=on_samples,
                stop=stopped.is_set,
            )
        finally:
            progress.flush()
    except OSError as error:
        _send_error(channel, TrainingError(f"a file cannot be read or written ({error})"))
        return 1
    except EngineError as error:
        _send_error(channel, error)
        return INTERRUPTED if isinstance(error, InterruptedRun) else 1
    # Imported last, since they import torch.
    from lora_engine.compute import describe_compute
    from lora_engine.training.device import choose_device

    channel.send({"event": "done", "compute": describe_compute(choose_device(settings.running))})
    return 0


class _Channel:
    """Takes over standard output, and writes events to it from any thread. Prints of libraries go to standard error."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.RLock()
        os.dup2(2, 1)

    def send(self, event: Mapping[str, object]) -> None:
        """Writes an event; does nothing if the caller died, because the end of standard input stops the run."""
        with self._lock, suppress(BrokenPipeError):
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()


class _ProgressWriter:
    """Writes progress events: at most five per second, and always the last one."""

    def __init__(self, channel: _Channel) -> None:
        self._channel, self._next = channel, 0.0
        self._event: dict[str, Any] = {}
        self._points: list[tuple[int, float, Mapping[str, float]]] = []
        self._validation: dict[str, float] = {}

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if done or "validation_loss" in values:  # not while images are drawn and encoded
            self._points.append((done, time.time(), dict(values)))
        if "validation_loss" in values:
            self._validation = {"validation_loss": values["validation_loss"]}
        self._event = {"event": "progress", "done": done, "total": total, "values": {**values, **self._validation}}
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            self.flush()

    def flush(self) -> None:
        """Writes the last update if it is not written yet."""
        if self._event:
            self._channel.send({**self._event, "points": self._points})
            self._event, self._points = {}, []


def _send_samples(channel: _Channel, step: int, files: Sequence[FilePath]) -> None:
    channel.send({"event": "samples", "step": step, "files": [os.fspath(file) for file in files]})


def _send_error(channel: _Channel, error: Exception) -> None:
    fields = {name: getattr(error, name, "") for name in ("where", "allowed", "remedy")}
    message = getattr(error, "problem", str(error))
    channel.send({"event": "error", "type": type(error).__name__, "message": message, **fields})


class _WarningSender(logging.Handler):
    def __init__(self, channel: _Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send({"event": "warning", "text": record.getMessage().strip()})


def _send_warnings(channel: _Channel) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[_WarningSender(channel)])
    # The line of code in a library says nothing to the user.
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}"
    logging.captureWarnings(True)


def _adopt_loggers() -> None:
    """Makes libraries that write their records to standard error pass them on instead."""
    for name in _OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


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
