"""The queue of a server with the embedded base: durability, adapters that are withdrawn, limits, the safety hook."""

from __future__ import annotations

import errno
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_engine.data.containers import read_png_texts
from lora_engine.errors import DataError, EngineError, SettingsError
from lora_engine.files import atomic_write
from lora_engine.inference.variation import NoiseVariation
from lora_engine.serving.engine import DrawnImages, ImageJob, PlainEngine
from registry.entities import Decision, now
from registry.errors import DiskFull, GoneVersion, HomeError, Refused, UnknownName
from registry.home import Home
from registry.versions.deletion import withdraw
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.operations.draw_request import DrawRequest
from tasks.serving.adapters import ServedAdapters
from tasks.serving.job import (
    Job,
    JobState,
    KeyReused,
    QueueFull,
    ServiceClosed,
    TenantQueueFull,
    UnknownJob,
)
from tasks.serving.records import JobRecords
from tasks.serving.service import ImageService, ServiceSettings, open_service
from tests.flows.web.server import copy_home

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


@pytest.fixture(scope="module")
def engine() -> HeldEngine:
    return HeldEngine()


@pytest.fixture(autouse=True)
def reset(engine: HeldEngine) -> Iterator[None]:
    engine.may_draw.set()
    engine.has_begun.clear()
    engine.batches.clear()
    engine.forgotten.clear()
    yield
    engine.may_draw.set()


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Home:
    return copy_home(tmp_path_factory, tmp_path / "home")


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


def test_accepted_jobs_are_drawn_by_the_next_service_if_this_one_stops(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine, batch_images=1) as first:
        running = hold(first, engine)
        waiting = first.submit(REQUEST, tenant="ann", key="k1")
        threading.Timer(0.2, engine.may_draw.set).start()
        first.close()
    with service_on(served, engine) as second:
        ended = [second.wait(job.id, 60) for job in (running, waiting)]
        assert [job.state for job in ended] == [JobState.COMPLETED] * 2
        assert ended[1].adapters == ("zorb@1",)
        assert ended[1].tenant == "ann"
        assert ended[1].request == replace(REQUEST, base="tiny")
        assert [len(second.images(job.id)) for job in ended] == [1, 1]
        assert second.submit(REQUEST, tenant="ann", key="k1").id == waiting.id, "a key draws once"
        with pytest.raises(KeyReused):
            second.submit(PLAIN, tenant="ann", key="k1")
        assert second.submit(PLAIN, tenant="ben", key="k1").id != waiting.id, "keys are those of a tenant"


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (32, 40), "seed_size": (32, 32), "variation": NoiseVariation(9, 0.5), "adapter_guidance": 2.0},
        {"image": Path("inputs/a.png"), "mask": Path("inputs/b.png"), "regions": ("0,0,0.5,1=a <lora:ring:1>", "b=c")},
        {"credentials": (Path("a.pem"), Path("b.pem")), "guidance": 0.1, "sampler": "euler", "seed": 2**63 - 1001},
    ],
)
def test_a_stored_job_has_the_request_that_was_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    request = replace(REQUEST, **changes)
    with closing(JobRecords(tmp_path / "jobs.db")) as records:
        records.add(Job("0" * 32, "ann", request, JobState.QUEUED, ("zorb@1",), now()), "digest", None)
        (job,) = records.unfinished()
    assert job.request == request
    assert [type(value) for value in vars(job.request).values()] == [type(value) for value in vars(request).values()]


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


def test_a_moved_alias_counts_at_the_next_request_and_an_accepted_job_keeps_its_version(
    served: Home, engine: HeldEngine
) -> None:
    with service_on(served, engine) as service, closing(Versions(served)) as versions:
        hold(service, engine)
        before = service.submit(REQUEST)
        promote(versions, "zorb", 2, "production", reason="a test")
        after = service.submit(REQUEST)
        engine.may_draw.set()
        images = {}
        for job, ref in ((before, "zorb@1"), (after, "zorb@2")):
            assert service.wait(job.id, 60).adapters == (ref,)
            (images[ref],) = service.images(job.id)
        assert images["zorb@1"] != images["zorb@2"]
        named = service.submit(replace(REQUEST, prompt="a zorb <lora:zorb@2:0.7>"))
        service.wait(named.id, 60)
        assert Image.open(_file(served, named)).tobytes() == Image.open(_file(served, after)).tobytes()


