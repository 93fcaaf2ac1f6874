"""`loraline generate` with the syntax of docs/prompts.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_engine.inference.prompts.prompt import parse_prompt
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, copy_trained

PAGE = Path(__file__).resolve().parents[2] / "docs" / "prompts.md"


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("prompts") / "trained")


def _draw(prompt: str, small: Trained, folder: Path, *more: str) -> np.ndarray:
    say("generate", prompt, "-o", folder, "-n", 1, "--steps", 3, *more, home=small.home.path)
    return np.asarray(Image.open(folder / "0.png").convert("RGB"), dtype=int)


def test_schedules_parts_and_negative_prompts_reach_the_image(small: Trained, tmp_path: Path) -> None:
    plain = _draw("a zorb", small, tmp_path / "plain")
    constant = _draw("a zorb <lora:small@1:1>", small, tmp_path / "constant")
    assert np.abs(constant - plain).max() > 0
    for number, weight in enumerate(("1@0,1@1", "1:start=1:stop=3", "te=1:unet=1", "1:1")):
        drawn = _draw(f"a zorb <lora:small@1:{weight}>", small, tmp_path / f"equal-{number}")
        assert np.array_equal(drawn, constant)
    others = {
        "early": "a zorb <lora:small@1:1:stop=1>",
        "edited": "a [zorb:cube:1]",
        "two": "a zorb AND a cube",
        "heavy": "a (zorb:1.6)",
    }
    for name, prompt in others.items():
        assert not np.array_equal(_draw(prompt, small, tmp_path / name), plain), name
    for name, more in {"negative": ("--negative", "red"), "euler": ("--sampler", "Euler a")}.items():
        assert not np.array_equal(_draw("a zorb", small, tmp_path / name, *more), plain)


def test_a_grid_draws_each_cell_as_it_would_be_alone(small: Trained, tmp_path: Path) -> None:
    prompt, out = "a zorb <lora:small@1:W>", tmp_path / "grid"
    axes = ("-x", "W=0..1/3", "-y", "seed=4,5", "--gif", "--steps", 2)
    listed = say("generate", prompt, "-o", out, *axes, home=small.home.path).split()
    assert {path.name for path in out.iterdir()} >= {"grid.png", "animation.gif", "00-00.png", "01-02.png"}
    assert sum(line.endswith((".png", ".gif")) for line in listed) == 8
    say(
        "generate",
        "a zorb <lora:small@1:0.5>",
        "-o",
        tmp_path,
        "-n",
        1,
        "--seed",
        5,
        "--steps",
        2,
        home=small.home.path,
    )
    assert (tmp_path / "5.png").read_bytes() == (out / "01-01.png").read_bytes()
    with Image.open(out / "animation.gif") as animation:
        assert animation.n_frames == 3
    refused = loraline_here("generate", "a zorb", "-o", tmp_path / "no", "-x", "steps=0", home=small.home.path)
    assert refused.returncode == 1
    assert "steps of 1 or more" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:smal@1>", "'small'"),
        ("a zorb <lora:small@1:x>", "character 8"),
        ("a [b|c:0.5]", "character 3"),
        ("a <lora:small@1:1:lbw=1,2>", "2 values"),
        (f"a <lora:small@1:1:lbw={','.join(['1'] * 61)}>", "not for a base of the family"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_and_nothing_is_drawn(
    prompt: str, message: str, small: Trained, tmp_path: Path
) -> None:
    done = loraline_here("generate", prompt, "-o", tmp_path / "out", "-n", 1, home=small.home.path)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_each_tag_of_the_page_is_read() -> None:
    tags = re.findall(r"`(<lora:[^`]+>)`", PAGE.read_text())
    assert len(tags) > 6
    for tag in tags:
        assert parse_prompt(f"a {tag}").adapters[0].name.startswith(("zorb@3", "NAME"))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ('{"adapters": []}', "generated without an adapter"),
        ("{", "not JSON"),
        ("[]", "names no adapters as Loraline does"),
        ('{"adapters": [{"reference": "a@1", "sha256": "../x"}]}', "names no adapters as Loraline does"),
        (json.dumps({"adapters": [{"reference": "a@1", "sha256": "a" * 64}]}), "a" * 64),
    ],
)
def test_lineage_of_an_image_that_names_no_known_adapter_is_refused(
    chunk: str, message: str, small: Trained, tmp_path: Path
) -> None:
    info = PngInfo()
    info.add_text("loraline", chunk)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    done = loraline_here("lineage", tmp_path / "a.png", home=small.home.path)
    assert done.returncode == 1
    assert message in done.stderr
