"""Options of the base that adapters state, in recipes and in headers of other programs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lora_engine.bases.base import load_base
from lora_engine.bases.options import BaseOptions, differing_options, options_of_cards, shared_options
from lora_engine.errors import SettingsError
from lora_engine.formats.card import Card, stated_options
from lora_engine.training.initial import read_initial
from tests.flows.made import write_random

SD = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
VELOCITY = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.prediction_type": "v"}


def external(**header: str) -> Card:
    return Card(extra=header)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (SD | {"ss_clip_skip": "2"}, {"clip_skip": 2}),
        ({"ss_v2": "False", "ss_clip_skip": "2"}, {"clip_skip": 2}),
        (SD | {"ss_clip_skip": "1"}, {}),
        (SD | {"ss_clip_skip": "None"}, {}),
        (SD | {"ss_clip_skip": "-3"}, {}),
        (SD | {"ss_clip_skip": "9" * 5000}, {}),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_clip_skip": "2"}, {}),
        ({"ss_base_model_version": "flux1", "ss_clip_skip": "2", "modelspec.prediction_type": "v"}, {}),
        (VELOCITY, {"prediction": "v_prediction"}),
        (VELOCITY | {"ss_zero_terminal_snr": "True"}, {"prediction": "v_prediction", "zero_terminal_snr": True}),
        (SD | {"ss_zero_terminal_snr": "True"}, {}),
        ({"ss_base_model_version": "sd_v2_v", "ss_v2": "True"}, {"prediction": "v_prediction"}),
        ({"ss_base_model_version": "sd_v2", "ss_v2": "True"}, {}),
        (SD | {"modelspec.prediction_type": "epsilon"}, {}),
    ],
)
def test_headers_of_other_programs_state_options(header: dict[str, str], expected: dict[str, Any]) -> None:
    card = external(**header)
    assert stated_options(card) == expected
    assert options_of_cards([card]).key() == expected
    imported = Card(recipe={"imported": {"file": "x"}, "parents": ["base:tiny"]}, extra=card.extra)
    assert options_of_cards([imported]).key() == expected
    assert shared_options([imported]) == expected


def test_an_imported_file_of_ours_has_the_options_of_its_training() -> None:
    made = {"clip_skip": 2, "prediction": "v_prediction"}
    imported = Card(recipe={"imported": {"file": "x"}, "made": {"imported": {}, "made": made}}, extra=SD)
    assert options_of_cards([imported]) == BaseOptions(2, "v_prediction")
    assert stated_options(imported) == made


def test_headers_that_differ_are_warned_about_and_recipes_win(caplog: pytest.LogCaptureFixture) -> None:
    one, two = external(**SD, ss_clip_skip="2"), external(**SD, ss_clip_skip="3")
    silent, own = Card(), Card(recipe={"method": "finetune"})
    with caplog.at_level(logging.WARNING):
        assert options_of_cards([one, silent]).clip_skip == 2
        assert caplog.text == ""
        assert options_of_cards([one, two]).clip_skip is None
    assert "different values of clip_skip (2, 3); that of the base is used" in caplog.text
    assert options_of_cards([one, own]).clip_skip is None
    assert options_of_cards([one, two], clip_skip=4).clip_skip == 4
    assert options_of_cards([one, Card(recipe={"clip_skip": 3})]).clip_skip == 3
    with pytest.raises(SettingsError, match="different values of clip_skip"):
        options_of_cards([own, Card(recipe={"clip_skip": 3})])


def test_options_are_compared_with_those_of_another_training() -> None:
    card = Card(recipe={"clip_skip": 2, "method": "finetune"})
    assert differing_options(card, BaseOptions(2)) == []
    assert differing_options(card, BaseOptions(zero_terminal_snr=True, clip_skip=3)) == [
        "clip_skip 2, not 3",
        "zero_terminal_snr None, not True",
    ]
    assert differing_options(external(**SD, ss_clip_skip="2"), BaseOptions(prediction="v_prediction")) == [
        "clip_skip 2, not None"
    ]
    assert differing_options(Card(), BaseOptions(clip_skip=2)) == []
    vae = Card(recipe={"vae": {"name": "fix", "sha256": "0" * 64}})
    assert differing_options(vae, BaseOptions()) == ["vae 'fix', not None"]


def test_init_that_was_trained_with_other_options_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_random(tmp_path / "init.safetensors", 1, form="loraline", card=Card(recipe={"clip_skip": 2}))
    with caplog.at_level(logging.WARNING):
        read_initial(file, load_base("tiny", device="cpu", options=BaseOptions(2)))
        assert "clip_skip" not in caplog.text
        read_initial(file, load_base("tiny", device="cpu"))
    assert "init was trained with clip_skip 2, not None" in caplog.text
