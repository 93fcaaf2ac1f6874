"""Implements Z-Image: Qwen3 text without padding, one stream of image and text tokens, flow matching.

Follows `ZImagePipeline` of diffusers; a parity test compares the two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Model

from lora_engine.bases.components import load_component, load_tokenizer
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.flow import FlowModel
from lora_engine.bases.source import BaseSource

TOKENS = 512
_log = logging.getLogger(__name__)


class ZImage(FlowModel):
    """A transformer of one stream, an autoencoder and a Qwen3; see `BaseModel`."""

    def __init__(self, source: BaseSource, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype, ZImageTransformer2DModel)

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`; `states` [n, TOKENS, width] are zero after the first `lengths` [n] tokens."""
        del size
        prompts = [self._prompt(text) for text in texts]
        inputs = self.tokenizer(
            prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(self.device)
        for text, ids in zip(texts, self.tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > TOKENS:
                _log.warning("the text %r has %d tokens; the base reads the first %d", text[:80], len(ids), TOKENS)
        mask = inputs.attention_mask.bool()
        output = self.modules["text_encoder"](
            input_ids=inputs.input_ids, attention_mask=mask, output_hidden_states=True
        )
        states = torch.zeros_like(output.hidden_states[-2], dtype=torch.float32)
        lengths = mask.sum(dim=1)
        for row, (own, length) in enumerate(zip(mask, lengths.tolist(), strict=True)):
            states[row, :length] = output.hidden_states[-2][row, own].float()
        return Conditioning({"states": states, "lengths": lengths})

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`; the network counts time from noise to image, and predicts in that direction."""
        states, lengths = conditioning["states"].to(self.dtype), conditioning["lengths"].tolist()
        output: list[Tensor] = self.denoiser(
            list(noisy.to(self.dtype).unsqueeze(2)),
            ((self.noise.timesteps - timesteps) / self.noise.timesteps).to(torch.float32),
            [row[:length] for row, length in zip(states, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(output)).squeeze(2).float()

    def _prompt(self, text: str) -> str:
        prompt: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return prompt

    def _spacing(self, steps: int) -> dict[str, Any]:
        # As the pipeline: unshifted sigmas, evenly spaced from 1 to 1 / steps.
        return {"sigmas": np.linspace(1.0, 1.0 / steps, steps)}

    def _load_text(self, source: BaseSource) -> None:
        self.tokenizer: Any = load_tokenizer(AutoTokenizer, source, "tokenizer")
        self.modules["text_encoder"] = load_component(Qwen3Model, source, "text_encoder", self.dtype).to(self.device)

    @property
    def _patch(self) -> int:
        return int(self.denoiser.config.all_patch_size[0])
