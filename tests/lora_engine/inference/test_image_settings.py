"""Settings that are read back from images, and prompts that are written."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.samplers import SAMPLERS, find_sampler
from lora_engine.data.pixels import write_png
from lora_engine.errors import DataError, SettingsError
from lora_engine.inference.image_files import CHUNK, png_texts
from lora_engine.inference.image_metadata import Drawing, UsedAdapter, UsedImage
from lora_engine.inference.image_settings import read_image_settings, settings_of_infotext
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.prompts.writing import write_prompt, write_tag
from lora_engine.inference.regions import parse_region
from lora_engine.inference.variation import NoiseVariation

TAGS = [
    "<lora:zorb@3>",
    "<lora:zorb@3:0.7>",
    "<lora:zorb@3:0.5:0.8>",
    "<lora:zorb@3:0@0,1@0.5>",
    "<lora:zorb@3:1@0,0@10>",
    "<lora:zorb@3:te=0:unet=1@0.2,0.5@0.7>",
    "<lora:zorb@3:1:lbw=OUTALL:start=3:stop=10>",
    "<lora:zorb@3:0@0,1@0.5:curve=cosine:hr=0.5>",
    "<lora:zorb@3:0.5:hrte=0.1:hrunet=0@0,1@1:curve=hold>",
    "<lora:zorb@3:1:layers=unet.mid_block=0.5,*.attn2.*=0:ag=2>",
    f"<lora:zorb@3:-1.5:lbw={','.join(['0.25'] * 12)}>",
]


def _drawing(prompt: str, sampler: str = "ddim") -> Drawing:
    chosen = find_sampler(sampler)
    adapters = [UsedAdapter("zorb-v3", "zorb@3", "a" * 64, "b" * 64)] * len(parse_prompt(prompt).adapters)
    negative = parse_prompt("blue, flat", is_negative=True)
    options = dict(chosen.options)
    return Drawing(parse_prompt(prompt), negative, adapters, "tiny", "f" * 64, chosen.scheduler, options, 12, 3.5, "1")


def _said(prompt: ParsedPrompt) -> list[Any]:
    """Returns what tags say; a curve means nothing to a constant weight."""
    return [(tag.name, tag.is_bare, tag.facts()) for tag in prompt.adapters]


@pytest.mark.parametrize("tag", TAGS)
def test_a_written_tag_is_read_as_the_same_adapter(tag: str) -> None:
    parsed = parse_prompt(f"a (red:1.2) ring {tag}")
    again = parse_prompt(write_prompt(parsed.text, parsed.adapters))
    assert again.text == parsed.text
    assert _said(again) == _said(parsed)


def test_the_tags_of_these_tests_use_every_field() -> None:
    plain = vars(AdapterTag("zorb@3"))
    used = {name for tag in TAGS for name, value in vars(parse_prompt(tag).adapters[0]).items() if value != plain[name]}
    assert used == {entry.name for entry in fields(AdapterTag)} - {"name"}


def test_blocks_of_no_list_are_refused() -> None:
    tag = replace(parse_prompt("<lora:z:1>").adapters[0], blocks={"IN99": 1.0})
    with pytest.raises(SettingsError, match="IN99"):
        write_tag(tag)


@pytest.mark.parametrize("tag", TAGS)
def test_the_chunk_of_an_image_gives_back_its_prompt_and_settings(tag: str, tmp_path: Path) -> None:
    drawing = _drawing(f"a red ring {tag}", "dpmsolver++_sde_karras")
    file = tmp_path / "drawn.png"
    write_png(file, torch.zeros(3, 8, 16), png_texts(drawing, 7, (8, 16)))
    settings = read_image_settings(file)
    again = parse_prompt(settings.prompt)
    assert again.text == drawing.prompt.text
    assert [tag.facts() for tag in again.adapters] == [tag.facts() for tag in drawing.prompt.adapters]
    assert (settings.negative, settings.seed, settings.steps, settings.guidance) == ("blue, flat", 7, 12, 3.5)
    assert (settings.size, settings.sampler) == ((8, 16), "dpmsolver++_sde_karras")


@pytest.mark.parametrize("sampler", [*SAMPLERS, "euler_exponential", "unipc_sgm_uniform", "dpmsolver++_sde_beta"])
def test_each_sampler_comes_back_by_its_name(sampler: str, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.zeros(3, 4, 4), png_texts(_drawing("a", sampler), 1, (4, 4)))
    assert read_image_settings(tmp_path / "a.png").sampler == sampler


def test_enlarged_images_and_sources_come_back_with_a_note(tmp_path: Path) -> None:
    drawing = replace(_drawing("a"), enlarged=(2.0, 0.4), source=UsedImage("c" * 64, 0.6))
    write_png(tmp_path / "a.png", torch.zeros(3, 16, 32), png_texts(drawing, 1, (16, 32)))
    settings = read_image_settings(tmp_path / "a.png")
    assert (settings.size, settings.enlarge, settings.enlarged_strength) == ((8, 16), 2.0, 0.4)
    assert settings.strength == 0.6
    assert settings.notes == ("the image that it started from is not in the file",)


def test_regions_and_noise_come_back_and_masks_are_noted(tmp_path: Path) -> None:
    drawing = replace(
        _drawing("a wall <lora:zorb@3:0.5> <lora:zorb@3:0.8>"),
        regions=[
            {"prompt": "a zorb", "box": [0.0, 0.25, 1 / 3, 1.0], "adapters": [1]},
            {"prompt": "a cube", "mask_sha256": "c" * 64},
        ],
        feather=2.5,
        only_regions=True,
        variation=(8, 0.2),
        seed_size=(32, 48),
        clip_skip=2,
    )
    write_png(tmp_path / "a.png", torch.zeros(3, 16, 32), png_texts(drawing, 1, (16, 32)))
    settings = read_image_settings(tmp_path / "a.png")
    assert settings.prompt == "a wall <lora:zorb@3:0.5>"
    (region,) = settings.regions
    assert region == "0,0.25,0.333333333,1=a zorb <lora:zorb@3:0.8>"
    assert parse_region(region).prompt.adapters[0].name == "zorb@3"
    assert (settings.feather, settings.only_regions) == (2.5, True)
    assert settings.notes == ("the masks of its regions are not in the file",)
    for read in (settings, settings_of_infotext(drawing.infotext(1, (16, 32)))):
        assert (read.variation, read.seed_size, read.clip_skip) == (NoiseVariation(8, 0.2), (32, 48), 2)
    assert drawing.source_type == "compositeWithTrainedAlgorithmicMedia"


@pytest.mark.parametrize(
    "change",
    [
        {"regions": [{"prompt": "a", "box": [0, 0, 1]}]},
        {"regions": [{"prompt": "a", "box": [0, 0, 1, 1], "adapters": [7]}]},
        {"regions": [{"prompt": "a <lora:z:x>", "box": [0, 0, 1, 1]}]},
        {"variation": (1, 3.0)},
        {"seed_size": (1,)},
        {"clip_skip": "two"},
    ],
)
def test_regions_and_noise_that_cannot_be_read_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    facts = json.loads(dict(png_texts(_drawing("a"), 1, (4, 4)))[CHUNK])
    write_png(tmp_path / "a.png", torch.zeros(3, 4, 4), {CHUNK: json.dumps(facts)})
    assert read_image_settings(tmp_path / "a.png").regions == ()
    write_png(tmp_path / "a.png", torch.zeros(3, 4, 4), {CHUNK: json.dumps(facts | change)})
    with pytest.raises(DataError, match="not as Loraline writes them"):
        read_image_settings(tmp_path / "a.png")


def test_the_text_of_a1111_is_read() -> None:
    settings = settings_of_infotext(
        "a red ring\non grass <lora:style:0.8>\nNegative prompt: blue,\nflat\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234, Size: 512x768, "
        'Model: v1-5, Denoising strength: 0.4, Hires upscale: 2, Lora hashes: "style: 012345678901, b: 1", Version: 1.9'
    )
    assert settings.prompt == "a red ring\non grass <lora:style:0.8>"
    assert settings.negative == "blue,\nflat"
    assert (settings.steps, settings.guidance, settings.seed, settings.size) == (20, 7.5, 1234, (768, 512))
    assert settings.sampler == "dpmsolver++_karras"
    assert (settings.strength, settings.enlarge, settings.enlarged_strength) == (None, 2.0, 0.4)


def test_our_text_for_other_programs_has_a_label_that_only_the_registry_can_read(tmp_path: Path) -> None:
    drawing = _drawing("a ring <lora:zorb@3:0.5>")
    settings = settings_of_infotext(drawing.infotext(7, (8, 16)))
    assert (settings.prompt, settings.has_labels) == ("a ring <lora:zorb-v3:0.5>", True)
    write_png(tmp_path / "drawn.png", torch.zeros(3, 8, 16), png_texts(drawing, 7, (8, 16)))
    settings = read_image_settings(tmp_path / "drawn.png")
    assert (settings.prompt, settings.has_labels) == ("a ring <lora:zorb@3:0.5>", False)


def test_a_prompt_without_settings_is_a_prompt_and_an_unknown_sampler_is_noted() -> None:
    assert settings_of_infotext("one line, with: a pair").prompt == "one line, with: a pair"
    settings = settings_of_infotext("a\nSteps: 4, Sampler: Euler Dy, Seed: 1")
    assert (settings.steps, settings.sampler) == (4, None)
    assert "Euler Dy" in settings.notes[0]


def test_broken_settings_are_refused_with_the_file(tmp_path: Path) -> None:
    for texts, problem in (
        ({}, "states no settings"),
        ({CHUNK: "{"}, "drawn.png"),
        ({CHUNK: '{"prompt": "a", "adapters": [{}]}'}, "not as Loraline writes them"),
        ({"parameters": "a\nSteps: many, Seed: 1, Size: 1x1"}, "Steps is 'many'"),
    ):
        write_png(tmp_path / "drawn.png", torch.zeros(3, 4, 4), texts)
        with pytest.raises(DataError, match=problem):
            read_image_settings(tmp_path / "drawn.png")
