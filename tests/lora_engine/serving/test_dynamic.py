"""The dynamic engine: batches equal jobs alone, jobs end on their own, adapters stay in memory up to a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from PIL import Image
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.errors import AdapterError, EngineError
from lora_engine.formats import Embedding
from lora_engine.inference.draw import Drawer
from lora_engine.inference.image_files import png_texts
from lora_engine.inference.regions import Regions, parse_region
from lora_engine.serving.adapter_cache import AdapterCache
from lora_engine.serving.dynamic import DynamicEngine
from lora_engine.serving.engine import ImageJob, JobStopped
from lora_engine.serving.engines import DynamicOptions
from tests.lora_engine.serving.conftest import STEPS, count_predictions, job_of, pixels_of

BOUND = 2e-5
"""Difference of a pixel, of values from -1 to 1, between a batch and a job alone; docs/serving-engines.md states it."""
Write = Callable[..., Path]


@pytest.fixture
def engine(base: BaseModel) -> DynamicEngine:
    return DynamicEngine(base)


def alone(base: BaseModel, job: ImageJob) -> Tensor:
    """Returns the images that `loraline generate` draws."""
    return Drawer(base).draw(job.prompt, job.settings, files=job.files, negative=job.negative)[0]


def assert_batch_equals_jobs_alone(
    base: BaseModel, engine: DynamicEngine, jobs: list[ImageJob], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Returns the rows of each prediction of the batch."""
    expected = [alone(base, job) for job in jobs]
    assert all(engine.shares_batch(jobs[0], job) for job in jobs[1:])
    with monkeypatch.context() as patch:
        rows = count_predictions(base, patch)
        drawn = [pixels_of(result) for result in engine.draw(jobs)]
    for own, single in zip(drawn, expected, strict=True):
        torch.testing.assert_close(own, single, rtol=0, atol=BOUND)
    assert [torch.equal(alone(base, job), single) for job, single in zip(jobs, expected, strict=True)] == [True] * len(
        jobs
    )
    return rows


def test_four_adapters_in_one_batch_draw_what_each_draws_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_file(name, rank=rank) for rank, name in enumerate("abc", 1)]
    jobs = [
        job_of("a red ring <lora:a:0.8>", files[0], negative="blue"),
        job_of("a cube <lora:b:0@0,1@1>", files[1], seeds=(3, 4), guidance=5.0),
        job_of("a green disk"),
        job_of("a ring <lora:c:0.4:0.9> <lora:a:0.5:lbw=MIDD>", files[2], files[0], guidance=1.0),
    ]
    expected = [alone(base, job) for job in jobs]
    rows = assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch)
    assert rows == [2 + 4 + 2 + 1] * STEPS
    plain = alone(base, job_of("a red ring", negative="blue"))
    assert (expected[0] - plain).abs().max() > 100 * BOUND


def test_a_job_alone_has_the_bytes_of_generate(base: BaseModel, engine: DynamicEngine, write_file: Write) -> None:
    for kind in ("lora", "dora"):
        job = job_of("a ring <lora:a:0.8>", write_file(kind, kind), seeds=(1, 2))
        (result,) = engine.draw([job])
        assert torch.equal(pixels_of(result), alone(base, job))


def test_a_job_with_regions_has_the_bytes_of_generate(
    base: BaseModel, engine: DynamicEngine, write_file: Write
) -> None:
    regions = Regions(
        (parse_region("0,0,0.5,1=a cube <lora:b:0.7>"), parse_region("0.5,0,1,1=a disk <lora:a:0.8>")), 2.0
    )
    job = job_of("a ring <lora:a:0.8>", write_file("a"), write_file("b"), regions=regions)
    (result,) = engine.draw([job])
    assert torch.equal(pixels_of(result), alone(base, job))
    assert not torch.equal(pixels_of(result), alone(base, job_of("a ring <lora:a:0.8>", write_file("a"))))


def test_jobs_with_one_clip_skip_share_a_batch_and_the_next_job_reads_the_own_layer_of_the_base(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = alone(base, job_of("a ring"))
    jobs = [job_of("a ring", clip_skip=2), job_of("a cube <lora:a:0.8>", write_file("a"), clip_skip=2)]
    assert assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch) == [4] * STEPS
    assert not torch.equal(alone(base, jobs[0]), plain)
    (after,) = engine.draw([job_of("a ring")])
    assert torch.equal(pixels_of(after), plain)


def test_the_metadata_of_a_batch_are_those_of_jobs_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write
) -> None:
    jobs = [job_of(f"a ring <lora:{name}:0.8>", write_file(name)) for name in "ab"]
    for job, result in zip(jobs, engine.draw(jobs), strict=True):
        assert not isinstance(result, EngineError)
        own = Drawer(base).draw(job.prompt, job.settings, files=job.files, negative=job.negative)[1]
        assert png_texts(result.drawing, 1, (16, 16)) == png_texts(own, 1, (16, 16))


