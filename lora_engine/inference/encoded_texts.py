"""Encodes the texts of a prompt over the denoising steps, before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_engine.bases.base import BaseModel, full_mask_conditioning
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.long_text import count_chunks, encode_divided
from lora_engine.errors import SettingsError
from lora_engine.inference.generate import Guidance
from lora_engine.inference.prompts.prompt import ParsedPrompt, chunks_of, is_unweighted, plain_text


class EncodedTexts:
    """The encoded texts of a prompt over the steps, with the weights that the text encoders have when it is created.

    Args:
        base: The model.
        prompt: The prompt.
        negative: The negative prompt; unused without guidance.
        size: (height, width) of the images in pixels.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        mask: The mask of an inpainting base, one row.
        is_enlarged: See `texts_by_step`.

    Raises:
        SettingsError: The base cannot read weights of words, BREAK or AND.
    """

    def __init__(
        self,
        base: BaseModel,
        prompt: ParsedPrompt,
        negative: ParsedPrompt,
        *,
        size: tuple[int, int],
        steps: int,
        guidance: float,
        mask: Conditioning | None,
        is_enlarged: bool = False,
    ) -> None:
        self._base, self._size, self._scale, self._mask = base, size, guidance, mask
        self._weights = tuple(part.weight for part in prompt.parts)
        is_guided = not base.distilled and (guidance > 1.0 or self._weights != (1.0,))
        if base.distilled and self._weights != (1.0,):
            raise SettingsError(
                f"AND needs a negative prediction, and {base.name!r} has distilled guidance",
                remedy="write the prompt without AND",
            )
        parts = (*(negative.parts if is_guided else ()), *prompt.parts)
        self._parts = [part.by_step(steps, is_enlarged=is_enlarged) for part in parts]
        self._is_guided = is_guided
        every = {text for part in self._parts for _, text in part}
        chunks = max(count_chunks(base, chunks_of(text)) for text in every)
        is_simple = chunks == 1 and all(is_unweighted(text) for text in every)
        self._encoded: dict[tuple[bool, str], Conditioning] = {}
        for index, part in enumerate(self._parts):
            is_negative = is_guided and index == 0
            for _, text in part:
                if (is_negative, text) not in self._encoded:
                    encode = self._encode_simple if is_simple else self._encode_chunks
                    self._encoded[is_negative, text] = encode(text, is_negative=is_negative, chunks=chunks)

    def guidance(self, step: int, rows: int) -> Guidance:
        """Returns the rows of a step (from 0) for a number of images."""
        conditions = [
            self._encoded[self._is_guided and index == 0, _text_at(part, step + 1)].index([0] * rows)
            for index, part in enumerate(self._parts)
        ]
        condition = Conditioning.cat(conditions)
        if self._mask is None:
            condition = full_mask_conditioning(self._base, condition, self._size)
        else:
            condition = condition.with_tensors(self._mask.index([0] * len(condition)))
        if self._base.distilled:
            scales = torch.full((rows,), self._scale, dtype=torch.float32, device=self._base.device)
            condition = condition.with_tensors(Conditioning({"guidance": scales}))
        return Guidance(condition, self._weights)

    def _encode_simple(self, text: str, *, is_negative: bool, chunks: int) -> Conditioning:
        del chunks
        encode = self._base.encode_negative if is_negative else self._base.encode_text
        return encode([plain_text(text)], self._size)

    def _encode_chunks(self, text: str, *, is_negative: bool, chunks: int) -> Conditioning:
        if is_negative and not text:
            # Some families have zeros for an empty negative prompt.
            empty = self._base.encode_negative([""], self._size)
            return empty.with_tensors(Conditioning({"states": empty["states"].repeat(1, chunks, 1)}))
        return encode_divided(self._base, [chunks_of(text)], self._size, chunks=chunks)


def _text_at(part: Sequence[tuple[int, str]], step: int) -> str:
    return next(text for last, text in part if step <= last)
