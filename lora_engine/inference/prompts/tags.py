"""Adapters that a prompt names: `<lora:zorb@production:0.7>`, with weights per component, block and step.

<lora:NAME>                     weight 1
<lora:NAME:0.7>                 text encoders and denoiser
<lora:NAME:0.5:0.7>             text encoders, then denoiser, as in A1111 and Forge; `te=0.5:unet=0.7` says it
<lora:NAME:0@0,1@0.5>           over the steps (loractl): see `parse_step_weights`
<lora:NAME:0@0,1@1:curve=hold>  how the weight goes from point to point: see `StepWeights`
<lora:NAME:1:hr=0.5>            while enlarged images are drawn again (loractl); `hrte=` and `hrunet=` by component
<lora:NAME:1:lbw=OUTALL>        by block: see `parse_block_weights`
<lora:NAME:1:layers=NAME=0.5>   by name of a layer: see `parse_layer_weights`
<lora:NAME:1:start=3:stop=10>   from step 3 to step 10, counted from 1
<lora:NAME:1:ag=2>              scale between the predictions without and with the adapter
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.blocks import BLOCK_PRESETS, parse_block_weights, parse_layer_weights
from lora_engine.inference.prompts.editing import edits_over
from lora_engine.inference.prompts.foreign import check_tag_kind
from lora_engine.inference.prompts.step_weights import (
    ALWAYS,
    Curve,
    StepWeights,
    parse_curve,
    parse_number,
    parse_step_weights,
)

TAG = re.compile(r"<([A-Za-z0-9_]+)(?:\[[^\[\]<>]*\])?:([^<>]*)>")
"""A tag of any program: its kind, and what follows."""
_UNCLOSED = re.compile(r"<(?:lora|lyco):")
_NAMED = ("te", "unet", "hr", "hrte", "hrunet", "curve", "lbw", "w", "layers", "start", "stop", "ag")
_ALLOWED = (
    "<lora:NAME@REF:WEIGHT>, such as <lora:zorb@production:0.7>, "
    f"with {', '.join(f'{name}=' for name in _NAMED if name != 'w')}"
)
_OF_OTHERS = {
    "dyn": "the dynamic rank of LyCORIS; resize the adapter instead (loraline resize)",
    "in": "SD.Next's weight of the first blocks; use layers=unet.down_blocks=",
    "mid": "SD.Next's weight of the middle block; use layers=unet.mid_block=",
    "out": "SD.Next's weight of the last blocks; use layers=unet.up_blocks=",
    "lbwe": "weights of single layers; use layers=",
    "LBW": "the block weights of ComfyUI's Inspire nodes; use lbw= or layers=",
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
        layers: Weight by name of a layer; see `weight_of_layer`. It multiplies the other weights.
        guidance: Scale between the predictions without and with the adapter; None is 1, the prediction with it.
        enlarged: Weights of the denoiser and the text encoders while enlarged images are drawn again; None are the
            weights of the first pass.
        is_bare: True if the tag has a name alone, so that the weights of the adapter's card count.
    """

    name: str
    denoiser: StepWeights = ALWAYS
    text_encoder: StepWeights = ALWAYS
    blocks: Mapping[str, float] | None = None
    start: int = 1
    stop: int | None = None
    layers: tuple[tuple[str, float], ...] = ()
    guidance: float | None = None
    enlarged: tuple[StepWeights, StepWeights] | None = None
    is_bare: bool = False

    @property
    def is_constant(self) -> bool:
        """True if the adapter has the same weight in each step."""
        return self.denoiser.is_constant and self.start == 1 and self.stop is None

    @property
    def curve(self) -> Curve:
        """How the weights go from point to point, which one argument of a tag says for all of them."""
        every = (self.denoiser, self.text_encoder, *(self.enlarged or ()))
        return next((weights.curve for weights in every if not weights.is_constant), "linear")

    def denoiser_weight(self, step: int, steps: int, *, is_enlarged: bool = False) -> float:
        """Returns the denoiser's weight in a step (from 0) of the first pass, or of that over enlarged images."""
        is_on = self.start <= step + 1 <= (self.stop or steps)
        weights = self.enlarged[0] if is_enlarged and self.enlarged else self.denoiser
        return weights.at(step, steps) if is_on else 0.0

    def text_weight(self, steps: int, *, is_enlarged: bool = False) -> float:
        """Returns the text encoders' weight in the first step."""
        weights = self.enlarged[1] if is_enlarged and self.enlarged else self.text_encoder
        return weights.at(0, steps)

    def facts(self) -> dict[str, Any]:
        """Returns the weights as JSON values, without those that have no effect."""
        facts: dict[str, Any] = {"denoiser": str(self.denoiser), "text_encoder": str(self.text_encoder)}
        if self.curve != "linear":
            facts["curve"] = self.curve
        if self.enlarged is not None:
            facts["enlarged"] = dict(zip(("denoiser", "text_encoder"), map(str, self.enlarged), strict=True))
        if self.blocks is not None:
            facts["blocks"] = dict(self.blocks)
        if self.layers:
            facts["layers"] = dict(self.layers)
        if self.start != 1:
            facts["start"] = self.start
        if self.stop is not None:
            facts["stop"] = self.stop
        if self.guidance is not None and self.guidance != 1.0:
            facts["guidance"] = self.guidance
        return facts


