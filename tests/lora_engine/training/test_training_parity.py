"""A step's loss and gradients against the reference scripts of diffusers, on the same batch, noise and timesteps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.denoising import predict
from lora_engine.training.losses import DenoisingLoss, PriorLoss

SHAPES = ["small-sd", "small-sd-v", "small-sdxl"]


def batch_for(base: BaseModel, instances: int) -> Batch:
    draw = generator(0, "parity")
    latents, noise = (torch.randn(4, *base.latent_shape((16, 16)), generator=draw) for _ in range(2))
    timesteps = torch.tensor([0, 250, 700, 999])
    with torch.no_grad():
        conditioning = base.encode_text(["a", "b", "c", ""], (16, 16))
    return Batch(latents, noise, timesteps, conditioning, instances)


def reference_loss(base: BaseModel, folder: Path, batch: Batch, prior: float | None) -> Tensor:
    # train_dreambooth_lora.py of diffusers 0.42.
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    added: dict[str, Any] = {}
    if base.family == "sdxl":
        added["added_cond_kwargs"] = {
            "text_embeds": batch.conditioning["pooled"],
            "time_ids": batch.conditioning["time_ids"],
        }
    predicted = base.modules["unet"](noisy, batch.timesteps, batch.conditioning["states"], **added).sample
    if scheduler.config.prediction_type == "epsilon":
        target = batch.noise
    else:
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    if prior is None:
        return F.mse_loss(predicted.float(), target.float(), reduction="mean")
    predicted, predicted_prior = torch.chunk(predicted, 2, dim=0)
    target, target_prior = torch.chunk(target, 2, dim=0)
    prior_loss = F.mse_loss(predicted_prior.float(), target_prior.float(), reduction="mean")
    loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
    return loss + prior * prior_loss


@pytest.mark.parametrize("prior", [None, 1.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_match_the_reference_step(bases: dict[str, Path], shape: str, prior: float | None) -> None:
    base = load_base(str(bases[shape]), device="cpu")
    adapter = create_adapter(base, "all", "lora", 2, None, generator=generator(0, "factors"))
    batch = batch_for(base, instances=4 if prior is None else 2)
    with attach(base, adapter, trainable=True) as attachment:
        with torch.no_grad():
            for value in attachment.parameters():
                value.add_(0.05)
        terms = [DenoisingLoss()] if prior is None else [DenoisingLoss(), PriorLoss(prior)]
        losses, gradients = [], []
        own_loss = torch.stack([term(*predict(base, batch), batch) for term in terms]).sum()
        for loss in (own_loss, reference_loss(base, bases[shape], batch, prior)):
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, attachment.parameters()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
