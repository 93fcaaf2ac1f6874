"""The compiled engine: switches compile nothing, images equal those without compiling, what does not fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import EngineError, SettingsError
from lora_engine.inference.draw import Drawer
from lora_engine.serving.compiled import CompiledEngine
from lora_engine.serving.engine import ImageJob
from lora_engine.serving.engines import CompiledOptions, make_engine
from tests.lora_engine.serving.conftest import job_of, pixels_of

BOUND = 2e-5
ATTENTION = ("attention", "text_encoder*.q_proj")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(untrained_base: Callable[[str], Path]) -> Iterator[tuple[BaseModel, CompiledEngine]]:
    """Returns a base of its own and its engine, with the backend `eager`: it traces and guards as inductor does."""
    forget_graphs()
    options = CompiledOptions(max_images=2, batches=(2,), rank=4, sizes=((16, 16),), backend="eager")
    engine = make_engine("compiled", str(untrained_base("small-sd")), options)
    assert isinstance(engine, CompiledEngine)
    yield engine._base, engine
    torch._dynamo.reset()


def forget_graphs() -> None:
    """Forgets what was compiled before, and its number."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def alone(base: BaseModel, engine: CompiledEngine, job: ImageJob) -> Tensor:
    """Returns the images that `loraline generate` draws."""
    with engine._uncompiled():
        return Drawer(base).draw(job.prompt, job.settings, files=job.files, negative=job.negative)[0]


def check_switches(base: BaseModel, engine: CompiledEngine, write_file: Write) -> None:
    files = [write_file(f"switch{index}", rank=1 + index % 4, targets=ATTENTION) for index in range(4)]
    before = graphs()
    for index in range(20):
        file, weight = files[index % 4], (0.0, 0.7, -0.4)[index % 3]
        job = job_of(f"a ring <lora:a:{weight}>", file, steps=1 + index % 2, seeds=(index,))
        pixels = pixels_of(engine.draw([job])[0])
        if index < 4:
            torch.testing.assert_close(pixels, alone(base, engine, job), rtol=0, atol=BOUND)
    assert graphs() == before


def test_20_switches_compile_nothing_and_images_are_those_without_compiling(
    compiled: tuple[BaseModel, CompiledEngine], write_file: Write
) -> None:
    base, engine = compiled
    assert graphs() == 1
    check_switches(base, engine, write_file)


@pytest.mark.nightly
def test_20_switches_compile_nothing_with_inductor(untrained_base: Callable[[str], Path], write_file: Write) -> None:
    forget_graphs()
    base = load_base(str(untrained_base("small-sd")), device="cpu")
    engine = CompiledEngine(base, CompiledOptions(max_images=1, rank=4, sizes=((16, 16),)))
    assert graphs() == 1
    check_switches(base, engine, write_file)
    torch._dynamo.reset()


def test_batches_schedules_samplers_and_guidance_use_the_compiled_network(
    compiled: tuple[BaseModel, CompiledEngine], write_file: Write, caplog: pytest.LogCaptureFixture
) -> None:
    base, engine = compiled
    first, second = (write_file(name, targets=ATTENTION) for name in "ab")
    jobs = [
        job_of("a ring <lora:a:0.8>", first),
        job_of("a cube <lora:b:0@0,1@1> <lora:a:0.4>", second, first, guidance=1.0),
        job_of("a disk", sampler="euler", seeds=(4, 5, 6)),
    ]
    assert engine.shares_batch(*jobs[:2])
    before = graphs()
    drawn = [*engine.draw(jobs[:2]), *engine.draw(jobs[2:])]
    assert graphs() == before
    assert not caplog.records
    for job, result in zip(jobs, drawn, strict=True):
        torch.testing.assert_close(pixels_of(result), alone(base, engine, job), rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("kind", "rank", "targets", "settings", "obstacle"),
    [
        ("loha", 2, ATTENTION, {}, "kind 'loha' has no products by row"),
        ("lora", 5, ATTENTION, {}, "rank 5 together, and 4 is compiled"),
        ("lora", 2, ("unet.*.conv1",), {}, "compiled without products for unet.down_blocks"),
        ("lora", 2, ATTENTION, {"size": (32, 16)}, r"size \(32, 16\) is not compiled"),
        ("lora", 2, ATTENTION, {"enlarge": 2.0}, "passes of its own"),
    ],
)
def test_what_does_not_fit_is_drawn_as_generate_draws_it_and_compiles_nothing(
    compiled: tuple[BaseModel, CompiledEngine],
    write_file: Write,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    rank: int,
    targets: tuple[str, ...],
    settings: dict[str, object],
    obstacle: str,
) -> None:
    base, engine = compiled
    job = job_of("a ring <lora:a:0.8>", write_file("a", kind, rank, targets), **settings)
    before = graphs()
    assert not engine.shares_batch(job_of("a ring"), job)
    with caplog.at_level(logging.WARNING):
        (result,) = engine.draw([job])
    assert caplog.records
    assert re.search(obstacle, engine.obstacle(job) or "")
    assert torch.equal(pixels_of(result), alone(base, engine, job))
    assert graphs() == before


def test_a_longer_text_is_predicted_without_compiling(
    compiled: tuple[BaseModel, CompiledEngine], write_file: Write
) -> None:
    base, engine = compiled
    job = job_of("a red BREAK ring <lora:a:0.8>", write_file("a", targets=ATTENTION))
    before = graphs()
    torch.testing.assert_close(pixels_of(engine.draw([job])[0]), alone(base, engine, job), rtol=0, atol=BOUND)
    assert graphs() == before


def test_too_many_shapes_and_sizes_of_other_bases_are_refused(untrained_base: Callable[[str], Path]) -> None:
    base = load_base(str(untrained_base("small-sd")), device="cpu")
    sizes = tuple((16, 16 * n) for n in range(1, 6))
    with pytest.raises(SettingsError, match="5 sizes and 2 batches"):
        CompiledEngine(base, CompiledOptions(sizes=sizes, backend="eager"))
    with pytest.raises(SettingsError, match="cannot generate images of 15 x 16"):
        CompiledEngine(base, CompiledOptions(sizes=((15, 16),), backend="eager"))


def test_a_backend_that_fails_is_an_error_with_a_fix(untrained_base: Callable[[str], Path]) -> None:
    base = load_base(str(untrained_base("small-sd")), device="cpu")
    with pytest.raises(EngineError, match=r"torch\.compile failed.*use the engine dynamic"):
        CompiledEngine(base, CompiledOptions(sizes=((16, 16),), backend="no-such-backend"))
