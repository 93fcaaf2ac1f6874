"""The form of the tab Draw: its components, the request that their values are, and the values of restored settings."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio

from lora_engine.bases.samplers import SAMPLERS
from lora_engine.errors import SettingsError
from lora_engine.inference.image_settings import ImageSettings
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.prompts.writing import write_prompt
from lora_engine.inference.variation import NoiseVariation
from tasks.operations.draw_request import DrawRequest, parse_size
from tasks.operations.source_images import prepare_source

OWN_SAMPLER = "base's own"
SAMPLER_CHOICES = [OWN_SAMPLER, *SAMPLERS]


@dataclass(frozen=True)
class Used:
    """An adapter that the user chose.

    Attributes:
        tag: The adapter with its weights.
        is_on: False leaves it out of the prompt.
    """

    tag: AdapterTag
    is_on: bool = True


@dataclass(frozen=True)
class DrawForm:
    """Components of the form.

    Attributes:
        text: The prompt without adapters.
        used: State: the chosen adapters, a list of `Used`.
        layout: State: changes whenever adapters are added or removed, so their rows are drawn again.
        prompt: The whole prompt, which the user may edit.
        composed: State: the whole prompt as it was composed last; the user edited `prompt` if they differ.
        negative: The negative prompt.
        size: `WIDTHxHEIGHT`; empty for the base's own.
        steps: Steps.
        guidance: Guidance.
        sampler: Sampler.
        seed: Seed.
        is_random: True draws a new seed each time.
        count: Number of images.
        source: Editor of the image to start from.
        strength: Share of the steps on the image.
        enlarge: Factor of the second pass.
        enlarged_strength: Share of the steps of the second pass.
        regions: `LEFT,TOP,RIGHT,BOTTOM=PROMPT`, one a line.
        feather: Blur of the regions' borders.
        only_regions: True draws only the regions of the image to start from.
        adapter_guidance: Scale between the predictions without and with the adapters.
        variation: `SEED:STRENGTH`; empty for none.
        seed_size: `WIDTHxHEIGHT`; empty for none.
        clip_skip: Layer of the text encoders; None for that of the training.
    """

    text: gradio.Textbox
    used: gradio.State
    layout: gradio.State
    prompt: gradio.Textbox
    composed: gradio.State
    negative: gradio.Textbox
    size: gradio.Textbox
    steps: gradio.Slider
    guidance: gradio.Slider
    sampler: gradio.Dropdown
    seed: gradio.Number
    is_random: gradio.Checkbox
    count: gradio.Slider
    source: gradio.ImageEditor
    strength: gradio.Slider
    enlarge: gradio.Slider
    enlarged_strength: gradio.Slider
    regions: gradio.Textbox
    feather: gradio.Slider
    only_regions: gradio.Checkbox
    adapter_guidance: gradio.Number
    variation: gradio.Textbox
    seed_size: gradio.Textbox
    clip_skip: gradio.Number

    @property
    def components(self) -> list[Any]:
        """All components, in the order of `values`."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def values(cls, values: Sequence[Any]) -> dict[str, Any]:
        """Returns the values of `components` by name."""
        return dict(zip((field.name for field in fields(cls)), values, strict=True))


def compose_prompt(text: str, used: Sequence[Used]) -> str:
    """Returns the whole prompt."""
    return write_prompt(text.strip(), [entry.tag for entry in used if entry.is_on])


def split_prompt(prompt: str) -> tuple[str, list[Used]]:
    """Returns the text and the adapters of a whole prompt.

    Raises:
        SettingsError: The prompt cannot be read.
    """
    parsed = parse_prompt(prompt)
    return parsed.text, [Used(tag) for tag in parsed.adapters]


def whole_prompt(values: Mapping[str, Any]) -> str:
    """Returns the prompt to draw: as the user edited it, or else composed from text and adapters."""
    if values["prompt"] != values["composed"]:
        return str(values["prompt"])
    return compose_prompt(str(values["text"] or ""), values["used"])


