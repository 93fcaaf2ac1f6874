"""Reads the settings of a generated image back: from the chunk `loraline`, or from A1111's text. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_engine.bases.samplers import find_sampler, sampler_name_of
from lora_engine.data.containers import read_png_texts
from lora_engine.data.folder import open_inside
from lora_engine.documents import parse_json
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference.image_files import CHUNK
from lora_engine.inference.infotext import Infotext
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.prompts.step_weights import write_number
from lora_engine.inference.prompts.tags import AdapterTag, parse_arguments
from lora_engine.inference.prompts.writing import write_prompt
from lora_engine.inference.variation import NoiseVariation

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


@dataclass(frozen=True)
class ImageSettings:
    """The settings that a file states; None for those that it does not.

    Attributes:
        prompt: The prompt with its adapters, in A1111's syntax.
        negative: The negative prompt.
        seed: The seed.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        sampler: Name for `find_sampler`.
        size: (height, width) in pixels, before an enlargement.
        strength: Share of the steps that ran on another image.
        enlarge: Factor of the enlargement.
        enlarged_strength: Share of the steps that ran on the enlarged image.
        regions: `LEFT,TOP,RIGHT,BOTTOM=PROMPT` of each region that is a box.
        feather: Blur of the regions' borders, in pixels.
        only_regions: True if only the regions were drawn.
        variation: Noise that was mixed in.
        seed_size: (height, width) in pixels whose noise was in the middle.
        clip_skip: Layer of the CLIP text encoders from the last.
        has_labels: True if the prompt can have `name-v3` for `name@3`, as Loraline writes for other programs; only the
            registry can tell it from an adapter of that whole name.
        notes: What was not restored.
    """

    prompt: str
    negative: str = ""
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    size: tuple[int, int] | None = None
    strength: float | None = None
    enlarge: float | None = None
    enlarged_strength: float | None = None
    regions: tuple[str, ...] = ()
    feather: float = 0.0
    only_regions: bool = False
    variation: NoiseVariation | None = None
    seed_size: tuple[int, int] | None = None
    clip_skip: int | None = None
    has_labels: bool = False
    notes: tuple[str, ...] = ()


def read_image_settings(path: Path) -> ImageSettings:
    """Returns the settings that a PNG states.

    Raises:
        DataError: The file is no PNG with settings, or they are not as Loraline or A1111 writes them.
    """
    with open_inside(path, path.parent) as file:
        texts = dict(read_png_texts(file))
    if CHUNK in texts:
        return _read_facts(texts[CHUNK], path.name)
    if "parameters" in texts:
        return settings_of_infotext(texts["parameters"])
    raise DataError(
        "the file states no settings",
        where=path.name,
        allowed="a PNG of Loraline or A1111 with its text `parameters`",
        remedy="use the original file: chats and editors remove the text",
    )


def settings_of_infotext(text: str) -> ImageSettings:
    """Returns the settings that A1111's text states.

    Raises:
        DataError: The text is too long, or a setting is no number or out of its range.
    """
    infotext = Infotext.parse(text)
    values = infotext.values
    schedule = values.get("Schedule type", "")
    sampler, notes = _find_sampler(" ".join(filter(None, (values.get("Sampler"), schedule))))
    strength, enlarge = _number(values, "Denoising strength"), _number(values, "Hires upscale")
    seed, steps = _number(values, "Seed"), _number(values, "Steps")
    return ImageSettings(
        infotext.prompt,
        infotext.negative,
        seed=None if seed is None or seed < 0 else int(seed),
        steps=None if steps is None else int(steps),
        guidance=_number(values, "CFG scale"),
        sampler=sampler,
        size=_size(values, "Size"),
        strength=None if enlarge else strength,
        enlarge=enlarge,
        enlarged_strength=strength if enlarge else None,
        variation=_variation(values),
        seed_size=_size(values, "Seed resize from"),
        clip_skip=_clip_skip(values),
        has_labels=True,
        notes=notes,
    )


def _read_facts(text: str, name: str) -> ImageSettings:
    where = f"{name}, chunk {CHUNK!r}"
    facts = parse_json(text, where, DataError)
    try:
        prompt, regions = _read_prompts(facts)
        sampler = facts["sampler"]
        source, enlarged = facts.get("source"), facts.get("enlarged") or (None, None)
        height, width = (int(side) for side in facts["size"])
        factor, enlarged_strength = (None if part is None else float(part) for part in enlarged)
        settings = ImageSettings(
            prompt,
            str(facts["negative"]),
            seed=int(facts["seed"]),
            steps=int(facts["steps"]),
            guidance=float(facts["guidance"]),
            sampler=sampler_name_of(str(sampler["class"]), sampler),
            size=(round(height / (factor or 1)), round(width / (factor or 1))),
            strength=None if source is None else float(source["strength"]),
            enlarge=factor,
            enlarged_strength=enlarged_strength,
            regions=regions,
            feather=float(facts.get("feather", 0)) if regions else 0.0,
            only_regions=bool(regions and facts.get("only_regions")),
            **_read_noise(facts),
        )
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise DataError(f"the settings are not as Loraline writes them ({error})", where=where) from error
    notes = [
        "the image that it started from is not in the file" if source else "",
        "the masks of its regions are not in the file" if len(regions) < len(facts.get("regions", ())) else "",
    ]
    return replace(settings, notes=tuple(filter(None, notes)))


def _read_prompts(facts: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Returns the prompt with the adapters that act everywhere, and the regions that are boxes with their own."""
    tags = [_read_tag(entry) for entry in facts["adapters"]]
    areas: list[Mapping[str, Any]] = list(facts.get("regions", ()))
    own = {int(number) for area in areas for number in area.get("adapters", ())}
    prompt = write_prompt(str(facts["prompt"]), [tag for number, tag in enumerate(tags) if number not in own])
    parse_prompt(prompt)
    return prompt, tuple(_read_region(area, tags) for area in areas if "box" in area)


