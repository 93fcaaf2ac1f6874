"""The queue of a server with the embedded base: durability, tenants, batches, limits of requests."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_engine.errors import SettingsError
from lora_engine.inference.variation import NoiseVariation
from lora_engine.serving.engine import PlainEngine
from registry.entities import now
from registry.errors import HomeError
from registry.home import Home
from tasks.serving.job import (
    Job,
    JobState,
    KeyReused,
    QueueFull,
    ServiceClosed,
    TenantQueueFull,
)
from tasks.serving.records import JobRecords
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.web.server import copy_home
from tests.tasks.serving.held import PLAIN, REQUEST, HeldEngine, file_of, hold, service_on


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, held_engine: HeldEngine) -> Iterator[ImageService]:
    """Yields a service that no test gives a job."""
    home = copy_home(tmp_path_factory, tmp_path_factory.mktemp("idle") / "home")
    with service_on(home, held_engine) as service:
        yield service


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


def test_jobs_of_a_killed_server_are_drawn_by_the_next_and_their_keys_count(
    served: Home, engine: HeldEngine, tmp_path: Path
) -> None:
    with service_on(served, engine, batch_images=1) as service:
        jobs = [hold(service, engine), service.submit(REQUEST, key="k1")]
        shutil.copytree(served.path, tmp_path / "killed")  # the files as they are if the process ends here
    with service_on(Home.open(tmp_path / "killed"), engine) as service:
        assert [service.wait(job.id, 60).state for job in jobs] == [JobState.COMPLETED] * 2
        assert [len(service.images(job.id)) for job in jobs] == [1, 1]
        assert service.submit(REQUEST, key="k1").id == jobs[1].id


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
    types = [{name: type(value) for name, value in vars(each).items()} for each in (job.request, request)]
    assert types[0] == types[1]


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
        assert not file_of(served, running).exists()
        assert service.cancel(later.id).state is JobState.COMPLETED


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
        ({"clip_skip": 0}, "clip_skip is 0"),
        ({"adapter_guidance": float("nan")}, "adapter_guidance is nan"),
        ({"regions": ("/etc/passwd=a ring",)}, "'/etc/passwd' is no box"),
        ({"regions": ("0,0,1=a ring",)}, "LEFT,TOP,RIGHT,BOTTOM"),
        ({"regions": ("0,0,1,1=" + "a" * 10_001,)}, "length of the regions"),
        ({"feather": 3.0}, "no regions"),
        (
            {
                "prompt": "".join(f"<lora:zorb:0.{weight}>" for weight in range(11, 19)),
                "regions": ("0,0,1,1=a" + "".join(f"<lora:zorb:0.{weight}>" for weight in range(19, 28)),),
            },
            "17 adapters",
        ),
        ({"sampler": "no such"}, "no such"),
        ({"mask": Path("mask.png")}, "a mask needs an image"),
        ({"prompt": "a <lora:zorb:abc>"}, "abc"),
        ({"prompt": "".join(f"<lora:zorb:0.{weight}>" for weight in range(11, 28))}, "17 adapters"),
    ],
)
def test_a_request_outside_of_the_limits_is_refused_before_it_waits(
    idle: ImageService, changes: dict[str, object], match: str
) -> None:
    with pytest.raises(SettingsError, match=match):
        idle.submit(replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert idle.jobs() == []


def test_each_region_costs_one_more_prediction_of_a_step() -> None:
    request = replace(PLAIN, count=2, steps=5, regions=("0,0,0.5,1=a ring", "0.5,0,1,1=a cube"))
    assert Job("0" * 32, "ann", request, JobState.QUEUED, (), now()).cost == 2 * 5 * 3


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
