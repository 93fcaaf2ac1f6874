"""What the studio makes of its fields: schedules, requests, columns, axes, cards, files, messages."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flows.web.studio.cards import render_cards
from flows.web.studio.compare import requests_of_columns
from flows.web.studio.draw_adapters import constant
from flows.web.studio.draw_events import restore_settings
from flows.web.studio.draw_form import Used, compose_prompt, fill, request_of, split_prompt, whole_prompt
from flows.web.studio.grids import ADAPTER, WEIGHT, WORD, axes_of, prompt_of
from flows.web.studio.page_files import PageFiles
from flows.web.studio.page_messages import show_error, show_note
from flows.web.studio.schedule import (
    PERCENT,
    SCHEDULE_PRESETS,
    STEPS,
    draw_curve,
    preset_rows,
    schedule_rows,
    schedule_weights,
)
from lora_engine.data.pixels import write_png
from lora_engine.errors import DataError, SettingsError
from lora_engine.formats import Card
from lora_engine.inference.image_settings import ImageSettings
from lora_engine.inference.prompts.step_weights import parse_step_weights
from lora_engine.inference.variation import NoiseVariation
from registry import Registry
from registry.home import Home
from tasks.operations.adapter_cards import choose_cards, list_adapter_cards, read_card_sample, tabulate_metrics
from tasks.operations.draw_request import DrawRequest
from tasks.operations.image_grids import requests_of_grid
from tasks.operations.source_images import prepare_source
from tests.flows.made import bring_in, register_zorb, write_random
from tests.flows.shared import Trained

FORM: dict[str, Any] = {
    "text": "a ring",
    "used": [],
    "prompt": "",
    "composed": "",
    "negative": "",
    "size": "48x32",
    "steps": 4,
    "guidance": 2,
    "sampler": "base's own",
    "seed": 5,
    "is_random": False,
    "count": 2,
    "source": None,
    "strength": 0.5,
    "enlarge": 1,
    "enlarged_strength": 0.5,
    "regions": "",
    "feather": 0,
    "only_regions": False,
    "adapter_guidance": 1,
    "variation": "",
    "seed_size": "",
    "clip_skip": None,
}


@pytest.mark.parametrize("text", ["0.7", "0@0,1@0.5", "1@0,0@10", "0.25@0.5,1@1"])
def test_a_table_of_points_and_the_syntax_of_the_prompt_are_the_same_schedule(text: str) -> None:
    weights = parse_step_weights(text)
    again = schedule_weights(*schedule_rows(weights))
    assert [again.at(step, 20) for step in range(20)] == [weights.at(step, 20) for step in range(20)]


def test_positions_in_steps_stay_steps_also_when_all_are_small() -> None:
    weights = schedule_weights([[0, 0], [1, 1]], STEPS)
    assert [weights.at(step, 10) for step in range(4)] == [0, 1, 1, 1]
    assert schedule_weights([[0, 0], [None, ""], ["50", "1"]], PERCENT).points == ((0.0, 0.0), (0.5, 1.0))


@pytest.mark.parametrize("rows", [[], [["", ""]], [["x", 1]], [[101, 1]], [[-1, 1]], [[5, ""]]])
def test_a_table_that_is_no_schedule_is_refused(rows: list[list[Any]]) -> None:
    with pytest.raises(SettingsError):
        schedule_weights(rows, PERCENT)


@pytest.mark.parametrize("preset", SCHEDULE_PRESETS)
def test_each_preset_is_drawn_at_the_adapters_weight(preset: str) -> None:
    weights = schedule_weights(preset_rows(preset, 0.8), PERCENT)
    assert max(weights.at(step, 20) for step in range(20)) == 0.8
    assert draw_curve(weights, 20).count("<circle") == 20


def test_the_prompt_that_was_edited_last_is_drawn() -> None:
    used = split_prompt("a <lora:zorb@3:0.5>")[1]
    assert compose_prompt(" a ring ", [*used, replace(used[0], is_on=False)]) == "a ring <lora:zorb@3:0.5>"
    assert whole_prompt({**FORM, "used": used}) == "a ring <lora:zorb@3:0.5>"
    assert whole_prompt({**FORM, "used": used, "prompt": "b <lora:x@1:1>"}) == "b <lora:x@1:1>"


def test_a_filled_form_is_a_request(tmp_path: Path) -> None:
    request = request_of(FORM, "tiny", tmp_path)
    assert request == DrawRequest("a ring", count=2, seed=5, steps=4, guidance=2.0, size=(32, 48), strength=0.5)
    assert request_of({**FORM, "is_random": True}, "tiny", tmp_path).seed != 5
    advanced = {
        "regions": " 0,0,0.5,1=a cube \n\n0.5,0,1,1=a disk <lora:zorb@3:0.5>",
        "feather": 2,
        "only_regions": True,
        "adapter_guidance": 1.5,
        "variation": "8:0.2",
        "seed_size": "64x32",
        "clip_skip": 2,
    }
    assert request_of({**FORM, **advanced}, "tiny", tmp_path) == replace(
        request,
        regions=("0,0,0.5,1=a cube", "0.5,0,1,1=a disk <lora:zorb@3:0.5>"),
        feather=2.0,
        only_regions=True,
        adapter_guidance=1.5,
        variation=NoiseVariation(8, 0.2),
        seed_size=(32, 64),
        clip_skip=2,
    )
    for name, value in {
        "steps": 1.5,
        "count": "2",
        "seed": -1,
        "guidance": float("nan"),
        "size": "large",
        "variation": "8",
    }.items():
        with pytest.raises(SettingsError):
            request_of({**FORM, name: value}, "tiny", tmp_path)


def test_restored_settings_fill_the_form_and_leave_the_rest() -> None:
    values = fill(ImageSettings("a <lora:zorb@3:0.5>", "blue", seed=7, size=(32, 48)), 3)
    assert values["used"] == [Used(split_prompt("<lora:zorb@3:0.5>")[1][0].tag)]
    assert (values["text"], values["seed"], values["is_random"], values["size"]) == ("a", 7, False, "48x32")
    advanced = {name: FORM[name] for name in ("regions", "feather", "only_regions", "variation", "clip_skip")}
    assert {name: values[name] for name in advanced} == advanced, "the image had none"
    for strength in (0.0, 0.2, 1.0, 0.123456789):
        variation = NoiseVariation(10, strength)
        restored = fill(ImageSettings("a", variation=variation, regions=("0,0,1,1=a", "0,0,1,0.5=b")), 1)
        assert restored["regions"].splitlines() == ["0,0,1,1=a", "0,0,1,0.5=b"]
        assert NoiseVariation.parse(restored["variation"]) == variation
    assert values["layout"] == 4
    assert "steps" not in values


def test_a_label_in_an_image_is_a_version_only_if_the_registry_has_that_adapter(tmp_path: Path) -> None:
    home = Home.open(register_zorb(tmp_path))
    (tmp_path / "other.safetensors").write_bytes(b"weights")
    with Registry.open(home.path) as reg:
        reg.register("zorb-v3", tmp_path / "other.safetensors", license="MIT")
    text = "a <lora:zorb-v1:0.5> <lora:zorb-v3:1> <lora:style-v2:1>\nSteps: 4, Sampler: Euler, Seed: 1, Size: 4x4"
    write_png(tmp_path / "drawn.png", torch.zeros(3, 4, 4), {"parameters": text})
    values, _ = restore_settings(str(tmp_path / "drawn.png"), 0, home)
    assert [entry.tag.name for entry in values["used"]] == ["zorb@1", "zorb-v3", "style-v2"]


def test_what_is_painted_over_an_image_is_its_mask(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "image.png")
    layer = Image.new("RGBA", (8, 4))
    layer.paste((255, 0, 0, 90), (4, 0, 8, 4))
    layer.save(tmp_path / "layer.png")
    image, mask = prepare_source(tmp_path / "image.png", [tmp_path / "layer.png"], tmp_path)
    assert mask is not None
    with Image.open(image) as source, Image.open(mask) as painted:
        assert source.size == (8, 4)
        assert painted.tobytes() == bytes([0, 0, 0, 0, 255, 255, 255, 255]) * 4
    Image.new("RGBA", (8, 4)).save(tmp_path / "layer.png")
    assert prepare_source(tmp_path / "image.png", [tmp_path / "layer.png"], tmp_path)[1] is None
    (tmp_path / "image.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        prepare_source(tmp_path / "image.png", [], tmp_path)


def test_columns_share_prompt_and_seeds_and_are_of_one_adapter() -> None:
    base, second = requests_of_columns(DrawRequest("a <lora:x@1:1>", seed=9), "zorb", ["base", "zorb@2"], 0.5)
    assert base.prompt == "a <lora:x@1:1>"
    assert second == replace(base, prompt="a <lora:x@1:1> <lora:zorb@2:0.5>")
    for columns in ([], ["other@1"], ["base", "base"], [f"zorb@{number}" for number in range(9)]):
        with pytest.raises(SettingsError):
            requests_of_columns(DrawRequest("a"), "zorb", columns, 1.0)


def test_a_grid_varies_adapters_weights_and_words_over_a_fixed_adapter() -> None:
    axes, labels = axes_of([(ADAPTER, "", "zorb@1, zorb@2"), (WEIGHT, "", "0..1/3")])
    prompt = prompt_of("a ring <lora:x@1:1>", "none", 1.0, axes)
    rows = requests_of_grid(DrawRequest(prompt), axes)
    assert rows[1][0].prompt == "a ring <lora:x@1:1> <lora:zorb@1:0.5>"
    assert [axis.name for axis in labels] == ["adapter", "weight"]
    axes, _ = axes_of([(WORD, "ring", "star, cross")])
    assert prompt_of("a ring", "zorb@1", 0.5, axes) == "a ring <lora:zorb@1:0.5>"
    for side in [("other", "", "1"), (WORD, "", "1"), (WORD, "seed", "1"), (WEIGHT, "", "")]:
        with pytest.raises(SettingsError):
            axes_of([side])
    with pytest.raises(SettingsError, match="no varied adapter"):
        prompt_of("a", "none", 1.0, axes_of([(WEIGHT, "", "1")])[0])


def test_cards_have_what_a_user_chooses_by_and_withdrawn_versions_have_none(tmp_path: Path) -> None:
    home = Home.open(register_zorb(tmp_path))
    hint = Card(extra={"modelspec.usage_hint": "works best at weight 0.8"})
    bring_in(
        home,
        write_random(tmp_path / "a.safetensors", 1, form="loraline", card=hint),
        "<b>".strip("<>"),
        trigger="sks, two",
    )
    first, second = list_adapter_cards(home)
    assert (first.name, first.triggers, first.weight, first.license) == ("b", ("sks", "two"), 0.8, "MIT")
    assert (second.title, second.references) == ("Zorb", ("zorb@1",))
    assert [card.name for card in choose_cards([first, second], "SKS mit")] == ["b"]
    assert choose_cards([first, second], base="tiny") == (first, second)
    assert choose_cards([first, second], base="sdxl") == ()
    html = render_cards(home, [replace(first, title="<script>")])
    assert "<script>" not in html
    assert "recommended weight 0.8" in html


def test_a_card_shows_the_image_of_the_evaluation_and_metrics_are_compared(trained: Trained, tmp_path: Path) -> None:
    bring_in(trained.home, write_random(tmp_path / "b.safetensors", 2), "small")
    sample = read_card_sample(trained.home, "small@staging")
    assert sample is not None
    assert sample[8:12] == b"WEBP"
    assert read_card_sample(trained.home, "small@2") is None
    rows = tabulate_metrics(trained.home, ["small@1", "small@2"])
    value = trained.version().metrics["validation_loss"]["adapter"]
    assert ["validation_loss", f"{value:.4g}", ""] in rows


def test_files_of_the_page_keep_their_bytes_and_are_deleted_when_they_are_old(tmp_path: Path) -> None:
    files = PageFiles(tmp_path / "studio")
    old = Path(files.write(b"old", "1.png"))
    os.utime(old.parent, (time.time() - 1e6,) * 2)
    new = Path(files.write(b"new", "1.png"))
    assert (new.read_bytes(), old.exists()) == (b"new", False)
    PageFiles(tmp_path / "studio")
    assert not new.exists()


def test_errors_and_notes_are_escaped() -> None:
    assert "<b>" not in show_error(SettingsError("a <b>"))
    assert "a.com&lt;b&gt; <code>run x</code>" in show_note("a.com<b> `run x`")
    assert constant(0.5).is_constant