def test_a_withdrawn_version_is_refused_for_new_and_waiting_jobs_and_leaves_the_caches(
    served: Home, engine: HeldEngine
) -> None:
    request = replace(REQUEST, prompt="a zorb <lora:zorb@2:1>")
    with service_on(served, engine, batch_images=1) as service, closing(Versions(served)) as versions:
        service.wait(service.submit(request).id, 60)
        (file,) = (served.path / "serving" / "adapters").iterdir()
        hold(service, engine)
        waiting = service.submit(request)
        withdraw(versions, "zorb", 2, reason="bad eyes")
        with pytest.raises(GoneVersion, match="bad eyes"):
            service.submit(request)
        engine.may_draw.set()
        ended = service.wait(waiting.id, 60)
        assert ended.state is JobState.FAILED
        assert ended.failure is not None
        assert ended.failure.kind == "GoneVersion"
        assert "bad eyes" in str(ended.error)
        assert engine.forgotten == [file]
        assert not file.exists()


def test_images_of_a_version_that_is_withdrawn_while_they_are_drawn_do_not_leave(
    served: Home, engine: HeldEngine
) -> None:
    with service_on(served, engine) as service, closing(Versions(served)) as versions:
        job = hold(service, engine, replace(REQUEST, prompt="a zorb <lora:zorb@2:1>"))
        withdraw(versions, "zorb", 2, reason="bad eyes")
        engine.may_draw.set()
        assert service.wait(job.id, 60).state is JobState.FAILED
        assert not _file(served, job).exists()


def test_a_full_queue_refuses_and_one_tenant_cannot_fill_it(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine, queue_limit=3, tenant_limit=2, batch_images=1) as service:
        hold(service, engine)
        for _ in range(2):
            service.submit(PLAIN, tenant="ann")
        with pytest.raises(TenantQueueFull, match="2 of your jobs wait"):
            service.submit(PLAIN, tenant="ann")
        last = service.submit(PLAIN, tenant="ben")
        with pytest.raises(QueueFull, match="3 jobs wait"):
            service.submit(PLAIN, tenant="carl")
        assert last.position == 2, "a tenant's first job is drawn before another's second"
        service.cancel(last.id)
        assert service.submit(PLAIN, tenant="carl").state is JobState.QUEUED


def test_jobs_of_tenants_that_share_a_batch_are_drawn_at_once(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine, batch_images=3) as service:
        hold(service, engine, replace(PLAIN, steps=3))
        jobs = [service.submit(PLAIN, tenant=tenant) for tenant in ("ann", "ann", "ben", "carl")]
        other = service.submit(replace(PLAIN, steps=2), tenant="dora")
        engine.may_draw.set()
        for job in (*jobs, other):
            assert service.wait(job.id, 60).state is JobState.COMPLETED
        assert sorted(engine.batches) == [1, 1, 1, 3]


def test_jobs_are_canceled_while_they_wait_and_while_they_are_drawn(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine, batch_images=1) as service:
        running = hold(service, engine, replace(PLAIN, steps=100))
        waiting = service.submit(PLAIN)
        assert [service.cancel(job.id).state for job in (running, waiting)] == [JobState.CANCELED] * 2
        engine.may_draw.set()
        later = service.submit(PLAIN)
        assert service.wait(later.id, 60).state is JobState.COMPLETED
        assert service.images(running.id) == []
        assert not _file(served, running).exists()
        assert service.cancel(later.id).state is JobState.COMPLETED


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
        assert not _file(served, job).parent.exists()
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
        assert not _file(served, ended).exists()
        fine = service.wait(service.submit(replace(PLAIN, prompt="a fine ring")).id, 60)
        assert (fine.state is JobState.COMPLETED) == (hook == "refuse")


@pytest.mark.parametrize("name", ["nothing", "json:nothing", "no_such_package:hook", "json:__name__"])
def test_a_safety_hook_that_cannot_be_loaded_keeps_the_server_from_starting(
    served: Home, engine: HeldEngine, name: str
) -> None:
    with pytest.raises(SpecError):
        ImageService(served, ServiceSettings(safety=name), engine)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"count": 17}, "images is 17"),
        ({"count": 0}, "images is 0"),
        ({"steps": 151}, "steps is 151"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"size": (4096, 4096)}, "pixels of an image"),
        ({"size": (1024, 1024), "enlarge": 4.0}, "pixels of an image"),
        ({"size": (4, 64)}, "width and height is 4"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"enlarge": 5.0}, "enlarge is 5.0"),
        ({"prompt": "a" * 10_001}, "length of the prompt"),
        ({"negative": "a" * 10_001}, "length of the negative"),
        ({"variation": NoiseVariation(2**63, 0.5)}, "seed of the variation"),
        ({"seed_size": (4096, 4096)}, "pixels of an image"),
        ({"vae": "/etc"}, "vae"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"sampler": "no such"}, "no such"),
        ({"mask": Path("mask.png")}, "a mask needs an image"),
        ({"prompt": "a <lora:zorb:abc>"}, "abc"),
        ({"prompt": "".join(f"<lora:zorb:0.{weight}>" for weight in range(11, 28))}, "17 adapters"),
    ],
)
def test_a_request_outside_of_the_limits_is_refused_before_it_waits(
    served: Home, engine: HeldEngine, changes: dict[str, object], match: str
) -> None:
    with service_on(served, engine) as service, pytest.raises(SettingsError, match=match):
        service.submit(replace(PLAIN, **changes))  # type: ignore[arg-type]


