"""Writes adapter tags and whole prompts, the inverse of `parse_prompt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.blocks import block_lists
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
    if tag.is_bare:
        return f"<lora:{tag.name}>"
    parts = [tag.name, *_weights("unet", tag.denoiser, "te", tag.text_encoder, both="")]
    if tag.enlarged is not None:
        parts += _weights("hrunet", tag.enlarged[0], "hrte", tag.enlarged[1], both="hr=")
    parts += [f"curve={tag.curve}"] if tag.curve != "linear" else []
    parts += [f"lbw={_listed(tag.blocks)}"] if tag.blocks is not None else []
    parts += [f"layers={','.join(f'{name}={weight:.10g}' for name, weight in tag.layers)}"] if tag.layers else []
    parts += [f"start={tag.start}"] if tag.start != 1 else []
    parts += [f"stop={tag.stop}"] if tag.stop is not None else []
    parts += [f"ag={tag.guidance:.10g}"] if tag.guidance is not None else []
    return f"<lora:{':'.join(parts)}>"


def _weights(name: str, weights: StepWeights, other: str, text_weights: StepWeights, *, both: str) -> list[str]:
    written, texts = _written(weights), _written(text_weights)
    return [f"{both}{written}"] if written == texts else [f"{other}={texts}", f"{name}={written}"]


def _written(weights: StepWeights) -> str:
    if weights.is_constant:
        return f"{weights.points[0][1]:.10g}"
    return ",".join(f"{weight:.10g}@{position:.10g}" for position, weight in weights.points)


def _listed(blocks: Mapping[str, float]) -> str:
    for names in block_lists().values():
        if set(names) == set(blocks):
            return ",".join(f"{blocks[name]:.10g}" for name in names)
    raise SettingsError(
        f"block weights for {', '.join(list(blocks)[:4])}, ...",
        allowed=f"a list of {', '.join(map(str, block_lists()))} blocks; see docs/prompts.md",
    )
