"""Adapters of served requests: moved aliases, withdrawn versions, policies, and files that are verified."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_engine.errors import SettingsError
from registry.errors import GoneVersion, Refused, UnknownName
from registry.home import Home
from registry.versions.deletion import withdraw
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.serving.adapters import ServedAdapters
from tasks.serving.job import (
    JobState,
)
from tasks.serving.service import ServiceSettings, open_service
from tests.tasks.serving.held import PLAIN, REQUEST, HeldEngine, file_of, hold, service_on


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
        assert Image.open(file_of(served, named)).tobytes() == Image.open(file_of(served, after)).tobytes()


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


@pytest.mark.parametrize(
    "changes", [{"prompt": "a zorb <lora:zorb@2:1>"}, {"regions": ("0,0,0.5,1=a zorb <lora:zorb@2:1>",)}]
)
def test_images_of_a_version_that_is_withdrawn_while_they_are_drawn_do_not_leave(
    served: Home, engine: HeldEngine, changes: dict[str, Any]
) -> None:
    with service_on(served, engine) as service, closing(Versions(served)) as versions:
        job = hold(service, engine, replace(REQUEST, **changes))
        assert "zorb@2" in job.adapters
        withdraw(versions, "zorb", 2, reason="bad eyes")
        engine.may_draw.set()
        assert service.wait(job.id, 60).state is JobState.FAILED
        assert not file_of(served, job).exists()


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
        pixels = Image.open(file_of(served, expected)).tobytes()
    service = open_service(served, ServiceSettings(engine="static", adapters=("zorb@production:0.5",)))
    try:
        assert service.settings.adapters == ("zorb@1:0.5",)
        job = service.wait(service.submit(PLAIN).id, 60)
        assert job.adapters == ("zorb@1",)
        assert Image.open(file_of(served, job)).tobytes() == pixels
        with pytest.raises(SettingsError, match="this server has fixed ones"):
            service.submit(REQUEST)
        with closing(Versions(served)) as versions:
            promote(versions, "zorb", 2, "production", reason="a test")
            withdraw(versions, "zorb", 1, reason="bad eyes")
        with pytest.raises(GoneVersion):
            service.submit(PLAIN)
    finally:
        service.close()