def parse_tags(prompt: str) -> tuple[str, list[AdapterTag]]:
    """Takes the adapters out of a prompt.

    Returns:
        The text without the tags, each replaced by a blank, with single blanks; and the adapters in their order. The
        same tag twice is one adapter, as in Forge.

    Raises:
        SettingsError: A tag cannot be read, or is of a kind that is not supported; names its position.
    """
    tags: list[AdapterTag] = []
    for match in TAG.finditer(prompt):
        place = f"character {match.start() + 1}"
        check_tag_kind(match[0], match[1], place, _ALLOWED)
        try:
            tag = _parse_tag(match[2])
        except SettingsError as error:
            raise SettingsError(
                f"tag {match[0][:80]!r}: {error.problem}", where=place, allowed=error.allowed, remedy=error.remedy
            ) from None
        tags += [] if tag in tags else [tag]
        if len(tags) > _MAX_TAGS:
            raise SettingsError(f"the prompt names more than {_MAX_TAGS} adapters", where=place)
    if tags:
        _check_edits(prompt)
    text = " ".join(TAG.sub(" ", prompt).split())
    if unclosed := _UNCLOSED.search(text):
        raise SettingsError(
            f"unclosed tag {text[unclosed.start() :][:80]!r}", allowed=_ALLOWED, remedy="close it with '>'"
        )
    return text, tags


def blank_tags(prompt: str) -> str:
    """Returns a prompt with a blank for each character of its tags, so that positions stay."""
    return TAG.sub(lambda match: " " * len(match[0]), prompt)


def parse_arguments(name: str, text: str) -> AdapterTag:
    """Reads the arguments of a tag, such as `0.8` or `0@0,1@1:curve=cosine`, for an adapter.

    Raises:
        SettingsError: They cannot be read.
    """
    return _read_arguments(name, text.split(":"))


def _check_edits(prompt: str) -> None:
    """Raises an error for a tag in a bracket that edits the prompt, which A1111 loads for all steps."""
    marked = TAG.sub("\0", prompt.replace("\0", " "))
    number = edits_over(marked, "\0")
    if number is not None:
        match = list(TAG.finditer(prompt))[number]
        raise SettingsError(
            f"tag {match[0][:80]!r} is in a bracket that edits the prompt over the steps, which edits no adapters",
            where=f"character {match.start() + 1}",
            remedy="write the weight over the steps in the tag, such as 1@0,0@1 or start= and stop=",
        )


def _parse_tag(text: str) -> AdapterTag:
    name, *parts = text.split(":")
    # A path of Windows has a colon of its own.
    if len(name) == 1 and name.isalpha() and parts and parts[0][:1] in {"\\", "/"}:
        name = f"{name}:{parts.pop(0)}"
    if not name.strip():
        raise SettingsError("it names no adapter", allowed=_ALLOWED)
    return _read_arguments(name.strip(), parts)


def _read_arguments(name: str, parts: list[str]) -> AdapterTag:
    positional = [part for part in parts if "=" not in part]
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    _check_arguments(positional, named)
    read = partial(parse_step_weights, curve=parse_curve(named.get("curve", "linear")))
    weights = [read(part) for part in positional]
    text_encoder = read(named["te"]) if "te" in named else (weights[0] if weights else ALWAYS)
    denoiser = read(named["unet"]) if "unet" in named else (weights[1] if len(weights) == 2 else text_encoder)
    enlarged = None
    if {"hr", "hrte", "hrunet"} & named.keys():
        both = read(named["hr"]) if "hr" in named else None
        enlarged = (
            read(named["hrunet"]) if "hrunet" in named else both or denoiser,
            read(named["hrte"]) if "hrte" in named else both or text_encoder,
        )
    blocks = named.get("lbw", named.get("w"))
    return AdapterTag(
        name,
        denoiser,
        text_encoder,
        None if blocks is None else parse_block_weights(blocks),
        _step(named.get("start", "1"), "start"),
        _step(named["stop"], "stop") if "stop" in named else None,
        parse_layer_weights(named["layers"]) if "layers" in named else (),
        parse_number(named["ag"], "ag") if "ag" in named else None,
        enlarged,
        is_bare=not parts,
    )


def _check_arguments(positional: list[str], named: Mapping[str, str]) -> None:
    for part in positional:
        if part.strip() in BLOCK_PRESETS or ("," in part and "@" not in part and part.count(",") > 3):
            raise SettingsError(f"{part[:40]!r} are block weights", allowed=_ALLOWED, remedy=f"write lbw={part[:40]}")
        if part.startswith("LBW"):
            raise SettingsError(f"{part[:40]!r} is {_OF_OTHERS['LBW']}", allowed=_ALLOWED)
    if len(positional) > 2:
        raise SettingsError(f"{len(positional)} weights", allowed="one, or the text encoder's and the denoiser's")
    for key in named:
        if key not in _NAMED:
            raise SettingsError(
                f"{key!r} is {_OF_OTHERS[key]}" if key in _OF_OTHERS else f"argument {key!r}", allowed=_ALLOWED
            )


def _step(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text.strip()) or int(text) < 1:
        raise SettingsError(f"{name} is {text[:80]!r}", allowed="the number of a step, from 1")
    return int(text)