def test_jobs_with_texts_of_different_lengths_and_parts_draw_what_each_draws_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file("a")
    jobs = [
        job_of("a ring <lora:a:0.8>", file),
        job_of("a red BREAK (ring:1.2)"),
        job_of("a ring AND a cube :0.5 <lora:a:0.3>", file),
        job_of("a [ring:cube:0.5]"),
    ]
    rows = assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch)
    assert rows == [2 + 3 + 2, 2] * STEPS, "the longer text has a prediction of its own"


def test_jobs_that_start_from_images_share_a_batch(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(image)
    Image.linear_gradient("L").resize((16, 16)).save(mask)
    jobs = [
        job_of("a ring <lora:a:0.8>", write_file("a"), image=image, strength=0.7),
        job_of("a ring <lora:b:0@0,0.8@1>", write_file("b"), image=image, mask=mask),
        job_of("a ring"),
    ]
    rows = assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch)
    assert rows == [6] * 2 + [2], "jobs that begin later end earlier"


@pytest.mark.parametrize("kind", ["loha", "dora", "oft"])
def test_jobs_with_the_same_adapter_of_any_kind_share_a_batch(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = write_file("a", kind)
    jobs = [job_of(f"a {color} ring <lora:a:0.8>", file) for color in ("red", "blue")]
    assert assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch) == [4] * STEPS


def test_jobs_that_cannot_share_a_batch_are_drawn_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, loha = write_file("a"), write_file("b", "loha")
    first = job_of("a ring <lora:a:0.8>", lora)
    others = [
        job_of("a ring <lora:b:0.8>", loha),
        job_of("a ring", enlarge=2.0),
        job_of("a ring", size=(32, 16)),
        job_of("a ring", steps=STEPS + 1),
        job_of("a ring", sampler="euler"),
        job_of("a ring", seeds=range(8)),
        job_of("a ring", engine="attached"),
        job_of("a ring", clip_skip=2),
        job_of("a ring", regions=Regions((parse_region("0,0,0.5,1=a cube"),))),
        job_of("a ring <lora:c:1>", write_file("c", recipe={"clip_skip": 2})),
        job_of("a ring <lora:d:1>", lora.with_name("missing.safetensors")),
    ]
    assert [engine.shares_batch(first, job) for job in others] == [False] * len(others)
    scheduled = job_of("a ring <lora:b:0@0,1@1>", loha)
    assert not engine.shares_batch(scheduled, scheduled)
    rows = count_predictions(base, monkeypatch)
    results = engine.draw([first, others[0]])
    assert rows == [2] * 2 * STEPS
    for job, result in zip((first, others[0]), results, strict=True):
        assert torch.equal(pixels_of(result), alone(base, job))


