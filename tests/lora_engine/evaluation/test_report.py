from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.images import write_image
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError
from lora_engine.evaluation.chart import draw_loss, nice_ticks
from lora_engine.evaluation.report import render_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def metric(difference: float, interval: list[float] | None, verdict: str = "better") -> dict[str, Any]:
    return {
        "base": 0.5,
        "adapter": 0.5 + difference,
        "difference": difference,
        "interval": interval,
        "n": 4,
        "better": "higher",
        "verdict": verdict,
    }


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    for index, role in enumerate(("base", "adapter", "reference")):
        noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        write_image(tmp_path / "report" / f"pictures/00-{role}.png", Image.fromarray(noise))
    sample = {role: f"pictures/00-{role}.png" for role in ("base", "adapter", "reference")}
    return {
        "metrics": {"clip_i_paired": metric(0.2, [0.1, 0.3]), "clip_t": metric(-0.1, None, "unclear")},
        "gates": [
            {"metric": "clip_t", "of": "difference", "min": 0.0, "max": None, "value": -0.1, "passed": False},
            {"metric": "clip_i_paired", "of": "difference", "min": 0.1, "max": 1.0, "value": 0.2, "passed": True},
        ],
        "passed": False,
        "samples": [{"kind": "paired", "prompt": "a red zorb", "seed": 5, **sample}],
        "measured_on": "heldout",
        "trigger": "zorb",
        "class_word": "star",
        "base": {"name": "tiny", "family": "sd", "fingerprint": "ab" * 32},
        "adapter": {"sha256": "cd" * 32},
        "embedder": {"name": "tiny/clip", "sha256": "ef" * 32},
    }


@pytest.fixture
def render(tmp_path: Path, report: dict[str, Any], make_dataset: Callable[..., Path]) -> Callable[..., str]:
    dataset = make_dataset()

    def page(title: str = "crescents", **change: Any) -> str:
        plain: dict[str, Any] = {
            "training": {"loss": [[k, 1.0 / k] for k in range(1, 60)], "validation_loss": [[1, 1.0], [50, 0.1]]},
            "dataset_folder": dataset,
            "recipe": {"rank": 8, "prior": {"weight": 1.0}, "targets": ["attention", "unet.*"], "alpha": None},
            "lineage": [
                {"step": "photos", "uses": "ingest", "output": "1" * 64, "inputs": {}},
                {
                    "step": "adapter",
                    "uses": "train",
                    "output": "2" * 64,
                    "inputs": {"dataset": "1" * 64, "x": "3" * 64},
                },
            ],
            "version": {"name": "crescents", "version": 3, "sha256": "9" * 64},
        }
        return render_report(title, report, tmp_path / "report", **{**plain, **change})

    return page


def test_the_page_has_no_scripts_and_no_external_resources(render: Callable[..., str]) -> None:
    elements = Tags(render()).elements
    assert {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "form"} == set()
    assert all(not name.startswith("on") for _, attributes in elements for name in attributes)
    sources = [attributes["src"] or "" for _, attributes in elements if "src" in attributes]
    assert len(sources) == 3 + 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert [attributes for _, attributes in elements if "href" in attributes] == []


def test_the_page_shows_every_part_of_the_report(render: Callable[..., str]) -> None:
    page = render()
    for text in (
        "1 of 2 gates failed", "a red zorb", "seed 5", "Likeness to the real image", "+0.200", "+0.100 to +0.300",
        "at least 0.1 and at most 1", "prior.weight", "attention, unet.*", "photos", "333333333333", "cut.png",
        "is broken", "crescents 3", "9" * 64, "&lt;lora:crescents:1&gt;", "2 held out", "none below 6 groups",
    ):  # fmt: skip
        assert text in page, text
    assert "from photos, 333333333333" in page
    assert "Measured on the training images" not in page


def test_the_page_is_the_same_each_time(render: Callable[..., str]) -> None:
    assert render() == render()


def test_nothing_from_a_file_becomes_markup(
    render: Callable[..., str], report: dict[str, Any], make_dataset: Callable[..., Path]
) -> None:
    dataset = make_dataset("hostile")
    manifest = Manifest.load(dataset)
    hostile = tuple(p.model_copy(update={"caption": HOSTILE, "source": HOSTILE}) for p in manifest.pictures)
    quarantined = tuple(q.model_copy(update={"source": HOSTILE, "reason": HOSTILE}) for q in manifest.quarantined)
    manifest.model_copy(update={"pictures": hostile, "quarantined": quarantined}).save(dataset)
    plain = len(Tags(render()).elements)
    report["samples"][0]["prompt"] = report["trigger"] = report["class_word"] = report["base"]["name"] = HOSTILE
    page = render(
        HOSTILE,
        dataset_folder=dataset,
        recipe={HOSTILE: HOSTILE, "rank": 8, "a": 1, "b": 2},
        version={"name": HOSTILE, "version": HOSTILE, "sha256": HOSTILE, "aliases": [HOSTILE]},
    )
    elements = Tags(page).elements
    assert len(elements) == plain
    assert [tag for tag, _ in elements if tag == "script"] == []
    assert [attributes for _, attributes in elements if "onerror" in attributes] == []
    assert "{{ 7 * 7 }}" in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "pictures/../../secret.png", "secret.png", 7])
