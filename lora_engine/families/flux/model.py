"""Implements FLUX.1: pooled CLIP text, T5 states, packed latents, distilled guidance, flow matching.

Follows `FluxPipeline` of diffusers; a parity test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.flow import FlowModel
from lora_engine.bases.source import BaseSource

_T5_TOKENS = 512
TRAINING_GUIDANCE = 1.0
"""The default guidance scale of a network with distilled guidance, as in training."""


class Flux(FlowModel):
    """A transformer of packed latents, an autoencoder, a CLIP and a T5; see `BaseModel`."""

    distilled = True

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype, FluxTransformer2DModel)

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        del size
        pooled: Tensor = self.modules["text_encoder"](**self._tokens(texts, "", self.tokenizer)).pooler_output
        inputs = self._tokens(texts, "_2", self.tokenizer_2, _T5_TOKENS)
        states: Tensor = self.modules["text_encoder_2"](**inputs)[0]
        return Conditioning({"states": states.float(), "pooled": pooled.float()})

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`; the scale is `guidance` [n] of the conditioning, else `TRAINING_GUIDANCE`."""
        height, width = noisy.shape[2:]
        states = conditioning["states"].to(self.dtype)
        output: Tensor = self.denoiser(
            hidden_states=pack(noisy).to(self.dtype),
            timestep=timesteps.to(self.dtype) / self.noise.timesteps,
            guidance=self._guidance(conditioning, len(noisy)),
            pooled_projections=conditioning["pooled"].to(self.dtype),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self._positions(height // 2, width // 2),
            return_dict=False,
        )[0]
        return unpack(output, height, width).float()

    def _guidance(self, conditioning: Conditioning, count: int) -> Tensor | None:
        if not self.denoiser.config.guidance_embeds:
            return None
        scales = conditioning.tensors.get("guidance")
        return torch.full((count,), TRAINING_GUIDANCE, device=self.device) if scales is None else scales

    def _positions(self, height: int, width: int) -> Tensor:
        """Returns (0, row, column) of each token, [height * width, 3]."""
        rows = torch.arange(height, device=self.device, dtype=self.dtype).repeat_interleave(width)
        columns = torch.arange(width, device=self.device, dtype=self.dtype).repeat(height)
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=1)

    def _spacing(self, steps: int) -> dict[str, Any]:
        # As the pipeline: unshifted sigmas, evenly spaced from 1 to 1 / steps.
        if self._scheduler_settings.get("use_flow_sigmas"):
            return {"num_inference_steps": steps}
        return {"sigmas": np.linspace(1.0, 1.0 / steps, steps)}

    def _network_channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    def _load_text(self, source: BaseSource) -> None:
        self.tokenizer: Any = load_tokenizer(CLIPTokenizer, source, "tokenizer")
        self.tokenizer_2: Any = load_tokenizer(T5TokenizerFast, source, "tokenizer_2")
        for name, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)):
            self.modules[name] = load_component(cls, source, name, self.dtype).to(self.device)

    @property
    def _patch(self) -> int:
        return 2


def pack(latents: Tensor) -> Tensor:
    """Packs latents [n, c, h, w] into tokens of 2 x 2, [n, h/2 * w/2, 4c]: channel, row, column within a token."""
    n, channels, height, width = latents.shape
    cells = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens into latents of that height and width; the inverse of `pack`."""
    cells = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