def test_adapters_are_named_by_reference_only(served: Home, tmp_path: Path) -> None:
    adapters = ServedAdapters(served, tmp_path / "files")
    with closing(adapters):
        assert [adapters.resolve(ref) for ref in ("zorb", "zorb@production", "zorb@2")] == [
            "zorb@1",
            "zorb@1",
            "zorb@2",
        ]
        for ref in ("/etc/passwd", "../zorb@1", "zorb@latest", "zorb@", "@1", "zorb@1@2", "zorb.safetensors/x", "ZORB"):
            with pytest.raises(SpecError, match="invalid adapter"):
                adapters.resolve(ref)
        with pytest.raises(UnknownName):
            adapters.resolve("zorb.safetensors")


def test_a_version_that_misses_the_policy_of_its_alias_is_refused_by_the_alias(served: Home, tmp_path: Path) -> None:
    with closing(ServedAdapters(served, tmp_path / "files")) as adapters:
        (served.path / "policy.yaml").write_text("aliases: {production: {needs_evaluation: true}}\n")
        with pytest.raises(Refused, match="policy of 'production'"):
            adapters.resolve("zorb")
        assert adapters.resolve("zorb@1") == "zorb@1"


def test_files_of_adapters_are_verified_and_the_least_used_are_deleted(served: Home, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    with closing(ServedAdapters(served, folder, limit=1)) as adapters:
        file, _ = adapters.fetch("zorb@1")
        content = file.read_bytes()
        size = len(content)
    file.write_bytes(b"x" + content[1:])
    with closing(ServedAdapters(served, folder, limit=2 * size)) as adapters:
        assert adapters.fetch("zorb@1")[0].read_bytes() == content
        other, _ = adapters.fetch("zorb@2")
        adapters.fetch("zorb@1")
        adapters.fetch("ring@1")
        adapters.trim()
        assert not other.exists()
        assert file.exists()
        assert (adapters.hits, adapters.misses) == (1, 3)


def test_a_static_server_has_its_adapters_in_every_image_and_takes_no_others(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine) as dynamic:
        expected = dynamic.wait(dynamic.submit(replace(PLAIN, prompt="a ring <lora:zorb@1:0.5>")).id, 60)
        pixels = Image.open(_file(served, expected)).tobytes()
    service = open_service(served, ServiceSettings(engine="static", adapters=("zorb@production:0.5",)))
    try:
        assert service.settings.adapters == ("zorb@1:0.5",)
        job = service.wait(service.submit(PLAIN).id, 60)
        assert job.adapters == ("zorb@1",)
        assert Image.open(_file(served, job)).tobytes() == pixels
        with pytest.raises(SettingsError, match="this server has fixed ones"):
            service.submit(REQUEST)
        with closing(Versions(served)) as versions:
            promote(versions, "zorb", 2, "production", reason="a test")
            withdraw(versions, "zorb", 1, reason="bad eyes")
        with pytest.raises(GoneVersion):
            service.submit(PLAIN)
    finally:
        service.close()


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


def test_a_home_has_one_server(served: Home, engine: HeldEngine) -> None:
    with service_on(served, engine), pytest.raises(HomeError, match="another server"):
        ImageService(served, ServiceSettings(), engine)
    with service_on(served, engine) as service:
        service.close()
        with pytest.raises(ServiceClosed):
            service.submit(PLAIN)


def test_an_engine_that_breaks_fails_its_batch_and_the_queue_continues(
    served: Home, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service_on(served, engine) as service:
        with monkeypatch.context() as patch:
            patch.setattr(PlainEngine, "draw", lambda self, jobs: 1 / 0)
            ended = service.wait(service.submit(PLAIN).id, 60)
            assert "could not be drawn" in str(ended.error)
            assert "division" not in str(ended.error)
        assert service.wait(service.submit(PLAIN).id, 60).state is JobState.COMPLETED


def _file(home: Home, job: Job) -> Path:
    return home.path / "serving" / "jobs" / job.id / "0.png"