def test_a_report_cannot_show_files_outside_its_folder(
    render: Callable[..., str], report: dict[str, Any], tmp_path: Path, name: Any
) -> None:
    for folder in (tmp_path, tmp_path / "report"):
        write_image(folder / "secret.png", Image.new("RGB", (8, 8)))
    report["samples"][0]["base"] = name.format(tmp_path) if isinstance(name, str) else name
    with pytest.raises(DataError, match="invalid image name"):
        render()


def test_a_missing_image_is_an_error(render: Callable[..., str], report: dict[str, Any]) -> None:
    report["samples"][0]["base"] = "pictures/gone.png"
    with pytest.raises(DataError, match=r"gone\.png"):
        render()


def test_a_bare_report_has_a_page_too(report: dict[str, Any], tmp_path: Path) -> None:
    report |= {"gates": [], "samples": [], "measured_on": "training", "trigger": None, "class_word": None}
    page = render_report("merged", report, tmp_path)
    assert "No gates set" in page
    assert "Measured on the training images" in page
    assert "Training loss" not in page


def test_large_images_are_downscaled(render: Callable[..., str], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 700, 3), dtype=np.uint8)
    write_image(tmp_path / "report" / "pictures/00-base.png", Image.fromarray(noise))
    shown = [a for tag, a in Tags(render()).elements if tag == "img" and (a["src"] or "").startswith("data:image/jpeg")]
    assert [(item["width"], item["height"]) for item in shown] == [("398", "512")]


def test_the_curve_skips_values_that_are_not_finite_and_needs_two_points() -> None:
    assert draw_loss([]) is None
    assert draw_loss([[1, float("nan")], [2, 0.5]]) is None
    chart = draw_loss([[k, 5.0 if k == 1 else 0.5 + 0.1 * (k % 2)] for k in range(1, 20_000)] + [[7, float("inf")]])
    assert chart is not None
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(chart) < 30_000


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.53), (1.0, 400.0), (0.0, 1e-9), (0.0, 12_345.0), (3.0, 3.0)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 11
    assert ticks == sorted(ticks)
    assert all(low - 1e-12 <= tick <= max(high, low) + 1e-9 for tick in ticks)


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_image_and_no_horizontal_overflow(
    render: Callable[..., str], tmp_path: Path, width: int
) -> None:
    # The page forbids scripts; this copy drops the policy and measures itself.
    probe = (
        "<script>document.title = [...document.images].filter(i => i.naturalWidth > 0 && i.clientWidth > 20).length"
        " + '/' + document.images.length + ' ' + (document.documentElement.scrollWidth <= innerWidth)</script></body>"
    )
    page = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", render()).replace("</body>", probe)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    offline = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", *offline, f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2000", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>6/6 true</title>" in done.stdout
    with Image.open(tmp_path / "page.png") as shot:
        assert len(set(shot.convert("RGB").resize((200, 200)).get_flattened_data())) > 500


def test_samples_of_the_training_are_strips_over_the_steps_from_the_base_on(
    report: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    for step in range(0, 1500, 100):
        shade = Image.new("RGB", (8, 8), (step % 256, 0, 0))
        for seed in (1, 2):
            write_image(folder / f"samples/step-{step:06d}/00-{seed}.png", shade)
    about = {"prompts": [HOSTILE], "seeds": [1, 2]}
    (folder / "samples" / "samples.json").write_text(json.dumps(about))
    page = render_report("zorb", report, tmp_path / "report", adapter_folder=folder)
    shown = [int(number) for number in re.findall(r'class="label">step ([0-9]+)<', page)]
    assert len(shown) == 24, "two seeds with at most twelve columns"
    assert shown[:12] == shown[12:] == sorted(set(shown))
    assert (shown[0], shown[11]) == (0, 1400)
    assert "<script>" not in page
    assert 'id="strips"' not in render_report("zorb", report, tmp_path / "report", adapter_folder=tmp_path)


def test_warnings_of_the_steps_are_listed_as_text(report: dict[str, Any], tmp_path: Path) -> None:
    lineage = [{"step": "adapter", "uses": "train", "output": "0" * 64, "warnings": [HOSTILE]}, {"step": "report"}]
    page = render_report("zorb", report, tmp_path / "report", lineage=lineage)
    assert page.count("alert(1)") == 1
    assert "<script>" not in page
    assert 'id="warnings"' not in render_report("zorb", report, tmp_path / "report", lineage=lineage[1:])


def test_what_the_training_chose_is_listed_with_the_reason(report: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"from": [20, 40, 60], "step": 40, "by": "validation_loss", "on": [], "score": 0.1, "leave_one_out": 0.2}
    training = {
        "chosen": chosen,
        "candidates": {"why": HOSTILE},
        "automatic": {
            "learning_rate": {"chosen": 0.002, "losses": [[0.002, 0.25], [0.004, None]], "why": "the one below"},
            "targets": {"chosen": "all", "blocks": [["unet.mid", 0.5, True]]},
        },
    }
    page = render_report("zorb", report, tmp_path / "report", training=training)
    assert "step 40, chosen among 3 by validation_loss 0.1; corrected for the choice: 0.2 (leave-one-out)" in page
    assert "0.002 (0.002: 0.25, 0.004: diverged)" in page
    assert "all (unet.mid: 50.0%)" in page
    assert "<script>" not in page
    assert 'id="choices"' not in render_report("zorb", report, tmp_path / "report", training={})
