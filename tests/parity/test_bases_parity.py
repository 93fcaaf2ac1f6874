"""Every family of bases against the pipeline of diffusers: network inputs, network outputs, image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter, LoraDelta, attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.families.flux.model import pack
from lora_engine.formats import write_adapter
from lora_engine.inference.generate import draw_noise, generate
from tests.support.untrained import write_untrained_base

SIZE = (16, 24)
STEPS = 3
TEXTS = ["a red star", "sks"]
PLAIN = ["small-sd", "small-sd-v", "small-sdxl"]
INPAINTING = ["small-sd-inpainting", "small-sdxl-inpainting"]
SD3 = ["small-sd3", "small-sd3-without-t5", "small-sd35"]
FLUX = ["small-flux", "small-flux-schnell"]
SHAPES = [*PLAIN, *INPAINTING, *SD3, *FLUX]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in SHAPES}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, BaseModel]:
    return {shape: load_base(str(folder), device="cpu") for shape, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    loaded = {}
    for shape, folder in folders.items():
        extra: dict[str, Any] = {}
        if shape in ("small-sd", "small-sd-v", "small-sd-inpainting"):
            extra = {"safety_checker": None, "requires_safety_checker": False}
        if shape == "small-sd3-without-t5":
            extra = {"text_encoder_3": None, "tokenizer_3": None}
        loaded[shape] = DiffusionPipeline.from_pretrained(str(folder), **extra)
        loaded[shape].set_progress_bar_config(disable=True)
    return loaded


@contextmanager
def recorded(network: torch.nn.Module) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """Records the arguments and the outputs of a network's calls."""
    calls: list[tuple[dict[str, Any], Tensor]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = ("sample", "timestep")
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output[0]))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def network_of(thing: Any) -> torch.nn.Module:
    return thing.unet if hasattr(thing, "unet") else thing.transformer


def inpainted() -> tuple[Tensor, Tensor]:
    image = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mask = torch.zeros(2, 1, *SIZE)
    mask[0, :, 4:12, 6:20] = 1.0
    mask[1, :, :8] = 1.0
    return mask, image


def draw_reference(pipeline: Any, base: BaseModel, shape: str, guidance: float) -> Tensor:
    noise = torch.stack([draw_noise(base.latent_shape(SIZE), seed) for seed in (1, 2)])
    settings: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "output_type": "pt"}
    settings |= {"guidance_scale": guidance, "latents": pack(noise) if shape in FLUX else noise}
    if shape not in (*SD3, *FLUX):
        pipeline.scheduler = base.scheduler()
    if shape in INPAINTING:
        mask, image = inpainted()
        masked = base.encode_mask(mask, image)["masked"]
        settings |= {"image": image / 2 + 0.5, "mask_image": mask, "masked_image_latents": masked, "strength": 1.0}
    if shape in FLUX:
        settings["max_sequence_length"] = 24
    if shape in SD3 and pipeline.tokenizer_3 is not None:
        settings["max_sequence_length"] = 24
    return pipeline(TEXTS, **settings).images


def draw_ours(base: BaseModel, shape: str, guidance: float) -> Tensor:
    masks = base.encode_mask(*inpainted()) if shape in INPAINTING else None
    settings: dict[str, Any] = {"steps": STEPS, "guidance": guidance, "height": SIZE[0], "width": SIZE[1]}
    return generate(base, TEXTS, seeds=[1, 2], masks=masks, **settings)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_an_image_and_every_network_call_equal_those_of_the_pipeline(
    bases: dict[str, BaseModel], pipelines: dict[str, Any], shape: str, guidance: float
) -> None:
    base, pipeline = bases[shape], pipelines[shape]
    with recorded(network_of(pipeline)) as reference:
        expected = draw_reference(pipeline, base, shape, guidance)
    with recorded(next(iter(base.modules.values()))) as ours:
        actual = draw_ours(base, shape, guidance)
    assert len(ours) == len(reference) == STEPS
    for (inputs, output), (reference_inputs, reference_output) in zip(ours, reference, strict=True):
        compare(inputs, reference_inputs)
        torch.testing.assert_close(output, reference_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual / 2 + 0.5, expected, rtol=0, atol=2e-5)
    assert expected.std() > 1e-3


def compare(ours: dict[str, Any], reference: dict[str, Any]) -> None:
    """Asserts that all tensor arguments are equal; a timestep may be one value for all rows."""
    tensors = {name: value for name, value in reference.items() if isinstance(value, Tensor)}
    assert {name for name, value in ours.items() if isinstance(value, Tensor)} == set(tensors)
    for name, value in tensors.items():
        actual = ours[name].float()
        expected = value.float().expand_as(actual) if name == "timestep" else value.float()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    added, reference_added = ours.get("added_cond_kwargs") or {}, reference.get("added_cond_kwargs") or {}
    assert set(added) == set(reference_added)
    for name, value in reference_added.items():
        torch.testing.assert_close(added[name], value)