def test_more_images_than_the_largest_batch_are_drawn_in_several(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = DynamicEngine(base, DynamicOptions(max_images=2))
    rows = count_predictions(base, monkeypatch)
    results = engine.draw([job_of("a ring", seeds=(seed,)) for seed in range(3)])
    assert [len(pixels_of(result)) for result in results] == [1, 1, 1]
    assert rows == [4] * STEPS + [2] * STEPS


def test_a_job_that_is_stopped_does_not_stop_the_others(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []

    def stop(done: int, total: int, latents: Tensor) -> None:
        steps.append((done, len(latents)))
        if done == 2:
            raise JobStopped("the job was canceled")

    jobs = [
        job_of("a ring <lora:a:0.8>", write_file("a"), seeds=(1, 2), on_step=stop),
        job_of("a cube <lora:b:0.8>", write_file("b")),
    ]
    expected = alone(base, jobs[1])
    rows = count_predictions(base, monkeypatch)
    stopped, drawn = engine.draw(jobs)
    assert isinstance(stopped, JobStopped)
    assert steps == [(1, 2), (2, 2)]
    assert rows == [6, 6, 2], "its rows leave the batch"
    torch.testing.assert_close(pixels_of(drawn), expected, rtol=0, atol=BOUND)


def test_values_that_are_not_numbers_are_the_error_of_their_job_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write
) -> None:
    jobs = [
        job_of("a ring <lora:a:1>", write_file("a", spread=1e15), seeds=(5,)),
        job_of("a cube <lora:b:0.8>", write_file("b")),
    ]
    broken, drawn = engine.draw(jobs)
    assert isinstance(broken, EngineError)
    assert "gives NaN or Inf" in str(broken)
    torch.testing.assert_close(pixels_of(drawn), alone(base, jobs[1]), rtol=0, atol=BOUND)
    (single,) = engine.draw(jobs[:1])
    assert "gives NaN or Inf" in str(single)


def test_an_image_that_the_decoder_breaks_is_an_error_with_its_seed(
    base: BaseModel, engine: DynamicEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = base.decode_latents
    monkeypatch.setattr(
        base, "decode_latents", lambda latents: decode(latents) * torch.tensor([1.0, torch.nan])[:, None, None, None]
    )
    (broken,) = engine.draw([job_of("a ring", seeds=(4, 5))])
    assert isinstance(broken, EngineError)
    assert "seeds [5] have values that are not numbers" in str(broken)


def test_an_adapter_that_cannot_be_used_is_the_error_of_its_job_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write
) -> None:
    file = write_file("b")
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(file.read_bytes()[:-100])
    error, drawn = engine.draw([job_of("a ring <lora:a:1>", damaged), job_of("a cube <lora:b:1>", file)])
    assert isinstance(error, AdapterError)
    assert pixels_of(drawn).shape == (1, 3, 16, 16)
    with pytest.raises(ZeroDivisionError):  # an error of a caller is not swallowed, and no thread waits for ever
        engine.draw([job_of("a ring", on_step=lambda done, total, latents: 1 / 0), job_of("a cube")])


def test_each_job_has_its_own_learned_tokens(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding: Any = base.modules["text_encoder"]
    width = embedding.get_input_embeddings().weight.shape[1]
    vectors = [torch.full((1, width), value) for value in (0.5, -0.5)]
    files = [
        write_file(name, embeddings=[Embedding("zorb", {"text_encoder": vector})])
        for name, vector in zip("ab", vectors, strict=True)
    ]
    jobs = [job_of(f"a zorb <lora:{file.stem}:0.8>", file) for file in files]
    assert_batch_equals_jobs_alone(base, engine, jobs, monkeypatch)


def test_options_of_one_job_do_not_reach_the_next(base: BaseModel, engine: DynamicEngine, write_file: Write) -> None:
    plain = job_of("a ring <lora:a:0.8>", write_file("a"))
    other = job_of("a ring <lora:b:0.8>", write_file("b", recipe={"clip_skip": 2, "prediction": "v_prediction"}))
    before = alone(base, plain)
    results = engine.draw([other, plain])
    assert torch.equal(pixels_of(results[1]), before)
    assert base.noise.parameterization == "eps"
    engine.draw([other])
    assert base.noise.parameterization == "v_prediction"


def test_adapters_stay_in_memory_up_to_a_number_of_bytes(base: BaseModel, write_file: Write) -> None:
    files = [write_file(name) for name in "abc"]
    unlimited = AdapterCache(base, 1 << 40)
    unlimited.bundle(files[0])
    size = unlimited.nbytes
    engine = DynamicEngine(base, DynamicOptions(cache_bytes=int(2.5 * size)))
    for file in files:
        engine.draw([job_of(f"a ring <lora:{file.stem}:0.8>", file)])
    cache = engine._adapters
    assert [file in cache for file in files] == [False, True, True]
    assert size < cache.nbytes <= 2.5 * size
    engine.draw([job_of(f"a ring <lora:{name}:0.8>", file) for name, file in zip("abc", files, strict=True)])
    assert cache.nbytes <= 2.5 * size, "also with the factors of the rows"


def test_a_forgotten_adapter_is_read_again(base: BaseModel, engine: DynamicEngine, write_file: Write) -> None:
    file = write_file("a")
    job = job_of("a ring <lora:a:0.8>", file)
    engine.draw([job])
    file.unlink()
    assert pixels_of(engine.draw([job])[0]).shape == (1, 3, 16, 16)
    engine.forget(file)
    (error,) = engine.draw([job])
    assert isinstance(error, AdapterError)


def test_a_network_that_packs_its_rows_predicts_each_job_alone(
    base: BaseModel, engine: DynamicEngine, write_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_file(name, targets=("unet.*.ff.net.0.proj",)) for name in "ab"]
    jobs = [job_of(f"a ring <lora:{file.stem}:0.8>", file) for file in files]
    forward = GEGLU.forward

    def packed(layer: GEGLU, hidden: Tensor) -> Tensor:
        """Calls the layer with the tokens of all rows joined, as transformers of packed tokens do."""
        return forward(layer, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    monkeypatch.setattr(GEGLU, "forward", packed)
    expected = [alone(base, job) for job in jobs]
    assert engine.shares_batch(*jobs)
    drawn = engine.draw(jobs)
    for own, single in zip(drawn, expected, strict=True):
        torch.testing.assert_close(pixels_of(own), single, rtol=0, atol=BOUND)
    assert not engine.shares_batch(*jobs), "from then on"


def test_previews_are_small_images(base: BaseModel, engine: DynamicEngine) -> None:
    shape = base.latent_shape((16, 16))
    preview = engine.preview(torch.zeros(1, *shape))
    assert preview.shape == (1, 3, 16, 16)
    assert preview.abs().max() <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_images_that_need_more_than_the_free_memory_are_refused_by_the_engine(
    base: BaseModel, engine: DynamicEngine, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    jobs = [job_of("a ring", seeds=(seed,)) for seed in range(count)]
    monkeypatch.setattr("lora_engine.serving.batch.measure_free", lambda device: (1, 1))
    for result in DynamicEngine(base).draw(jobs):
        assert isinstance(result, EngineError)
        assert "has 0 MiB left" in str(result)
    monkeypatch.undo()
    assert not any(isinstance(result, EngineError) for result in DynamicEngine(base).draw(jobs))
