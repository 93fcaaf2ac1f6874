"""Writes adapter tags and whole prompts, the inverse of `parse_prompt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.blocks import LISTS
from lora_engine.inference.prompts.step_weights import StepWeights
from lora_engine.inference.prompts.tags import AdapterTag


def write_prompt(text: str, adapters: Iterable[AdapterTag]) -> str:
    """Returns a prompt with its adapters in A1111's syntax; `parse_prompt` reads the same text and adapters from it."""
    return " ".join([text, *map(write_tag, adapters)]).strip()


def write_tag(tag: AdapterTag) -> str:
    """Returns an adapter as `<lora:NAME:WEIGHT>`, with named arguments where one number does not say it.

    Raises:
        SettingsError: The blocks are no list of the block-weight extension.
    """
    if _is_weight_one(tag.denoiser) and _is_weight_one(tag.text_encoder):
        weights = ["1"]
    elif tag.denoiser == tag.text_encoder:
        weights = [_written(tag.denoiser)]
    else:
        weights = [f"te={_written(tag.text_encoder)}", f"unet={_written(tag.denoiser)}"]
    parts = [tag.name, *weights]
    if tag.blocks is not None:
        parts.append(f"lbw={_listed(tag.blocks)}")
    parts += [f"start={tag.start}"] if tag.start != 1 else []
    parts += [f"stop={tag.stop}"] if tag.stop is not None else []
    return f"<lora:{':'.join(parts)}>"


def _is_weight_one(weights: StepWeights) -> bool:
    return weights.is_constant and weights.points[0][1] == 1.0


def _written(weights: StepWeights) -> str:
    if len(weights.points) == 1 and weights.points[0][0] == 0.0:
        return f"{weights.points[0][1]:.10g}"
    return ",".join(f"{weight:.10g}@{position:.10g}" for position, weight in weights.points)


def _listed(blocks: Mapping[str, float]) -> str:
    for names in LISTS.values():
        if set(names) == set(blocks):
            return ",".join(f"{blocks[name]:.10g}" for name in names)
    raise SettingsError(
        f"block weights for {', '.join(list(blocks)[:4])}, ...",
        allowed=f"a list of {', '.join(map(str, LISTS))} blocks; see docs/prompts.md",
    )
