"""An engine that waits until a test lets it draw, and services with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lora_engine.errors import EngineError
from lora_engine.serving.engine import DrawnImages, ImageJob, PlainEngine
from registry.home import Home
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import (
    Job,
)
from tasks.serving.service import ImageService, ServiceSettings

REQUEST = DrawRequest("a zorb <lora:zorb@production:0.7>", steps=2)
PLAIN = DrawRequest("a ring", steps=1)


class HeldEngine(PlainEngine):
    """The plain engine, which waits before it draws until the test lets it, and shares batches of equal steps."""

    def __init__(self) -> None:
        super().__init__("tiny")
        self.may_draw, self.has_begun = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.forgotten: list[Path] = []

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        return first.settings.steps == other.settings.steps

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        self.has_begun.set()
        assert self.may_draw.wait(60)
        self.batches.append(len(jobs))
        return super().draw(jobs)

    def forget(self, file: Path) -> None:
        self.forgotten.append(file)
        super().forget(file)


@contextmanager
def service_on(home: Home, engine: HeldEngine, **settings: object) -> Iterator[ImageService]:
    service = ImageService(home, ServiceSettings(**settings), engine)
    try:
        yield service
    finally:
        engine.may_draw.set()
        service.close()


def hold(service: ImageService, engine: HeldEngine, request: DrawRequest = PLAIN) -> Job:
    """Returns a job that is being drawn, and waits for the test."""
    engine.may_draw.clear()
    engine.has_begun.clear()
    job = service.submit(request)
    assert engine.has_begun.wait(60)
    return job


def file_of(home: Home, job: Job) -> Path:
    """Returns the path of the first image of a job."""
    return home.path / "serving" / "jobs" / job.id / "0.png"
