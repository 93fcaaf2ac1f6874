"""Implements Stable Diffusion XL: two text encoders, a pooled embedding and size conditioning.

Follows `StableDiffusionXLPipeline` of diffusers; a parity test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.long_text import StateChange, no_change
from lora_engine.bases.source import BaseSource
from lora_engine.families.sd.inpainting import InpaintingBase
from lora_engine.families.sd.model import StableDiffusion
from lora_engine.framing import Framing


class StableDiffusionXL(StableDiffusion):
    """A UNet with size conditioning, an autoencoder, CLIP and OpenCLIP text encoders; see `BaseModel`."""

    def tokenizers(self) -> Mapping[str, Any]:
        """See `ReadsTokens`."""
        return {"": self.tokenizer, "_2": self.tokenizer_2}

    def encode_tokens(
        self,
        tokens: Mapping[str, Mapping[str, Tensor]],
        size: tuple[int, int] | None = None,
        change: StateChange = no_change,
    ) -> Conditioning:
        """See `ReadsTokens`; original and target size are `size`, and the crop offset is 0 (see `with_framings`)."""
        states: list[Tensor] = []
        pooled = torch.empty(0)  # the second encoder's
        for suffix, inputs in tokens.items():
            output = self.modules[f"text_encoder{suffix}"](**inputs, output_hidden_states=True)
            states.append(change(suffix, output.hidden_states[-(self.options.clip_skip or 2)].float()))
            pooled = output[0].float()
        height, width = size or self.default_size
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return Conditioning(
            {"states": torch.cat(states, dim=-1), "pooled": pooled, "time_ids": ids.repeat(len(pooled), 1)}
        )

    def with_framings(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """See `BaseModel`: original size, top left corner and size of the crop, as diffusers' training scripts."""
        rows = [[*framing.original, framing.top, framing.left, *framing.size] for framing in framings]
        ids = torch.tensor(rows, dtype=torch.float32, device=self.device)
        return conditioning.with_tensors(Conditioning({"time_ids": ids}))

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`; an empty text is all zeros if the base has `force_zeros_for_empty_prompt`."""
        encoded = self.encode_text(texts, size)
        if not self._index.get("force_zeros_for_empty_prompt", True):
            return encoded
        is_filled = torch.tensor([bool(text) for text in texts], device=self.device)
        return Conditioning(
            {
                "states": torch.where(is_filled[:, None, None], encoded["states"], 0.0),
                "pooled": torch.where(is_filled[:, None], encoded["pooled"], 0.0),
                "time_ids": encoded["time_ids"],
            }
        )

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return {"text_embeds": conditioning["pooled"].to(self.dtype), "time_ids": conditioning["time_ids"]}

    def _load_text(self, source: BaseSource) -> None:
        super()._load_text(source)
        self.tokenizer_2 = load_tokenizer(CLIPTokenizer, source, "tokenizer_2")
        second = load_component(CLIPTextModelWithProjection, source, "text_encoder_2", self.dtype)
        self.modules["text_encoder_2"] = second.to(self.device)


class InpaintingXL(InpaintingBase, StableDiffusionXL):
    """A `StableDiffusionXL` with the mask of `InpaintingBase`."""
