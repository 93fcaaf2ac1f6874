"""Adapters that a prompt names: `<lora:zorb@production:0.7>`, with weights per component, block and step.

<lora:NAME>                     weight 1
<lora:NAME:0.7>                 text encoders and denoiser
<lora:NAME:0.5:0.7>             text encoders, then denoiser, as in A1111 and Forge; `te=0.5:unet=0.7` says it
<lora:NAME:0@0,1@0.5>           over the steps (loractl): see `parse_step_weights`
<lora:NAME:1:lbw=OUTALL>        by block: see `parse_block_weights`
<lora:NAME:1:start=3:stop=10>   from step 3 to step 10, counted from 1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.blocks import parse_block_weights
from lora_engine.inference.prompts.step_weights import ALWAYS, StepWeights, parse_step_weights

_TAG = re.compile(r"<([A-Za-z0-9_]+):([^<>]*)>")
_UNCLOSED = re.compile(r"<(?:lora|lyco):")
_KINDS = {"lora", "lyco"}
_ALLOWED = "<lora:NAME@REF:WEIGHT>, such as <lora:zorb@production:0.7>, with te=, unet=, lbw=, start=, stop="
_OF_OTHERS = {
    "dyn": "the dynamic rank of LyCORIS; resize the adapter instead (loraline resize)",
    "hr": "a second pass, which Loraline does not draw",
    "hrte": "a second pass, which Loraline does not draw",
    "hrunet": "a second pass, which Loraline does not draw",
    "in": "SD.Next's weight of the first blocks; use lbw=",
    "mid": "SD.Next's weight of the middle block; use lbw=",
    "out": "SD.Next's weight of the last blocks; use lbw=",
    "lbwe": "weights of single layers; use lbw=",
    "x": "a value for X in lbw=; write the number there",
    "step": "a range of steps; use start= and stop=",
}
"""Named arguments of other programs, to what they mean there."""
_MAX_TAGS = 100


@dataclass(frozen=True)
class AdapterTag:
    """An adapter in a prompt.

    Attributes:
        name: A file, or `name@version` or `name@alias`.
        denoiser: Weight over the steps.
        text_encoder: Weight over the steps; texts are encoded before the first step, with its value there.
        blocks: Weight by block; None is 1 for all. It multiplies the other weights.
        start: First step with the adapter, from 1.
        stop: Last step with the adapter, from 1; None is the last one.
    """

    name: str
    denoiser: StepWeights = ALWAYS
    text_encoder: StepWeights = ALWAYS
    blocks: Mapping[str, float] | None = None
    start: int = 1
    stop: int | None = None

    @property
    def is_constant(self) -> bool:
        """True if the adapter has the same weight in each step."""
        return self.denoiser.is_constant and self.start == 1 and self.stop is None

    def denoiser_weight(self, step: int, steps: int) -> float:
        """Returns the denoiser's weight in a step (from 0)."""
        is_on = self.start <= step + 1 <= (self.stop or steps)
        return self.denoiser.at(step, steps) if is_on else 0.0


def parse_tags(prompt: str) -> tuple[str, list[AdapterTag]]:
    """Takes the adapters out of a prompt.

    Returns:
        The text without the tags, each replaced by a blank, with single blanks; and the adapters in their order. The
        same tag twice is one adapter, as in Forge.

    Raises:
        SettingsError: A tag cannot be read, or is of a kind that is not supported; names its position.
    """
    tags: list[AdapterTag] = []
    for match in _TAG.finditer(prompt):
        place = f"character {match.start() + 1}"
        if match[1] not in _KINDS:
            raise SettingsError(
                f"tag {match[0][:80]!r}", where=place, allowed=_ALLOWED, remedy="remove it, or escape it as a text"
            )
        try:
            tag = _parse_tag(match[2])
        except SettingsError as error:
            raise SettingsError(
                f"tag {match[0][:80]!r}: {error.problem}", where=place, allowed=error.allowed, remedy=error.remedy
            ) from None
        tags += [] if tag in tags else [tag]
        if len(tags) > _MAX_TAGS:
            raise SettingsError(f"the prompt names more than {_MAX_TAGS} adapters", where=place)
    text = " ".join(_TAG.sub(" ", prompt).split())
    if unclosed := _UNCLOSED.search(text):
        raise SettingsError(
            f"unclosed tag {text[unclosed.start() :][:80]!r}", allowed=_ALLOWED, remedy="close it with '>'"
        )
    return text, tags


def _parse_tag(text: str) -> AdapterTag:
    name, *parts = text.split(":")
    # A path of Windows has a colon of its own.
    if len(name) == 1 and name.isalpha() and parts and parts[0][:1] in {"\\", "/"}:
        name = f"{name}:{parts.pop(0)}"
    positional = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    if not name.strip():
        raise SettingsError("it names no adapter", allowed=_ALLOWED)
    if len(positional) > 2:
        raise SettingsError(f"{len(positional)} weights", allowed="one, or the text encoder's and the denoiser's")
    for key in named:
        if key not in {"te", "unet", "lbw", "w", "start", "stop"}:
            raise SettingsError(
                f"{key!r} is {_OF_OTHERS[key]}" if key in _OF_OTHERS else f"argument {key!r}", allowed=_ALLOWED
            )
    weights = [parse_step_weights(part) for part in positional]
    text_encoder = parse_step_weights(named["te"]) if "te" in named else (weights[0] if weights else None)
    denoiser = parse_step_weights(named["unet"]) if "unet" in named else (weights[1] if len(weights) == 2 else None)
    text_encoder = text_encoder or ALWAYS
    blocks = named.get("lbw", named.get("w"))
    return AdapterTag(
        name.strip(),
        denoiser or text_encoder,
        text_encoder,
        None if blocks is None else parse_block_weights(blocks),
        _step(named.get("start", "1"), "start"),
        _step(named["stop"], "stop") if "stop" in named else None,
    )


def _step(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text.strip()) or int(text) < 1:
        raise SettingsError(f"{name} is {text[:80]!r}", allowed="the number of a step, from 1")
    return int(text)
