"""One training step's loss and gradients against the training scripts of diffusers: same batch, noise and timesteps.

The reference is written from the scripts' own formulas (`train_text_to_image_lora.py`, `train_dreambooth_lora_sd3.py`,
`train_dreambooth_lora_flux.py`) with diffusers' schedulers, `compute_snr` and its densities of timesteps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from PIL import Image
from torch import Tensor

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.noise import flow_schedule_from
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.families.flux.model import TRAINING_GUIDANCE
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch, BatchBuilder
from lora_engine.training.denoising import predict
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.losses import DenoisingLoss, PriorLoss
from lora_engine.training.objective import draw_perturbation, draw_timesteps, draw_training_noise, measure_for
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.objective import Objective
from lora_engine.training.validation import image_losses
from tests.support.untrained import write_untrained_base

DIFFUSION = ["small-sd", "small-sd-v", "small-sdxl"]
FLOW = ["small-sd3", "small-flux", "small-flux-schnell"]
ROWS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in (*DIFFUSION, *FLOW)}


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path]) -> dict[str, BaseModel]:
    return {shape: load_base(str(folder), device="cpu") for shape, folder in folders.items()}


def batch_for(base: BaseModel, timesteps: Tensor, instances: int, objective: Objective | None = None) -> Batch:
    draw = generator(0, "parity")
    shape = (ROWS, *base.latent_shape((16, 16)))
    latents = torch.randn(shape, generator=draw)
    noise = draw_training_noise(objective or Objective(), shape, draw)
    perturbation = draw_perturbation(objective or Objective(), shape, draw)
    with torch.no_grad():
        conditioning = base.encode_text(["a", "b", "c", ""], (16, 16))
    return Batch(latents, noise, timesteps, conditioning, instances, perturbation=perturbation)


def diffusion_reference(
    base: BaseModel, folder: Path, batch: Batch, prior: float | None, gamma: float | None
) -> Tensor:
    scheduler = DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    noise = batch.noise if batch.perturbation is None else batch.noise + batch.perturbation
    noisy = scheduler.add_noise(batch.latents, noise, batch.timesteps)
    added: dict[str, Any] = {}
    if base.family == "sdxl":
        added["added_cond_kwargs"] = {
            "text_embeds": batch.conditioning["pooled"],
            "time_ids": batch.conditioning["time_ids"],
        }
    predicted = base.modules["unet"](noisy, batch.timesteps, batch.conditioning["states"], **added).sample
    predicts_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps) if predicts_v else batch.noise
    if gamma is None:
        weights = torch.ones(ROWS)
    else:
        snr = compute_snr(scheduler, batch.timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = weights / (snr + 1) if predicts_v else weights / snr
    return joined(F.mse_loss(predicted.float(), target.float(), reduction="none"), weights.view(-1, 1, 1, 1), prior)


def flow_reference(base: BaseModel, folder: Path, batch: Batch, prior: float | None) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder), subfolder="scheduler")
    sigmas = (batch.timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * batch.noise
    transformer, states, pooled = (
        base.modules["transformer"],
        batch.conditioning["states"],
        batch.conditioning["pooled"],
    )
    if base.family == "sd3":
        predicted = transformer(
            hidden_states=noisy,
            timestep=batch.timesteps,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    else:
        _, channels, height, width = noisy.shape
        guidance = torch.full((ROWS,), TRAINING_GUIDANCE) if transformer.config.guidance_embeds else None
        packed = transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, ROWS, channels, height, width),
            timestep=batch.timesteps / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(ROWS, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        predicted = FluxPipeline._unpack_latents(packed, height=height * 8, width=width * 8, vae_scale_factor=8)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
    return joined((predicted.float() - (batch.noise - batch.latents)) ** 2, weighting, prior)


def joined(errors: Tensor, weights: Tensor, prior: float | None) -> Tensor:
    weighed = (weights * errors).reshape(ROWS, -1).mean(dim=1)
    if prior is None:
        return weighed.mean()
    instances, classes = torch.chunk(weighed, 2, dim=0)
    return instances.mean() + prior * classes.mean()


def same_step(base: BaseModel, batch: Batch, objective: Objective, prior: float | None, reference: Any) -> list[float]:
    adapter = create_adapter(base, "all", "lora", 2, None, generator=generator(0, "factors"))
    measure = measure_for(objective, base.noise)
    terms = [DenoisingLoss(measure)] if prior is None else [DenoisingLoss(measure), PriorLoss(prior, measure)]
    with attach(base, adapter, trainable=True) as attachment:
        with torch.no_grad():
            for value in attachment.parameters():
                value.add_(0.05)
        losses, gradients = [], []
        ours = torch.stack([term(*predict(base, batch), batch) for term in terms]).sum()
        for loss in (ours, reference()):
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, attachment.parameters()))
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[1])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return losses


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prior", [None, 0.3])
@pytest.mark.parametrize("shape", DIFFUSION)
def test_a_diffusion_step_equals_the_reference(
    folders: dict[str, Path], bases: dict[str, BaseModel], shape: str, prior: float | None, gamma: float | None
) -> None:
    base = bases[shape]
    batch = batch_for(base, torch.tensor([3, 250, 700, 999]), instances=ROWS if prior is None else ROWS // 2)
    objective = Objective.model_validate({} if gamma is None else {"weighting": {"name": "min_snr", "gamma": gamma}})
    actual, expected = same_step(
        base, batch, objective, prior, lambda: diffusion_reference(base, folders[shape], batch, prior, gamma)
    )
    assert actual == pytest.approx(expected, abs=1e-5, rel=1e-5)
    other = diffusion_reference(base, folders[shape], batch, prior, 2.0 if gamma is None else None).item()
    assert actual != pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("prior", [None, 0.3])
@pytest.mark.parametrize("shape", FLOW)
def test_a_flow_matching_step_equals_the_reference(
    folders: dict[str, Path], bases: dict[str, BaseModel], shape: str, prior: float | None
) -> None:
    base = bases[shape]
    timesteps = torch.tensor([3.5, 250.0, 700.25, 1000.0])
    batch = batch_for(base, timesteps, instances=ROWS if prior is None else ROWS // 2)
    actual, expected = same_step(
        base, batch, Objective(), prior, lambda: flow_reference(base, folders[shape], batch, prior)
    )
    assert actual == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_noise_offset_and_input_perturbation_equal_the_reference(
    folders: dict[str, Path], bases: dict[str, BaseModel]
) -> None:
    base = bases["small-sd"]
    objective = Objective(noise_offset=0.1, input_perturbation=0.2)
    batch = batch_for(base, torch.tensor([3, 250, 700, 999]), ROWS, objective)
    draw = generator(0, "parity")
    latents = torch.randn(batch.latents.shape, generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    # train_text_to_image.py: an offset per channel, then a second noise for the input only.
    noise += 0.1 * torch.randn((latents.shape[0], latents.shape[1], 1, 1), generator=draw)
    perturbed = noise + 0.2 * torch.randn(noise.shape, generator=draw)
    assert batch.perturbation is not None
    torch.testing.assert_close(batch.noise, noise)
    torch.testing.assert_close(batch.noise + batch.perturbation, perturbed)
    actual, expected = same_step(
        base, batch, objective, None, lambda: diffusion_reference(base, folders["small-sd"], batch, None, None)
    )
    assert actual == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "reference_settings"),
    [
        ("uniform", {"weighting_scheme": "none"}),
        (
            {"name": "logit_normal", "mean": 0.4, "std": 0.7},
            {"weighting_scheme": "logit_normal", "logit_mean": 0.4, "logit_std": 0.7},
        ),
        ({"name": "mode", "scale": 1.29}, {"weighting_scheme": "mode", "mode_scale": 1.29}),
    ],
)
def test_densities_of_timesteps_equal_those_of_diffusers(settings: Any, reference_settings: dict[str, Any]) -> None:
    objective = Objective.model_validate({"timesteps": {"distribution": settings}})
    actual = draw_timesteps(objective, flow_schedule_from({}), 64, generator(0, "steps"), (8, 8)) / 1000
    expected = compute_density_for_timestep_sampling(
        batch_size=64, generator=generator(0, "steps"), **reference_settings
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_shift_equals_that_of_the_scheduler_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    even = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).sigmas
    ours = flow_schedule_from({"shift": shift}).shift(even, (8, 8))
    torch.testing.assert_close(ours, scheduler.sigmas)


def sdxl_time_ids(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    # compute_time_ids of train_text_to_image_lora_sdxl.py
    return torch.tensor([list(original + crop + target)], dtype=torch.float32)


@pytest.mark.parametrize("flip", [False, True])
def test_the_size_conditioning_of_sdxl_is_that_of_the_training_script(
    bases: dict[str, BaseModel], tmp_path: Path, flip: bool
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("wide", (90, 30)), ("high", (24, 64))):
        Image.new("RGB", size, "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(name)
    ingest(images, tmp_path / "one", IngestSettings(heldout=0.0))
    preprocess(tmp_path / "one", tmp_path / "two", PreprocessSettings(resolution=16, original_sizes=True))
    base = bases["small-sdxl"]
    examples = read_examples(tmp_path / "two", Manifest.load(tmp_path / "two"), "train")
    captions = Captions(flip=flip)
    encoder = Encoder(base, tmp_path / "cache", captions)
    build = BatchBuilder(base, encoder.latents, encoder.conditioning, examples, batch=2, seed=0, captions=captions)
    mirrored: set[bool] = set()
    for number in range(8):
        batch = build(number)
        for example, ids in zip(batch.examples, batch.conditioning["time_ids"], strict=True):
            # The script resizes the shorter side to the resolution, mirrors the image, then crops the center.
            height, width = (16, 48) if example.caption == "wide" else (43, 16)
            left = (width - 16) // 2
            left = width - 16 - left if example.augmentation.mirrored else left
            original = (30, 90) if example.caption == "wide" else (64, 24)
            expected = sdxl_time_ids(original, ((height - 16) // 2, left), (16, 16))
            assert torch.equal(ids[None], expected), example
            mirrored.add(example.augmentation.mirrored)
    assert mirrored == ({False, True} if flip else {False})
    losses = [
        image_losses(base, encoder.latents, encoder.conditioning, [variant])
        for variant in (examples[0], replace(examples[0], framing=None))
    ]
    assert losses[0] != losses[1]
