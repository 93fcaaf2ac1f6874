"""Draws images from a prompt that was read: adapters with weights over steps and blocks, and texts that change.

Texts are encoded once, before the first step, with the text encoders' weights of that step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lora_engine.adapters.attachment import Attachment, attach
from lora_engine.bases.base import BaseModel, full_mask_conditioning
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.long_text import count_chunks, encode_divided
from lora_engine.errors import SettingsError
from lora_engine.formats import Bundle
from lora_engine.inference.generate import Guidance, draw_noise, sample
from lora_engine.inference.prompts.blocks import fits_family, weight_of_module
from lora_engine.inference.prompts.prompt import ParsedPrompt, chunks_of, is_unweighted, plain_text
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress


class Composition:
    """Attached adapters whose weights follow the tags of a prompt. Created by `compose`.

    Args:
        base: The model.
        attached: The tags with their attached adapters; None for a file of learned tokens alone.
    """

    def __init__(self, base: BaseModel, attached: Sequence[tuple[AdapterTag, Attachment | None]]) -> None:
        self._family = base.family
        self._attached = [(tag, attachment) for tag, attachment in attached if attachment is not None]
        self._weights: dict[int, tuple[float, float]] = {}

    def set_step(self, step: int, steps: int) -> None:
        """Sets the weights of all adapters for a step, from 0."""
        for index, (tag, attachment) in enumerate(self._attached):
            text_encoder, denoiser = tag.text_encoder.at(0, steps), tag.denoiser_weight(step, steps)
            if self._weights.get(index) == (text_encoder, denoiser):
                continue
            self._weights[index] = text_encoder, denoiser

            def weight_of(
                module: str, tag: AdapterTag = tag, texts: float = text_encoder, images: float = denoiser
            ) -> float:
                block = 1.0 if tag.blocks is None else weight_of_module(module, tag.blocks, self._family)
                return block * (texts if module.startswith("text_encoder") else images)

            attachment.set_multipliers(weight_of)


@contextmanager
def compose(base: BaseModel, adapters: Sequence[tuple[AdapterTag, Bundle]]) -> Iterator[Composition]:
    """Attaches adapters and their learned tokens while the context is open.

    Raises:
        SettingsError: Block weights are of another family.
        AdapterError: An adapter does not fit the base, or two have the same learned token; nothing stays attached.
    """
    for tag, _ in adapters:
        if tag.blocks is not None and not fits_family(tag.blocks, base.family):
            raise SettingsError(
                f"the block weights of {tag.name!r} are not for a base of the family {base.family!r}",
                allowed="12, 17, 20 or 26 values for U-Nets (sd, sdxl), 61 for flux",
            )
    with ExitStack() as stack:
        attached = [
            (tag, stack.enter_context(attach(base, bundle.adapter)) if bundle.adapter.modules else None)
            for tag, bundle in adapters
        ]
        # After the last adapter and all at once: they wrap the input embedding.
        embeddings = [embedding for _, bundle in adapters for embedding in bundle.embeddings]
        stack.enter_context(attach_embeddings(base, embeddings))
        yield Composition(base, attached)


@torch.no_grad()
def generate_composed(
    base: BaseModel,
    prompt: ParsedPrompt,
    composition: Composition,
    *,
    negative: ParsedPrompt,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    sampler: str | None = None,
    progress: Progress = no_progress,
) -> Tensor:
    """Generates one image per seed; see `generate`.

    Args:
        base: The model, with the adapters of the composition attached.
        prompt: The prompt.
        composition: The attached adapters.
        negative: The negative prompt; unused without guidance.
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 or less is none, unless AND divides the prompt.
        height: In pixels; None takes the base's default.
        width: In pixels; None takes the base's default.
        batch: Images per batch.
        sampler: See `find_sampler`; None is the base's own.
        progress: Called after each batch.

    Returns:
        float32 [n, 3, height, width] in [-1, 1], on the CPU.

    Raises:
        SettingsError: The base cannot generate the size, or cannot read weights of words, BREAK or AND.
    """
    size = (height or base.default_size[0], width or base.default_size[1])
    shape = base.latent_shape(size)
    composition.set_step(0, steps)
    texts = _Texts(base, prompt, negative, size=size, steps=steps, guidance=guidance)
    images: list[Tensor] = []
    for first in range(0, len(seeds), batch):
        chosen = seeds[first : first + batch]
        noise = torch.stack([draw_noise(shape, seed) for seed in chosen]).to(base.device)

        def guide(step: int, rows: int = len(chosen)) -> Guidance:
            composition.set_step(step, steps)
            return texts.guidance(step, rows)

        latents = sample(base, noise, guide, seeds=chosen, steps=steps, scale=guidance, size=size, sampler=sampler)
        images.append(base.decode_latents(latents).clamp(-1.0, 1.0).float().cpu())
        progress(min(first + batch, len(seeds)), len(seeds), {})
    return torch.cat(images) if images else torch.empty(0, 3, *size)


class _Texts:
    """The encoded texts of a prompt over the steps."""

    def __init__(
        self,
        base: BaseModel,
        prompt: ParsedPrompt,
        negative: ParsedPrompt,
        *,
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> None:
        self._base, self._size, self._scale, self._steps = base, size, guidance, steps
        self._weights = tuple(part.weight for part in prompt.parts)
        is_guided = not base.distilled and (guidance > 1.0 or self._weights != (1.0,))
        if base.distilled and self._weights != (1.0,):
            raise SettingsError(
                f"AND needs a negative prediction, and {base.name!r} has distilled guidance",
                remedy="write the prompt without AND",
            )
        self._parts = [part.by_step(steps) for part in (*(negative.parts if is_guided else ()), *prompt.parts)]
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
        condition = full_mask_conditioning(self._base, Conditioning.cat(conditions), self._size)
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
