"""Runs a step that has a `timeout`, in a process that can be stopped at any instruction."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from lora_engine.errors import EngineError, InterruptedRun, TrainingError
from lora_engine.progress import no_progress
from registry.errors import RegistryError
from tasks.devices import work_on_device
from tasks.errors import PipelineFailed, StepTimeout
from tasks.job import Job
from tasks.progress import stop_requested
from tasks.step import Context

_TICK = 0.2
_GRACE = 5.0


def work_within(job: Job, context: Context, seconds: float) -> None:
    """Runs a step's work, and stops it after some seconds. A step that stops itself writes its checkpoint first.

    Args:
        job: The step.
        context: Its context.
        seconds: Limit of this attempt, with the start of the process.

    Raises:
        StepTimeout: It took longer.
        EngineError, RegistryError, OSError: The step's error.
    """
    deadline = time.monotonic() + seconds
    if not job.kind.stops:
        _work_in_child(job, context, deadline)
        return

    def stop() -> bool:
        return stop_requested() or time.monotonic() > deadline

    try:
        job.kind.work(job.spec, replace(context, stop=stop))
    except TrainingError as error:
        if stop_requested() or time.monotonic() <= deadline:
            raise
        raise _timeout(job) from error


def _work_in_child(job: Job, context: Context, deadline: float) -> None:
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (job, replace(context, progress=no_progress), sender)
    process = spawn.Process(target=_work, args=arguments, name=f"step {job.name}", daemon=True)
    process.start()
    sender.close()
    try:
        for kind, content in _messages(job, receiver, deadline):
            if kind == "progress":
                context.progress(*content)
            elif kind == "warning":
                logger, text, in_artifact = content
                logging.getLogger(logger).warning(text, extra={"in_artifact": in_artifact})
            elif kind == "error":
                raise content
            else:
                context.compute.update(content)
                return
        process.join(_GRACE)
        raise PipelineFailed(f"its process ended with code {process.exitcode}", where=f"step {job.name!r}")
    finally:
        receiver.close()
        process.terminate()
        process.join(_GRACE)
        process.kill()
        process.join()


def _messages(job: Job, receiver: Connection, deadline: float) -> Iterator[tuple[str, Any]]:
    """Yields the messages of a step's process until it ends."""
    while True:
        if time.monotonic() > deadline:
            raise _timeout(job)
        if stop_requested():
            remedy = "run the same command to continue"
            raise InterruptedRun("stopped on request", where=f"step {job.name!r}", remedy=remedy)
        try:
            if receiver.poll(min(_TICK, max(0.0, deadline - time.monotonic()))):
                yield receiver.recv()
        except EOFError:
            return


def _work(job: Job, context: Context, sender: Connection) -> None:
    def report(done: int, total: int, values: Any) -> None:
        sender.send(("progress", (done, total, dict(values))))

    logging.getLogger().addHandler(_WarningSender(sender))

    try:
        work_on_device(job, replace(context, progress=report))
    except (EngineError, RegistryError, OSError) as error:
        sender.send(("error", error))
    else:
        sender.send(("compute", context.compute))


class _WarningSender(logging.Handler):
    """Sends warnings to the run, which logs them as its own."""

    def __init__(self, sender: Connection) -> None:
        super().__init__(logging.WARNING)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send(("warning", (record.name, record.getMessage(), getattr(record, "in_artifact", False))))


def _timeout(job: Job) -> StepTimeout:
    return StepTimeout(
        f"took longer than its timeout of {job.spec.timeout:g} s",
        where=f"step {job.name!r}",
        remedy="raise `timeout`, or give the step less work",
    )