def request_of(values: Mapping[str, Any], base: str, folder: Path) -> DrawRequest:
    """Returns the request of a filled form.

    Args:
        values: Values of the form by name.
        base: The base.
        folder: The folder for the image to start from.

    Raises:
        SettingsError: A value cannot be used.
        DataError: The image cannot be read.
    """
    image, mask = _source(values["source"], folder)
    seed = secrets.randbelow(2**31) if values["is_random"] else _whole("seed", values["seed"])
    size, seed_size, variation = (str(values[name] or "").strip() for name in ("size", "seed_size", "variation"))
    sampler = values["sampler"]
    return DrawRequest(
        whole_prompt(values),
        base,
        str(values["negative"] or ""),
        count=_whole("number of images", values["count"]),
        seed=seed,
        steps=_whole("steps", values["steps"]),
        guidance=_number("guidance", values["guidance"]),
        size=parse_size(size) if size else None,
        sampler=None if sampler in {None, "", OWN_SAMPLER} else str(sampler),
        image=image,
        mask=mask,
        strength=_number("strength", values["strength"]),
        enlarge=_number("factor", values["enlarge"]),
        enlarged_strength=_number("strength of the second pass", values["enlarged_strength"]),
        regions=tuple(filter(None, map(str.strip, str(values["regions"] or "").splitlines()))),
        feather=_number("feather", values["feather"]),
        only_regions=bool(values["only_regions"]),
        adapter_guidance=_number("adapter guidance", values["adapter_guidance"]),
        variation=NoiseVariation.parse(variation) if variation else None,
        seed_size=parse_size(seed_size) if seed_size else None,
        clip_skip=None if values["clip_skip"] is None else _whole("clip skip", values["clip_skip"]),
    )


def fill(settings: ImageSettings, layout: int) -> dict[str, Any]:
    """Returns values of the form, by name, that restore settings; fields that these do not state stay.

    Raises:
        SettingsError: The prompt cannot be read.
    """
    text, used = split_prompt(settings.prompt)
    composed = compose_prompt(text, used)
    stated = {
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sampler": settings.sampler,
        "seed": settings.seed,
        "strength": settings.strength,
        "size": None if settings.size is None else _written_size(settings.size),
        "enlarge": settings.enlarge or 1.0,
        "enlarged_strength": settings.enlarged_strength,
        "is_random": None if settings.seed is None else False,
    }
    # An image without regions or variation was drawn without them, whatever the form has.
    advanced = {
        "regions": "\n".join(settings.regions),
        "feather": settings.feather,
        "only_regions": settings.only_regions,
        "adapter_guidance": 1.0,
        "variation": "" if settings.variation is None else str(settings.variation),
        "seed_size": "" if settings.seed_size is None else _written_size(settings.seed_size),
        "clip_skip": settings.clip_skip,
    }
    return {
        "text": text,
        "used": used,
        "layout": layout + 1,
        "prompt": composed,
        "composed": composed,
        "negative": settings.negative,
        **advanced,
        **{name: value for name, value in stated.items() if value is not None},
    }


def updates(values: Mapping[str, Any]) -> list[Any]:
    """Returns the outputs for `DrawForm.components`: the values by name, and no change for others."""
    return [values.get(field.name, gradio.skip()) for field in fields(DrawForm)]


def _written_size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _source(value: Any, folder: Path) -> tuple[Path | None, Path | None]:
    background = (value or {}).get("background") if isinstance(value, dict) else None
    if not background:
        return None, None
    return prepare_source(Path(background), [Path(layer) for layer in value.get("layers") or []], folder)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SettingsError(f"{name} is {value!r}", allowed="a number")
    return float(value)


def _whole(name: str, value: object) -> int:
    number = _number(name, value)
    if not number.is_integer() or number < 0:
        raise SettingsError(f"{name} is {value!r}", allowed="a whole number of 0 or more")
    return int(number)
