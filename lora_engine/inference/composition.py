"""Draws images from a prompt that was read: adapters with weights over steps and blocks, and texts that change.

Texts are encoded once, before the first step, with the text encoders' weights of that step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.adapters.attachment import Attachment, attach, check_fit
from lora_engine.adapters.layer import meta_weight
from lora_engine.adapters.merged_weights import MergedWeights, can_merge
from lora_engine.bases.base import BaseModel, full_mask_conditioning
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.long_text import count_chunks, encode_divided
from lora_engine.errors import SettingsError
from lora_engine.formats import Bundle
from lora_engine.inference import ComposedEngine
from lora_engine.inference.generate import Guidance, OnStep, draw_noise, ignore_step, sample
from lora_engine.inference.prompts.blocks import fits_family, weight_of_module
from lora_engine.inference.prompts.prompt import ParsedPrompt, chunks_of, is_unweighted, plain_text
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.source_image import SourceImage
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress


class Composition:
    """Adapters on a base whose weights follow the tags of a prompt. Created by `compose`.

    Args:
        family: Family of the base.
        tags: The tags, one per adapter.
        merged: What of the adapters is merged into the base's weights; None if nothing is.
        attached: What of each adapter is attached, by its number.
    """

    def __init__(
        self, family: str, tags: Sequence[AdapterTag], merged: MergedWeights | None, attached: Mapping[int, Attachment]
    ) -> None:
        self._family, self._tags, self._merged, self._attached = family, tags, merged, attached
        self._weights: list[tuple[float, float]] = []

    def set_step(self, step: int, steps: int) -> None:
        """Sets the weights of all adapters for a step, from 0."""
        weights = [(tag.text_encoder.at(0, steps), tag.denoiser_weight(step, steps)) for tag in self._tags]
        if weights == self._weights:
            return
        self._weights = weights
        if self._merged is not None:
            self._merged.set_multipliers(self._weight_of)
        for index, attachment in self._attached.items():
            attachment.set_multipliers(partial(self._weight_of, index))

    def _weight_of(self, index: int, module: str) -> float:
        tag, (texts, images) = self._tags[index], self._weights[index]
        block = 1.0 if tag.blocks is None else weight_of_module(module, tag.blocks, self._family)
        return block * (texts if module.startswith("text_encoder") else images)


@contextmanager
def compose(
    base: BaseModel, adapters: Sequence[tuple[AdapterTag, Bundle]], *, engine: ComposedEngine = "auto"
) -> Iterator[Composition]:
    """Puts adapters and their learned tokens on a base while the context is open; then the base is as it was.

    Args:
        base: The model.
        adapters: Tags and adapters.
        engine: `merged` computes the weights of the base with all adapters, from kept ones, when a weight of a tag
            changes; drawing then costs what it costs without adapters. `attached` adds each difference to the outputs,
            which costs less if the weights change with every step and images are small, and keeps differences that are
            finer than 16-bit weights. `auto` merges into weights of 32 bits and attaches to others. Quantized weights
            are never merged.

    Raises:
        SettingsError: Block weights are of another family.
        AdapterError: An adapter does not fit the base, or two have the same learned token; the base is unchanged.
    """
    for tag, _ in adapters:
        if tag.blocks is not None and not fits_family(tag.blocks, base.family):
            raise SettingsError(
                f"the block weights of {tag.name!r} are not for a base of the family {base.family!r}",
                allowed="12, 17, 20 or 26 values for U-Nets (sd, sdxl), 61 for flux",
            )
    bundles = [bundle for _, bundle in adapters]
    for bundle in bundles:
        if bundle.adapter.modules:
            check_fit(base, bundle.adapter)
    merges = [[name for name in bundle.adapter.modules if _merges(base, name, engine)] for bundle in bundles]
    with ExitStack() as stack:
        merged = None
        if any(merges):
            parts = [_part(bundle, names) for bundle, names in zip(bundles, merges, strict=True)]
            merged = stack.enter_context(MergedWeights(base, parts))
        rest = {
            index: _part(bundle, set(bundle.adapter.modules) - set(merges[index]))
            for index, bundle in enumerate(bundles)
        }
        attached = {index: stack.enter_context(attach(base, part)) for index, part in rest.items() if part.modules}
        # After the last adapter and all at once: they wrap the input embedding.
        embeddings = [embedding for bundle in bundles for embedding in bundle.embeddings]
        stack.enter_context(attach_embeddings(base, embeddings))
        yield Composition(base.family, [tag for tag, _ in adapters], merged, attached)


def _merges(base: BaseModel, module: str, engine: ComposedEngine) -> bool:
    layer = base.get_module(module)
    if engine == "attached" or not can_merge(layer):
        return False
    return engine == "merged" or meta_weight(layer).element_size() >= 4


def _part(bundle: Bundle, names: Collection[str]) -> Adapter:
    adapter = bundle.adapter
    return replace(adapter, modules={name: delta for name, delta in adapter.modules.items() if name in names})


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
    source: SourceImage | None = None,
    noise: Tensor | None = None,
    progress: Progress = no_progress,
    on_step: OnStep = ignore_step,
) -> Tensor:
    """Generates one image per seed; see `generate`.

    Args:
        base: The model, with the adapters of the composition.
        prompt: The prompt.
        composition: The adapters.
        negative: The negative prompt; unused without guidance.
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 or less is none, unless AND divides the prompt.
        height: In pixels; None takes the base's default.
        width: In pixels; None takes the base's default.
        batch: Images per batch.
        sampler: See `find_sampler`; None is the base's own.
        source: An image of that size to start from; None starts from noise.
        noise: Standard normal noise, one row per image; None draws it from the seeds.
        progress: Called after each batch.
        on_step: Called after each step of each batch.

    Returns:
        float32 [n, 3, height, width] in [-1, 1], on the CPU.

    Raises:
        SettingsError: The base cannot generate the size, or cannot read weights of words, BREAK or AND.
    """
    size = (height or base.default_size[0], width or base.default_size[1])
    shape = base.latent_shape(size)
    composition.set_step(0, steps)
    mask = None if source is None else source.conditioning(base)
    texts = _Texts(base, prompt, negative, size=size, steps=steps, guidance=guidance, mask=mask)
    images: list[Tensor] = []
    for first in range(0, len(seeds), batch):
        chosen = seeds[first : first + batch]
        drawn = torch.stack([draw_noise(shape, seed) for seed in chosen]) if noise is None else noise[first:][:batch]

        def guide(step: int, rows: int = len(chosen)) -> Guidance:
            composition.set_step(step, steps)
            return texts.guidance(step, rows)

        start = None if source is None else source.start(base, len(chosen))
        latents = sample(
            base,
            drawn.to(base.device),
            guide,
            seeds=chosen,
            steps=steps,
            scale=guidance,
            size=size,
            sampler=sampler,
            start=start,
            on_step=on_step,
        )
        pixels = base.decode_latents(latents).clamp(-1.0, 1.0).float().cpu()
        images.append(pixels if source is None else source.keep_unmasked(pixels))
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
        mask: Conditioning | None,
    ) -> None:
        self._base, self._size, self._scale, self._mask = base, size, guidance, mask
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
