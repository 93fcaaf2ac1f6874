"""The static engine: what it fuses, which jobs it takes, and what it says of its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_engine.bases.base import BaseModel
from lora_engine.errors import AdapterError, EngineError, SettingsError
from lora_engine.inference.draw import Drawer
from lora_engine.inference.regions import Regions, parse_region
from lora_engine.serving.engine import DrawnImages
from lora_engine.serving.engines import StaticOptions
from lora_engine.serving.static import StaticEngine
from tests.lora_engine.serving.conftest import STEPS, count_predictions, job_of, pixels_of

Write = Callable[..., Path]


def test_jobs_are_drawn_with_the_fused_adapters_whether_they_name_them_or_not(
    base: BaseModel, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_file("a"), write_file("b", "loha")]
    named = job_of("a ring <lora:a:0.8> <lora:b:-0.3:0.5>", *files)
    drawer = Drawer(base)
    expected, drawing = drawer.draw(named.prompt, named.settings, files=named.files, negative=named.negative)
    bare, _ = drawer.draw(job_of("a ring").prompt, named.settings, negative=named.negative)
    options = StaticOptions(adapters="<lora:a@1:0.8> <lora:b@2:-0.3:0.5>")
    engine = StaticEngine(base, options, [(file, file.stem) for file in files])
    try:
        for job in (named, job_of("a ring")):
            (result,) = engine.draw([job])
            assert isinstance(result, DrawnImages)
            assert torch.equal(result.pixels, expected)
            assert [adapter.sha256 for adapter in result.drawing.adapters] == [
                adapter.sha256 for adapter in drawing.adapters
            ]
        jobs = [job_of("a ring"), job_of("a cube", guidance=1.0)]
        assert engine.shares_batch(*jobs)
        rows = count_predictions(base, monkeypatch)
        drawn = [pixels_of(result) for result in engine.draw(jobs)]
        assert rows == [3] * STEPS
        torch.testing.assert_close(drawn[0], expected, rtol=0, atol=2e-5)
    finally:
        engine.close()
    assert torch.equal(drawer.draw(job_of("a ring").prompt, named.settings, negative=named.negative)[0], bare)


def test_a_job_with_other_adapters_or_weights_is_refused_and_the_others_are_drawn(
    base: BaseModel, write_file: Write
) -> None:
    fused, other = write_file("a"), write_file("b")
    engine = StaticEngine(base, StaticOptions(adapters="<lora:a:0.8>"), [(fused, "a@1")])
    try:
        results = engine.draw(
            [
                job_of("a ring <lora:b:0.8>", other),
                job_of("a ring"),
                job_of("a ring <lora:a:0.7>", fused),
                job_of("a ring <lora:a:0.8> <lora:b:1>", fused, other),
            ]
        )
    finally:
        engine.close()
    assert [type(result) for result in results] == [SettingsError, DrawnImages, SettingsError, SettingsError]
    assert "Allowed: a@1. Fix: leave the adapters out of the prompt" in str(results[0])


def test_regions_are_drawn_with_the_fused_adapters_and_a_prediction_without_them_is_refused(
    base: BaseModel, write_file: Write
) -> None:
    file, regions = write_file("a"), Regions((parse_region("0,0,0.5,1=a cube"),))
    named = job_of("a ring <lora:a:0.8>", file, regions=regions)
    expected, _ = Drawer(base).draw(named.prompt, named.settings, files=named.files, negative=named.negative)
    engine = StaticEngine(base, StaticOptions(adapters="<lora:a:0.8>"), [(file, "a@1")])
    try:
        own = Regions((parse_region("0,0,0.5,1=a cube <lora:a:0.8>"),))
        drawn, guided, in_region = engine.draw(
            [
                job_of("a ring", regions=regions),
                job_of("a ring", adapter_guidance=2.0),
                job_of("a ring", file, regions=own),
            ]
        )
    finally:
        engine.close()
    assert torch.equal(pixels_of(drawn), expected)
    assert "adapter_guidance is 2, and this server has fused its adapters" in str(guided)
    assert "leave the adapters out of the prompt" in str(in_region)


def test_after_a_fused_version_is_withdrawn_no_job_is_drawn(base: BaseModel, write_file: Write) -> None:
    fused = write_file("a")
    engine = StaticEngine(base, StaticOptions(adapters="<lora:a:0.8>"), [(fused, "a@1")])
    try:
        engine.forget(fused.with_name("other.safetensors"))
        assert isinstance(engine.draw([job_of("a ring")])[0], DrawnImages)
        engine.forget(fused)
        (refused,) = engine.draw([job_of("a ring")])
    finally:
        engine.close()
    assert isinstance(refused, AdapterError)
    assert "'a@1', which this server has fused, may not be used any longer" in str(refused)


@pytest.mark.parametrize(
    ("adapters", "problem"),
    [
        ("a ring <lora:a:1>", "words between them"),
        ("<lora:a:0@0,1@1>", "changes over the steps"),
        ("<lora:a:1:stop=3>", "changes over the steps"),
        ("<lora:a:1> <lora:b:1>", "2 adapters and 1 files"),
    ],
)
def test_adapters_that_cannot_be_fused_once_are_refused(
    base: BaseModel, write_file: Write, adapters: str, problem: str
) -> None:
    with pytest.raises(SettingsError, match=problem):
        StaticEngine(base, StaticOptions(adapters=adapters), [(write_file("a"), "a@1")])


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(base: BaseModel, write_file: Write) -> None:
    file = write_file("a")
    file.write_bytes(file.read_bytes()[:-10])
    before = {name: parameter.data_ptr() for name, parameter in base.modules["unet"].named_parameters()}
    with pytest.raises(EngineError):
        StaticEngine(base, StaticOptions(adapters="<lora:a:1>"), [(file, "a@1")])
    assert {name: parameter.data_ptr() for name, parameter in base.modules["unet"].named_parameters()} == before
