"""`python -m lora_engine.training JOB.json`: one training run as a process of its own.

Standard output carries events, one JSON object a line:

    {"event": "progress", "done": 3, "total": 400, "values": {"loss": 0.21}}
    {"event": "error", "type": "SettingsError", "message": ..., "where": ..., "allowed": ..., "remedy": ...}
    {"event": "done", "compute": {"device": "cpu", "threads": 2, ...}}

SIGTERM, SIGINT and, where standard input is a pipe, its end (the caller died) make it write a checkpoint and end with
code 130 and an `InterruptedRun`. Other errors end with code 1.
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

from lora_engine.lean import optional_hidden

INTERRUPTED = 130
_INTERVAL = 0.2
_MORE = ("cache", "class_dataset", "embedder")
"""Folders that a job may name."""


def main(arguments: list[str]) -> int:
    """Runs a job; gives the exit code."""
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

    from lora_engine.bases.families import families
    from lora_engine.bases.source import resolve_base
    from lora_engine.errors import EngineError, InterruptedRun, SettingsError, TrainingError
    from lora_engine.training.spec import TrainSettings

    try:
        try:
            job = json.loads(path.read_bytes())
            settings = TrainSettings.model_validate(job["settings"])
            dataset, out, work = (Path(job[name]) for name in ("dataset", "out", "work"))
            base = str(job["base"])
            more = {name: Path(job[name]) if job.get(name) else None for name in _MORE}
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise SettingsError(f"the job cannot be used ({error!r})", where=str(path)) from error
        # A missing base is reported before the imports, which take seconds.
        family = resolve_base(base).family
        # Heavy, and only now: a signal that comes while this is imported is already heard.
        with optional_hidden():
            importlib.import_module(families[family].module)
            from lora_engine.training.run import train

        train(settings, base, dataset, out, work, **more, progress=_Teller(channel), stop=stopped.is_set)
    except OSError as error:
        _tell_error(channel, TrainingError(f"a file cannot be written or read ({error})"))
        return 1
    except EngineError as error:
        _tell_error(channel, error)
        return INTERRUPTED if isinstance(error, InterruptedRun) else 1
    # Only now: what describes torch would import it.
    from lora_engine.compute import describe_compute
    from lora_engine.training.device import choose_device

    _tell(channel, {"event": "done", "compute": describe_compute(choose_device(settings.running))})
    return 0


class _Teller:
    """Progress as events: at most five a second, and always the first and the last."""

    def __init__(self, channel: TextIO) -> None:
        self._channel, self._next = channel, 0.0

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + _INTERVAL
            _tell(self._channel, {"event": "progress", "done": done, "total": total, "values": dict(values)})


def _tell_error(channel: TextIO, error: Exception) -> None:
    fields = {name: getattr(error, name, "") for name in ("where", "allowed", "remedy")}
    message = getattr(error, "problem", str(error))
    _tell(channel, {"event": "error", "type": type(error).__name__, "message": message, **fields})


def _tell(channel: TextIO, event: Mapping[str, object]) -> None:
    try:
        channel.write(json.dumps(event) + "\n")
        channel.flush()
    except BrokenPipeError:
        # Nobody listens any more; the end of standard input says so too, and stops the run in order.
        logging.getLogger(__name__).warning("the caller is gone: %s", event)


def _take_stdout() -> TextIO:
    # Whatever a library prints goes to standard error, so that the events stay readable.
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
