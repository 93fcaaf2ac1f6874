"""The sections of the report about memorization, strength, noise levels, weights, defaults and rights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.images import write_image
from lora_engine.errors import DataError
from lora_engine.evaluation.chart import draw_bands, draw_spectra
from lora_engine.evaluation.details import (
    DETAILS,
    Band,
    Details,
    ModuleWeights,
    Neighbors,
    Strength,
    Sweep,
    read_details,
    write_details,
)
from lora_engine.evaluation.report import render_report
from lora_engine.evaluation.sections import default_recipe, fold_defaults

HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}"
REPORT = {
    "metrics": {},
    "gates": [],
    "samples": [],
    "measured_on": "heldout",
    "trigger": None,
    "class_word": None,
    "base": {"name": "tiny", "family": "sd", "fingerprint": "ab" * 32},
    "adapter": {"sha256": "cd" * 32},
    "embedder": {"name": "tiny/clip", "sha256": "ef" * 32},
}


def details(**change: Any) -> Details:
    images = [f"pictures/x-{index}.png" for index in range(4)]
    plain: dict[str, Any] = {
        "bands": [
            Band(low=k / 5, high=(k + 1) / 5, losses={"base": 0.5 - k / 20, "candidate": 0.4}, training={"base": 0.3})
            for k in range(5)
        ],
        "neighbors": [
            Neighbors(
                prompt=f"a zorb {HOSTILE}",
                image=images[0],
                training=images[1],
                training_similarity=0.987,
                heldout=images[2],
                heldout_similarity=0.612,
                is_copy=True,
            ),
            Neighbors(prompt="a blue zorb", image=images[3], training=images[1], training_similarity=0.5),
        ],
        "sweep": Sweep(
            prompts=("a red zorb",),
            strengths=tuple(
                Strength(strength=s, images=(images[k],), agreement=0.2 + s / 10) for k, s in enumerate((0, 0.5, 1.25))
            ),
            zero_is_base=True,
        ),
        "modules": {
            "unet.mid.to_q": ModuleWeights(
                kind="lora", rank=8, effective_rank=3.25, norm=1.5, largest=0.2, spectrum=(1.0, 0.1, 0.01)
            ),
            "unet.mid.to_k": ModuleWeights(kind="lora", rank=8, norm=0.0, largest=0.0, notes=("changes nothing",)),
        },
        "notes": ["The base reproduces the real images with 12 dB."],
    }
    return Details(**{**plain, **change})


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., str]:
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        write_image(tmp_path / f"pictures/x-{index}.png", Image.fromarray(noise))

    def render(about: Details | None = None, **options: Any) -> str:
        write_details(tmp_path, details() if about is None else about)
        return render_report("zorb", REPORT, tmp_path, **options)

    return render


def test_every_section_shows_its_details(page: Callable[..., str]) -> None:
    text = re.sub(r"\s+", " ", page())
    for shown in (
        "The base reproduces the real images with 12 dB.", "Memorization", "0.987", "0.612",
        '<span class="mark">copy</span>', "a blue zorb", "Strength 0 equals the base bit for bit", "1.25", "0.325",
        "Loss by noise level", "0.3500", "training 0.3000", "40 to 60 %", "1 of 2 modules have notes",
        "changes nothing", "unet.mid.to_q", "3.2", 'class="spectrum"', 'class="role-1"',
    ):  # fmt: skip
        assert shown in text, shown
    assert "<script>" not in text
    assert "{{ 7 * 7 }}" in text
    assert text.count("data:image/png") == 2 + 3 + 3


def test_a_report_without_details_has_none_of_the_sections(page: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / DETAILS).unlink(missing_ok=True)
    text = render_report("zorb", REPORT, tmp_path)
    for section in ("neighbors", "strengths", "bands", "weights", "rights", "recipe"):
        assert f'id="{section}"' not in text
    assert read_details(tmp_path) == Details()


def test_a_strength_of_0_that_differs_from_the_base_is_said(page: Callable[..., str]) -> None:
    sweep = details().sweep
    assert sweep is not None
    assert "Strength 0 differs from the base" in page(details(sweep=sweep.model_copy(update={"zero_is_base": False})))


def test_settings_with_their_default_are_folded_away(page: Callable[..., str]) -> None:
    folded = fold_defaults([("rank", "8"), ("batch", "6"), ("unknown", "1")], {"rank": "8", "batch": "4"})
    assert folded == {"set": [("batch", "6"), ("unknown", "1")], "default": [("rank", "8")]}
    assert default_recipe()["rank"] == 8
    text = page(recipe={"rank": 8, "batch": 6, "schedule": {"name": "cosine"}})
    shown, hidden = text.split('id="recipe"')[1].split("<details>", 1)
    assert "batch" in shown
    assert "rank" not in shown
    assert all(name in hidden for name in ("rank", "schedule.name", "2 settings with their default"))


def test_rights_are_shown_and_escaped(page: Callable[..., str]) -> None:
    text = page(rights={"license": HOSTILE, "training images": "12, 0 without consent", "revoked": []})
    section = text.split('id="rights"')[1].split("</section>")[0]
    assert "12, 0 without consent" in section
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7 * 7 }}" in section
    assert "revoked" not in section


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"neighbors": [{"prompt": "a"}]}, "neighbors.0.image"),
        ({"bands": [{"low": -1, "high": 1, "losses": {}}]}, "bands.0.low"),
        ({"modules": {"a": {"kind": "lora", "largest": 1, "spectrum": [1.0] * 17}}}, "spectrum"),
    ],
)
def test_broken_details_are_refused(tmp_path: Path, broken: dict[str, Any], problem: str) -> None:
    (tmp_path / DETAILS).write_text(json.dumps(broken))
    with pytest.raises(DataError, match=problem) as error:
        read_details(tmp_path)
    assert "evaluate again" in str(error.value)


def test_an_image_outside_of_the_report_is_refused(page: Callable[..., str]) -> None:
    outside = details(neighbors=[Neighbors(prompt="", image="../x.png", training="a.png", training_similarity=0)])
    with pytest.raises(DataError, match=re.escape("'../x.png'")):
        page(outside)


def test_the_charts_of_bands_and_spectra_keep_their_points_inside() -> None:
    chart = draw_bands([(0.1, [0.5, 0.0]), (0.5, [0.2, 3.0]), (0.9, [0.1, 0.1])])
    spectra = draw_spectra([[5.0, 1e-9], [2.0, 1.0, 0.5], [], [0.0]])
    for text in (chart, spectra):
        points = [
            tuple(map(float, pair.split(",")))
            for path in re.findall(r'points="([^"]+)"', str(text))
            for pair in path.split()
        ]
        assert points
        assert all(0 <= x <= 540 and 0 <= y <= 270 and math.isfinite(x + y) for x, y in points)
    assert str(spectra).count("<polyline") == 2
    assert draw_bands([(0.5, [1.0])]) is None
    assert draw_spectra([[0.0], []]) is None
