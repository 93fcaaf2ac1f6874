"""Sample prompts with options in the syntax of sd-scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.bases.base import load_base
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import SettingsError
from lora_engine.inference.generate import generate
from lora_engine.training.samples import SampleWriter
from lora_engine.training.specs.sample_prompts import SampleRequest
from lora_engine.training.specs.samples import Samples


def samples(*prompts: str, **change: Any) -> Samples:
    return Samples.model_validate({"every": 1, "steps": 2, "prompts": list(prompts), **change})


def test_options_follow_the_text_in_any_order() -> None:
    # The example of sd-scripts' documentation.
    prompt = "1girl, upper body --n low quality, bad anatomy --w 768 --h 512 --d 1 --l 7.5 --s 28"
    expected = SampleRequest(0, "1girl, upper body", 1, 28, 7.5, "low quality, bad anatomy", 768, 512)
    assert samples(prompt).requests() == (expected,)
    assert samples(
        "1girl, upper body --s 28 --l 7.5 --d 1 --h 512 --w 768 --n low quality, bad anatomy"
    ).requests() == (expected,)


def test_a_prompt_without_options_is_drawn_with_every_seed() -> None:
    requests = samples("a well-known ring -- blue", "b --d 9", seeds=[1, 2], guidance=2.0).requests()
    assert [(request.number, request.text, request.seed) for request in requests] == [
        (0, "a well-known ring -- blue", 1),
        (0, "a well-known ring -- blue", 2),
        (1, "b", 9),
    ]
    assert {request.settings for request in requests} == {(2, 2.0, "", None, None)}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a --x 3", "unknown option '--x'; known are --w, --h, --n, --s, --l, --d"),
        ("a --ar 16:9", "unknown option '--ar'"),
        ("a --w 65", "--w is '65'; allowed: a multiple of 8"),
        ("a --w 8000", "--w is '8000'"),
        ("a --h", "--h is ''"),
        ("a --s 0", "--s is '0'; allowed: 1 to 1000"),
        ("a --l nan", "--l is 'nan'"),
        ("a --l 1e9", "--l is '1e9'"),
        ("a --d -1", "--d is '-1'"),
        ("a --s 3 --s 4", "sets '--s' twice"),
        ("--w 64", "options only"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        samples(prompt)
    assert problem in str(caught.value)


def test_each_sample_has_its_own_size_seed_and_negative_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    settings = samples("a ring --w 16 --h 24 --n red --d 5", "a ring", seeds=[1, 2])
    writer = SampleWriter(base, settings, tmp_path, "a" * 64)
    writer.draw(1)
    files = {path.name: read_pixels(path) for path in tmp_path.rglob("*.png")}
    height, width = base.default_size
    assert {name: tuple(pixels.shape[1:]) for name, pixels in files.items()} == {
        "00-5.png": (24, 16),
        "01-1.png": (height, width),
        "01-2.png": (height, width),
    }
    alone = generate(base, ["a ring"], seeds=[5], steps=2, guidance=3.0, negative="red", width=16, height=24)[0]
    torch.testing.assert_close(files["00-5.png"], alone.clamp(-1, 1), rtol=0, atol=1 / 127)
    assert not torch.equal(files["01-1.png"], files["01-2.png"])


def test_a_size_that_the_base_cannot_draw_is_refused_before_the_training(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    SampleWriter(base, samples("a --w 24 --h 24"), tmp_path, "a" * 64)
    monkeypatch.setattr(type(base), "_patch", 8)  # of a transformer
    with pytest.raises(SettingsError, match="cannot generate images of 24 x 24"):
        SampleWriter(base, samples("a --w 24 --h 24"), tmp_path, "a" * 64)
