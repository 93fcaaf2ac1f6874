"""Implements Stable Diffusion 3 and 3.5: two CLIPs and an optional T5, joint attention, flow matching.

Follows `StableDiffusion3Pipeline` of diffusers; a parity test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.flow import FlowModel
from lora_engine.bases.source import BaseSource

_T5_TOKENS = 256


class StableDiffusion3(FlowModel):
    """A transformer with joint attention, an autoencoder, two CLIPs and a T5; see `BaseModel`."""

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype, SD3Transformer2DModel)

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`; without a T5, its part of the states is zero."""
        del size
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        for suffix, tokenizer in (("", self.tokenizer), ("_2", self.tokenizer_2)):
            encoder = self.modules[f"text_encoder{suffix}"]
            output = encoder(**self._tokens(texts, suffix, tokenizer), output_hidden_states=True)
            states.append(output.hidden_states[-2].float())
            pooled.append(output[0].float())
        clip, t5 = torch.cat(states, dim=-1), self._t5_states(texts)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return Conditioning({"states": torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)})

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`."""
        output: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["states"].to(self.dtype),
            pooled_projections=conditioning["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return output.float()

    def _t5_states(self, texts: Sequence[str]) -> Tensor:
        if "text_encoder_3" not in self.modules:
            width = int(self.denoiser.config.joint_attention_dim)
            return torch.zeros(len(texts), _T5_TOKENS, width, device=self.device)
        inputs = self._tokens(texts, "_3", self.tokenizer_3, _T5_TOKENS)
        states: Tensor = self.modules["text_encoder_3"](**inputs)[0]
        return states.float()

    def _load_text(self, source: BaseSource) -> None:
        self.tokenizer: Any = load_tokenizer(CLIPTokenizer, source, "tokenizer")
        self.tokenizer_2: Any = load_tokenizer(CLIPTokenizer, source, "tokenizer_2")
        classes = {"text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection}
        if "text_encoder_3" in source.layout.variants:
            self.tokenizer_3: Any = load_tokenizer(T5TokenizerFast, source, "tokenizer_3")
            classes["text_encoder_3"] = T5EncoderModel
        for name, cls in classes.items():
            self.modules[name] = load_component(cls, source, name, self.dtype).to(self.device)

    @property
    def _patch(self) -> int:
        return int(self.denoiser.config.patch_size)