def _read_region(area: Mapping[str, Any], tags: Sequence[AdapterTag]) -> str:
    left, top, right, bottom = (write_number(float(share)) for share in area["box"])
    prompt = write_prompt(" ".join(str(area["prompt"]).split()), [tags[number] for number in area.get("adapters", ())])
    parse_prompt(prompt)
    return f"{left},{top},{right},{bottom}={prompt}"


def _read_noise(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variation, size of the noise and layer of the text encoders."""
    variation, seed_size, clip_skip = (facts.get(name) for name in ("variation", "seed_size", "clip_skip"))
    return {
        "variation": None if variation is None else NoiseVariation(int(variation[0]), float(variation[1])),
        "seed_size": None if seed_size is None else (int(seed_size[0]), int(seed_size[1])),
        "clip_skip": None if clip_skip is None else int(clip_skip),
    }


def _read_tag(entry: Mapping[str, Any]) -> AdapterTag:
    """Returns the tag whose `facts` these are."""
    enlarged, layers = entry.get("enlarged"), entry.get("layers", {})
    arguments = {"te": entry["text_encoder"], "unet": entry["denoiser"], "curve": entry.get("curve")}
    if enlarged is not None:
        arguments |= {"hrunet": enlarged["denoiser"], "hrte": enlarged["text_encoder"]}
    arguments |= {"layers": ",".join(f"{name}={float(weight)}" for name, weight in layers.items()) or None}
    arguments |= {"start": entry.get("start"), "stop": entry.get("stop"), "ag": entry.get("guidance")}
    text = ":".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    blocks = {str(name): float(value) for name, value in entry["blocks"].items()} if "blocks" in entry else None
    return replace(parse_arguments(str(entry["reference"]), text), blocks=blocks)


def _find_sampler(name: str) -> tuple[str | None, tuple[str, ...]]:
    if not name:
        return None, ()
    try:
        sampler = find_sampler(name)
    except SettingsError:
        return None, (f"the sampler {name[:60]!r} is unknown here",)
    return sampler_name_of(sampler.scheduler, sampler.options), ()


def _size(values: Mapping[str, str], key: str) -> tuple[int, int] | None:
    size = _SIZE.fullmatch(values.get(key, ""))
    return (int(size[2]), int(size[1])) if size else None


def _variation(values: Mapping[str, str]) -> NoiseVariation | None:
    seed, strength = _number(values, "Variation seed"), _number(values, "Variation seed strength")
    if seed is None or seed < 0 or not strength:
        return None
    try:
        return NoiseVariation(int(seed), strength)
    except SettingsError as error:
        raise DataError(error.problem, where="text `parameters`", allowed=error.allowed) from error


def _clip_skip(values: Mapping[str, str]) -> int | None:
    """Returns the layer; None for 1, which A1111 takes for the base's own."""
    layer = _number(values, "Clip skip")
    return int(layer) if layer is not None and layer > 1 else None


def _number(values: Mapping[str, str], key: str) -> float | None:
    text = values.get(key, "")
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{0,20})?", text):
        raise DataError(f"{key} is {text[:40]!r}", where="text `parameters`", allowed="a number")
    return float(text)
