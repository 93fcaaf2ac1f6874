"""Trains the diffusion model of the embedded base: U-Net and text encoder together, in two processes."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import read_safetensors
from tools.tiny_base.assembly import SCHEDULE
from tools.tiny_base.autoencoder import LATENTS, SCENES_SEED
from tools.tiny_base.captions import caption
from tools.tiny_base.clip import text_settings
from tools.tiny_base.images import label
from tools.tiny_base.peers import average_gradients, join
from tools.tiny_base.stage import BuildSettings, anneal, encode, replace_folder
from tools.tiny_base.tokenizer import load_tokenizer
from tools.tiny_base.world import ATTRIBUTES, scenes

FINISHED = "diffusion.json"

_log = logging.getLogger(__name__)

_BATCH, _RATE = 24, 1.3e-3
_TEXT_BATCH, _TEXT_RATE = 64, 2e-3
_EMPTY_SHARE = 0.1
_ATTRIBUTE_WEIGHT = 0.02
_CLIP_NORM = 1.0
_DECAY = 0.998
_SAVE_EVERY = 300


class DiffusionModel(nn.Module):
    """U-Net, text encoder, and heads that classify attributes from a text embedding (for training only)."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        # The order matters: all draw their initial weights from the same generator.
        self.text_encoder: Any = CLIPTextModel(CLIPTextConfig(**text_settings()))
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words) + 1) for name, words in ATTRIBUTES.items()})
        self.unet: Any = UNet2DConditionModel(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=16,
            cross_attention_dim=128,
        )

    def attribute_loss(self, pooled: Tensor, classes: dict[str, Tensor]) -> Tensor:
        """Returns the summed cross-entropy of the attributes in the captions; class -1 (absent) is ignored."""
        losses = [
            F.cross_entropy(head(pooled), classes[name], ignore_index=-1)
            for name, head in self.heads.items()
            if bool((classes[name] >= 0).any())
        ]
        return torch.stack(losses).sum()


class Batches:
    """Random batches of latents, captions and their classes; each process has its own order.

    Args:
        work: The folder with `tokenizer/` and the latents of the training scenes.
        count: Number of training scenes.
        rank: Rank of the process.
    """

    def __init__(self, work: Path, count: int, rank: int) -> None:
        self.tokenizer = load_tokenizer(work / "tokenizer")
        self.latents = read_safetensors(work / LATENTS)[0]["latents"].float()
        self.rng = np.random.default_rng(100 + rank)
        self.noise = torch.Generator().manual_seed(200 + rank)
        self._scenes = scenes(SCENES_SEED, count)
        self._classes = label(self._scenes)

    def draw(self, size: int) -> tuple[NDArray[np.int64], Tensor, dict[str, Tensor]]:
        """Draws rows of scenes, token ids of their captions, and the classes that the captions name (others are -1)."""
        rows = self.rng.integers(0, len(self._scenes), size)
        texts = [caption(self._scenes[row], self.rng) for row in rows]
        return rows, encode(self.tokenizer, texts)[0], self._named_classes(rows, texts)

    def _named_classes(self, rows: NDArray[np.int64], texts: Sequence[str]) -> dict[str, Tensor]:
        # The background never has the object's color, so a color word in a caption is unambiguous.
        words = [set(text.replace(",", "").split()) for text in texts]
        classes = {}
        for name in ATTRIBUTES:
            is_named = [
                getattr(self._scenes[row], name) in caption_words
                for row, caption_words in zip(rows, words, strict=True)
            ]
            classes[name] = torch.where(torch.tensor(is_named), self._classes[name][torch.from_numpy(rows)], -1)
        return classes


def train(work: Path, settings: BuildSettings) -> None:
    """Runs one of the two processes of the training; see `peers`.

    Needs `tokenizer/` and the latents in `work`. Rank 0 writes `unet/` and `text_encoder/` (moving averages) there,
    every 300 steps and at the end, and then `diffusion.json`.
    """
    with join(work) as rank:
        torch.manual_seed(3)
        model, batches = DiffusionModel(), Batches(work, settings.scenes, rank)
        _train_text(model, batches, settings.text_steps)
        _train_all(model, batches, settings.diffusion_steps, work if rank == 0 else None)


def _train_text(model: DiffusionModel, batches: Batches, steps: int) -> None:
    # With a trained text encoder, the U-Net gets useful conditioning from its first step.
    parameters = [*model.text_encoder.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_TEXT_RATE, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        anneal(optimizer, _TEXT_RATE, step, steps)
        _, ids, classes = batches.draw(_TEXT_BATCH)
        loss = model.attribute_loss(model.text_encoder(ids).pooler_output, classes)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(parameters)
        optimizer.step()
    _log.info("text encoder: %d steps done, loss %.4f", steps, loss.item())


def _train_all(model: DiffusionModel, batches: Batches, steps: int, work: Path | None) -> None:
    # Parameters and averages have the same order.
    parameters = [*model.unet.parameters(), *model.text_encoder.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    averages = [parameter.detach().clone() for parameter in parameters]
    schedule = _noise_schedule()
    for step in range(steps):
        anneal(optimizer, _RATE, step, steps, warmup=60)
        error, attribute_loss = _losses(model, batches, schedule)
        optimizer.zero_grad()
        torch.autograd.backward(error + _ATTRIBUTE_WEIGHT * attribute_loss)
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], weight)
        if work is None:
            continue
        if step % 50 == 0:
            _log.info("diffusion: step %d of %d, error %.4f", step, steps, error.item())
        if step % _SAVE_EVERY == _SAVE_EVERY - 1 or step == steps - 1:
            _save(model, averages, work)
    if work is not None:
        atomic_write(work / FINISHED, json.dumps({"steps": steps}).encode())


def _losses(model: DiffusionModel, batches: Batches, schedule: Any) -> tuple[Tensor, Tensor]:
    rows, ids, classes = batches.draw(_BATCH)
    output = model.text_encoder(ids)
    states = output.last_hidden_state
    empty = torch.from_numpy(batches.rng.random(_BATCH) < _EMPTY_SHARE)
    if bool(empty.any()):
        # For classifier-free guidance, which needs predictions without a prompt.
        empty_states = model.text_encoder(encode(batches.tokenizer, [""])[0]).last_hidden_state
        states = torch.where(empty[:, None, None], empty_states, states)
    latents = batches.latents[torch.from_numpy(rows)]
    noise = torch.randn(latents.shape, generator=batches.noise)
    times = torch.randint(0, 1000, (_BATCH,), generator=batches.noise)
    velocity = model.unet(schedule.add_noise(latents, noise, times), times, states).sample
    error = F.mse_loss(velocity, schedule.get_velocity(latents, noise, times))
    return error, model.attribute_loss(output.pooler_output, classes)


def _noise_schedule() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**SCHEDULE)


def _save(model: DiffusionModel, averages: Sequence[Tensor], work: Path) -> None:
    averaged = copy.deepcopy(model)
    parameters = [*averaged.unet.parameters(), *averaged.text_encoder.parameters(), *averaged.heads.parameters()]
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.data.copy_(average)
    replace_folder(work / "unet", averaged.unet.save_pretrained)
    replace_folder(work / "text_encoder", averaged.text_encoder.save_pretrained)
