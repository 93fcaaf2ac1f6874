"""The embedded base's denoiser, trained together with its text encoder on cached latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lora_engine.bases.tiny import world
from lora_engine.bases.tiny.fitting import Peers, Schedule, fit
from lora_engine.bases.tiny.text import (
    WIDTH,
    attribute_loss,
    build_heads,
    build_text_encoder,
    label_captions,
    tokenize,
)
from lora_engine.bases.tiny.vae import LATENT_CHANNELS, LATENT_SIZE

log = logging.getLogger(__name__)

_EMPTY_CAPTIONS = 0.1
_TEXT_WEIGHT = 0.02
_AVERAGING = 0.998


@dataclass(frozen=True)
class Denoiser:
    """A text encoder and the UNet that was trained with it."""

    text_encoder: Any
    unet: Any

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of both, text encoder first."""
        return [*self.text_encoder.parameters(), *self.unet.parameters()]


def build_unet() -> Any:
    """An untrained `UNet2DConditionModel` of two levels with cross-attention in each (4.3 million parameters)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )


def build_scheduler() -> Any:
    """DDIM, v-prediction, linear betas.

    The latents are strongly redundant: with Stable Diffusion's `scaled_linear` betas the mean colour would still be
    readable at the last timestep (signal-to-noise ratio 1.5), and sampling, which starts from pure noise, would begin
    with something that training never showed. Linear betas leave .013; `trailing` begins at that very timestep.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def train_denoiser(
    scenes: Sequence[world.Scene],
    latents: Tensor,
    tokenizer: Any,
    *,
    text_schedule: Schedule,
    schedule: Schedule,
    batch: int,
    seed: int,
    peers: Peers,
    save: Callable[[int, Denoiser], None],
) -> None:
    """Trains text encoder and UNet on cached latents; `save(step, averaged copy)` is called after each update on rank 0.

    The text encoder first learns alone to name the attributes of a caption, because a UNet on top of a text encoder that
    does not tell shapes apart never learns shapes. Then both learn to denoise: v-prediction, plain mean squared error over
    uniform timesteps, a tenth of the captions empty for classifier-free guidance. What is saved is the moving average.

    Args:
        scenes: What the latents show; captions are made anew in every step.
        latents: float [n, 16, 8, 8], scaled to unit deviation.
        tokenizer: The base's tokenizer.
        text_schedule: The text encoder alone.
        schedule: Both together.
        batch: Pictures per step and process.
        seed: Of the initial weights and, with the rank, of captions, noise and timesteps.
        peers: The processes that share the work.
        save: Decides by itself at which steps it writes.
    """
    torch.manual_seed(seed)
    network = Denoiser(build_text_encoder(tokenizer), build_unet())
    heads = build_heads(WIDTH)
    data = _Data(scenes, latents, tokenizer, batch, np.random.default_rng([seed, peers.rank]))

    def text_loss(step: int) -> Tensor:
        _, tokens, labels = data.draw()
        return attribute_loss(heads, network.text_encoder(tokens).pooler_output, labels)

    fit(
        "text encoder", [*network.text_encoder.parameters(), *heads.parameters()], text_loss, text_schedule, peers=peers
    )
    scheduler = build_scheduler()
    generator = torch.Generator().manual_seed(seed * 1000 + peers.rank)

    def loss(step: int) -> Tensor:
        chosen, tokens, labels = data.draw()
        empty = torch.rand(batch, generator=generator) < _EMPTY_CAPTIONS
        text = network.text_encoder(torch.where(empty[:, None], data.no_words, tokens))
        said = {name: torch.where(empty, -1, classes) for name, classes in labels.items()}
        noise = torch.randn(chosen.shape, generator=generator)
        times = torch.randint(0, 1000, (batch,), generator=generator)
        guess = network.unet(scheduler.add_noise(chosen, noise, times), times, text.last_hidden_state).sample
        error = F.mse_loss(guess, scheduler.get_velocity(chosen, noise, times))
        return error + _TEXT_WEIGHT * attribute_loss(heads, text.pooler_output, said)

    average = _Average(network)

    def after(step: int) -> None:
        if peers.rank == 0:
            average.update(step)
            save(step, average.copy)

    fit("unet", [*network.parameters(), *heads.parameters()], loss, schedule, peers=peers, after=after)


class _Data:
    """Batches of latents with freshly made captions."""

    def __init__(
        self, scenes: Sequence[world.Scene], latents: Tensor, tokenizer: Any, batch: int, rng: np.random.Generator
    ) -> None:
        self.scenes, self.latents, self.tokenizer, self.batch, self.rng = scenes, latents, tokenizer, batch, rng
        self.no_words = tokenize(tokenizer, [""])[0]

    def draw(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents, token ids and said attributes of one batch."""
        chosen = self.rng.integers(0, len(self.scenes), self.batch)
        scenes = [self.scenes[i] for i in chosen]
        captions = [world.caption(scene, self.rng) for scene in scenes]
        latents = self.latents[torch.from_numpy(chosen)].float()
        return latents, tokenize(self.tokenizer, captions)[0], label_captions(scenes, captions)


class _Average:
    """The exponential moving average of a network's weights, faster at the beginning."""

    def __init__(self, network: Denoiser) -> None:
        import copy

        self.network = network
        self.copy = Denoiser(*(copy.deepcopy(part).eval() for part in (network.text_encoder, network.unet)))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the present weights."""
        decay = min(_AVERAGING, (step + 1) / (step + 10))
        for mean, now in zip(self.copy.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