@torch.no_grad()
def test_the_comparison_sees_another_seed(bases: dict[str, BaseModel], pipelines: dict[str, Any]) -> None:
    base = bases["small-flux"]
    expected = draw_reference(pipelines["small-flux"], base, "small-flux", 4.0)
    settings: dict[str, Any] = {"steps": STEPS, "guidance": 4.0, "height": SIZE[0], "width": SIZE[1]}
    other = generate(base, TEXTS, seeds=[2, 1], **settings)
    assert (other / 2 + 0.5 - expected).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SD3)
@torch.no_grad()
def test_text_of_sd3_is_encoded_as_in_the_pipeline(
    bases: dict[str, BaseModel], pipelines: dict[str, Any], shape: str
) -> None:
    texts = [*TEXTS, ""]
    tokens = 256 if shape == "small-sd3-without-t5" else 24
    states, _, pooled, _ = pipelines[shape].encode_prompt(texts, None, None, "cpu", max_sequence_length=tokens)
    ours = bases[shape].encode_text(texts)
    assert torch.equal(ours["states"], states)
    assert torch.equal(ours["pooled"], pooled)


@pytest.mark.parametrize("shape", FLUX)
@torch.no_grad()
def test_text_of_flux_is_encoded_as_in_the_pipeline(
    bases: dict[str, BaseModel], pipelines: dict[str, Any], shape: str
) -> None:
    states, pooled, _ = pipelines[shape].encode_prompt([*TEXTS, ""], None, "cpu", max_sequence_length=24)
    ours = bases[shape].encode_text([*TEXTS, ""])
    assert torch.equal(ours["states"], states)
    assert torch.equal(ours["pooled"], pooled)


@pytest.mark.parametrize("shape", INPAINTING)
@torch.no_grad()
def test_a_mask_is_prepared_as_in_the_pipeline(
    bases: dict[str, BaseModel], pipelines: dict[str, Any], shape: str
) -> None:
    base, pipeline = bases[shape], pipelines[shape]
    mask, image = inpainted()
    ours = base.encode_mask(mask, image)
    hidden = image * (mask < 0.5)
    reference = pipeline.prepare_mask_latents(
        mask, base.encode_images(hidden), 2, *SIZE, torch.float32, torch.device("cpu"), None, False
    )
    assert torch.equal(ours["mask"], reference[0])
    assert torch.equal(ours["masked"], reference[1])


@torch.no_grad()
def test_sd2_uses_the_normalized_output_of_its_truncated_text_encoder(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = write_untrained_base(tmp_path / "sd2", "sd2")
    base = load_base(str(folder), device="cpu")
    pipeline = DiffusionPipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False)
    # The file lacks OpenCLIP's 24th layer: the last of its 23 is the penultimate, and is normalized.
    assert pipeline.text_encoder.config.num_hidden_layers == 23
    reference, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.equal(base.encode_text(TEXTS)["states"], reference)
    assert base.noise.parameterization == "v_prediction"
    noisy, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 900])
    expected = pipeline.unet(noisy, t, encoder_hidden_states=reference).sample
    torch.testing.assert_close(base.predict(noisy, t, Conditioning({"states": reference})), expected)


ADAPTED = [
    ("small-sd", "attention", "diffusers"),
    ("small-sdxl", "attention", "diffusers"),
    ("small-sdxl", "attention, text", "diffusers"),
    ("small-sdxl-inpainting", "attention", "diffusers"),
    ("small-sd3", "attention", "diffusers"),
    ("small-flux", "attention", "diffusers"),
]


@pytest.mark.parametrize(("shape", "targets", "form"), ADAPTED)
@torch.no_grad()
def test_an_image_with_an_adapter_equals_that_of_the_pipeline_with_our_file(
    bases: dict[str, BaseModel], pipelines: dict[str, Any], tmp_path: Path, shape: str, targets: str, form: str
) -> None:
    base, pipeline, draw = bases[shape], pipelines[shape], torch.Generator().manual_seed(5)
    fresh = create_adapter(base, targets.split(", "), rank=2, alpha=1.0, generator=draw)
    adapter = Adapter(
        {
            name: LoraDelta(delta.down, 0.5 * torch.randn(delta.up.shape, generator=draw), delta.alpha)
            for name, delta in fresh.modules.items()
            if isinstance(delta, LoraDelta)
        },
        fresh.base,
    )
    assert adapter.modules.keys() == fresh.modules.keys()
    path = tmp_path / ("adapter" if form == "diffusers" else "adapter.safetensors")
    write_adapter(path, adapter, format=form)
    plain = draw_reference(pipeline, base, shape, 4.0)
    pipeline.load_lora_weights(path)
    try:
        reference = draw_reference(pipeline, base, shape, 4.0)
    finally:
        pipeline.unload_lora_weights()
    with attach(base, adapter):
        actual = draw_ours(base, shape, 4.0) / 2 + 0.5
    assert (actual - plain).abs().max() > 1e-2
    torch.testing.assert_close(reference, actual, rtol=0, atol=5e-5)
    torch.testing.assert_close(draw_reference(pipeline, base, shape, 4.0), plain, rtol=0, atol=0)
