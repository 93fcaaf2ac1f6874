"""Results of a server: full disks, deletion by age and size, the safety hook, images to start from."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lora_engine.data.containers import read_png_texts
from lora_engine.errors import DataError
from lora_engine.files import atomic_write
from lora_engine.inference.variation import NoiseVariation
from registry.entities import Decision
from registry.errors import DiskFull
from registry.home import Home
from tasks.errors import SpecError
from tasks.serving.job import (
    Job,
    JobState,
    UnknownJob,
)
from tasks.serving.service import ImageService, ServiceSettings
from tests.tasks.serving.held import PLAIN, HeldEngine, file_of, hold, service_on


def test_each_image_of_a_variation_is_kept_with_its_own_noise(served: Home, engine: HeldEngine) -> None:
    request = replace(PLAIN, seed=7, count=2, variation=NoiseVariation(20, 0.5), seed_size=(32, 32))
    with service_on(served, engine) as service:
        images = service.images(service.wait(service.submit(request).id, 60).id)
    facts = [json.loads(dict(read_png_texts(io.BytesIO(image)))["loraline"]) for image in images]
    assert [(fact["seed"], fact["variation"], fact["seed_size"]) for fact in facts] == [
        (7, [20, 0.5], [32, 32]),
        (7, [21, 0.5], [32, 32]),
    ]
    assert len({Image.open(io.BytesIO(image)).tobytes() for image in images}) == 2


def test_a_full_disk_fails_the_job_leaves_no_half_of_it_and_the_queue_continues(
    served: Home, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service_on(served, engine) as service:
        job = hold(service, engine, replace(PLAIN, count=3))
        written = 0

        def write(path: Path, content: bytes) -> None:
            nonlocal written
            written += 1
            if written == 2:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            atomic_write(path, content)

        monkeypatch.setattr("tasks.serving.results.atomic_write", write)
        engine.may_draw.set()
        ended = service.wait(job.id, 60)
        assert written == 2
        assert ended.failure is not None
        assert ended.failure.kind == "DiskFull"
        assert not file_of(served, job).parent.exists()
        assert service.wait(service.submit(PLAIN).id, 60).state is JobState.COMPLETED


def test_a_job_that_cannot_be_stored_is_not_accepted(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine) as service:
        records = service._records
        (pages,) = records._connection.execute("PRAGMA page_count").fetchone()
        records._connection.execute(f"PRAGMA max_page_count={pages}")
        accepted = 0

        def fill() -> None:
            nonlocal accepted
            while True:
                service.wait(service.submit(replace(PLAIN, prompt="a " * 4000)).id, 60)
                accepted += 1

        with pytest.raises(DiskFull):
            fill()
        records._connection.execute("PRAGMA max_page_count=1000000")
        assert len(service.jobs()) == accepted
        assert service.wait(service.submit(PLAIN).id, 60).state is JobState.COMPLETED


def test_old_results_are_deleted_by_age_and_by_size(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine) as service:
        jobs = [service.submit(replace(PLAIN, seed=seed)) for seed in range(3)]
        sizes = [service.wait(job.id, 60).size for job in jobs]
        service._results.prune(service._records, hours=1, limit=sizes[-1] + sizes[-2])
        with pytest.raises(UnknownJob, match="deleted"):
            service.images(jobs[0].id)
        assert service.job(jobs[0].id).state is JobState.COMPLETED
        assert all(service.images(job.id) for job in jobs[1:])
        service._results.prune(service._records, hours=0, limit=10**9)
        with pytest.raises(UnknownJob):
            service.job(jobs[1].id)
        assert list((served.path / "serving" / "jobs").iterdir()) == []


def refuse(images: Sequence[Image.Image], job: Job) -> Decision:
    assert images[0].size == (32, 32)
    return Decision("fine" in job.request.prompt, ("it shows a ring",))


def fail(images: Sequence[Image.Image], job: Job) -> Decision:
    raise RuntimeError("no model")


def say_nothing(images: Sequence[Image.Image], job: Job) -> None:
    return None


@pytest.mark.parametrize(("hook", "reason"), [("refuse", "a ring"), ("fail", "failed"), ("say_nothing", "NoneType")])
def test_images_that_the_safety_hook_refuses_do_not_leave(
    served: Home, engine: HeldEngine, hook: str, reason: str
) -> None:
    with service_on(served, engine, safety=f"{__name__}:{hook}") as service:
        ended = service.wait(service.submit(PLAIN).id, 60)
        assert ended.failure is not None
        assert ended.failure.kind == "ImagesRefused"
        assert reason in str(ended.error)
        assert not file_of(served, ended).exists()
        fine = service.wait(service.submit(replace(PLAIN, prompt="a fine ring")).id, 60)
        assert (fine.state is JobState.COMPLETED) == (hook == "refuse")


@pytest.mark.parametrize("name", ["nothing", "json:nothing", "no_such_package:hook", "json:__name__"])
def test_a_safety_hook_that_cannot_be_loaded_keeps_the_server_from_starting(
    served: Home, engine: HeldEngine, name: str
) -> None:
    with pytest.raises(SpecError):
        ImageService(served, ServiceSettings(safety=name), engine)


def test_images_to_start_from_are_copied_without_metadata(served: Home, engine: HeldEngine, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.new("RGB", (32, 32), (250, 250, 250)).save(source)
    with service_on(served, engine, batch_images=1) as service:
        hold(service, engine)
        job = service.submit(replace(PLAIN, image=source, mask=source))
        source.unlink()
        engine.may_draw.set()
        assert service.wait(job.id, 60).state is JobState.COMPLETED
        source.write_text("no image")
        with pytest.raises(DataError, match="not a readable image"):
            service.submit(replace(PLAIN, image=source))
    assert len(list((served.path / "serving" / "inputs").iterdir())) == 1
    with service_on(served, engine):
        assert list((served.path / "serving" / "inputs").iterdir()) == [], "no job needs it any more"
