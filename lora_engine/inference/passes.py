"""The predictions of one denoising step: one per region of the image, and with and without guided adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.inference.composition import Composition
from lora_engine.inference.encoded_texts import EncodedTexts
from lora_engine.inference.generate import Guide
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.regions import Area, blend_weights


@dataclass(frozen=True)
class _Pass:
    """One prediction: its texts, the adapters that act in it, and its weight, [1, 1, height, width] or a number."""

    texts: EncodedTexts
    active: frozenset[int]
    weight: Tensor | float


class Passes:
    """The predictions of each step of a set of images.

    Args:
        base: The model, with the adapters of the composition.
        composition: The adapters; those that only regions name act in these.
        prompt: The prompt of what no region covers.
        negative: The negative prompt, of regions, too.
        areas: The regions.
        size: (height, width) of the images in pixels.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        mask: The mask of an inpainting base, one row.
        is_enlarged: True for the pass over enlarged images.

    Raises:
        SettingsError: The base cannot generate the size, or cannot read weights of words, BREAK or AND.
    """

    def __init__(
        self,
        base: BaseModel,
        composition: Composition,
        prompt: ParsedPrompt,
        negative: ParsedPrompt,
        *,
        areas: Sequence[Area],
        size: tuple[int, int],
        steps: int,
        guidance: float,
        mask: Conditioning | None,
        is_enlarged: bool,
    ) -> None:
        self._composition, self._steps, self._is_enlarged = composition, steps, is_enlarged
        of_areas = [composition.numbers_of(area.prompt.adapters) for area in areas]
        shared = composition.numbers - frozenset().union(*of_areas) | composition.numbers_of(prompt.adapters)
        drawn: list[tuple[ParsedPrompt, frozenset[int], Tensor | None]] = [(prompt, shared, None)]
        if areas:
            weights = blend_weights([area.cover for area in areas], base.latent_shape(size)[1:])
            prompts = [
                (prompt, shared),
                *((area.prompt, shared | own) for area, own in zip(areas, of_areas, strict=True)),
            ]
            drawn = [
                # A weight of 1 everywhere multiplies nothing, so that the prediction keeps its bits.
                (text, active, None if bool((weight == 1.0).all()) else weight.to(base.device))
                for (text, active), weight in zip(prompts, weights, strict=True)
                if bool(weight.any())
            ]
        self._passes: list[_Pass] = []
        for text, active, weight in drawn:
            for acting, factor in _guided(composition.tags, active):
                composition.set_step(0, steps, active=acting, is_enlarged=is_enlarged)
                texts = EncodedTexts(
                    base,
                    text,
                    negative,
                    size=size,
                    steps=steps,
                    guidance=guidance,
                    mask=mask,
                    is_enlarged=is_enlarged,
                )
                self._passes.append(_Pass(texts, acting, factor if weight is None else factor * weight))

    def at(self, step: int, rows: int) -> Guide:
        """Returns what predicts a step (from 0) of that many images."""
        return _StepGuide(self, step, rows)

    def predict(
        self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float, *, step: int, rows: int
    ) -> Tensor:
        """Returns the weighted sum of all predictions of a step; see `Guide.predict`."""
        total: Tensor | None = None
        for one in self._passes:
            self._composition.set_step(step, self._steps, active=one.active, is_enlarged=self._is_enlarged)
            predicted = one.texts.guidance(step, rows).predict(base, latents, timestep, scale)
            if not isinstance(one.weight, float) or one.weight != 1.0:
                predicted = one.weight * predicted
            total = predicted if total is None else total + predicted
        assert total is not None
        return total


@dataclass(frozen=True)
class _StepGuide:
    """One step of `Passes`."""

    passes: Passes
    step: int
    rows: int

    def predict(self, base: BaseModel, latents: Tensor, timestep: Tensor, scale: float) -> Tensor:
        """Returns the prediction; see `Guide.predict`."""
        return self.passes.predict(base, latents, timestep, scale, step=self.step, rows=self.rows)


def _guided(tags: Sequence[AdapterTag], active: frozenset[int]) -> list[tuple[frozenset[int], float]]:
    """Returns sets of acting adapters and the factors of their predictions, which sum to 1.

    With p(S) for the prediction with the adapters S, B for those without a scale of their own, and G for each group of
    adapters with an equal scale a: p(B) + sum of a * (p(B and G) - p(B)).
    """
    groups: dict[float, set[int]] = {}
    for number in active:
        scale = tags[number].guidance
        if scale is not None and scale != 1.0:
            groups.setdefault(scale, set()).add(number)
    plain = active - frozenset().union(*groups.values())
    sets = [(plain, 1.0 - sum(groups)), *((plain | group, scale) for scale, group in sorted(groups.items()))]
    return [(acting, factor) for acting, factor in sets if factor != 0.0]
