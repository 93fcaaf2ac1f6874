"""Optional metrics, strengths and a second adapter: set in a pipeline file, shown by the report verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.spec import load_spec
from lora_engine.bases.tiny import folder as tiny_folder
from lora_engine.errors import BaseModelError
from registry.entities import AdapterVersion
from registry.home import Home
from registry.store.artifacts import open_store
from tasks.errors import SpecError
from tasks.job import prepare_job
from tests.flows.commands import say
from tests.flows.conftest import draw_noise
from tests.flows.made import bring_in, run_line, write_random
from tests.support.untrained_captioners import write_captioner, write_judge

PIPELINE = f"""\
name: zorb
base: tiny
seed: 7
steps:
  photos:   {{uses: ingest, images: images/, heldout: 0.5}}
  captions: {{uses: caption, dataset: photos, captioner: template, trigger: sks, class_word: star}}
  report:
    uses: evaluate
    adapter: one@1
    combined: two@1
    dataset: captions
    seeds: 1
    steps: 1
    extra: [class_drift, kid]
    strengths: [0, 1]
    face_embedder: {tiny_folder() / "clip"}
    judge: models/judge
    gates: {{unrelated_drift: {{max: 1.9, of: adapter}}, clip_t: {{min: -2, against: combined}}}}
  release:  {{uses: register, adapter: one@1, report: report}}
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, AdapterVersion, Path]:
    folder = tmp_path_factory.mktemp("sections")
    (folder / "images").mkdir()
    for index in range(4):
        draw_noise(folder / "images" / f"{index}.png", index)
    write_judge(folder / "models" / "judge")
    home = Home.open(folder / "home")
    for seed, name in enumerate(("one", "two")):
        bring_in(home, write_random(folder / f"{name}.safetensors", seed), name)
    (folder / "line.yaml").write_text(PIPELINE)
    return home, run_line(folder / "line.yaml", home), folder


def test_the_report_has_what_the_pipeline_file_asks_for(evaluated: tuple[Home, AdapterVersion, Path]) -> None:
    home, version, _ = evaluated
    assert version.report is not None
    report: dict[str, Any] = json.loads(open_store(home).read(version.report, "report.json"))
    assert {"class_drift", "unrelated_drift"} <= report["metrics"].keys()
    assert "96 are needed" in report["unmeasured"]["kid"]
    assert report["unmeasured"]["identity"] == "no training image shows exactly one face"
    assert {gate["metric"]: gate["passed"] for gate in report["gates"]} == {"unrelated_drift": True, "clip_t": True}
    assert report["judge"]["name"] == "judge"
    assert {"judged_agreement", "judged_preference", "judged_likeness"} <= report["metrics"].keys()
    assert str(tiny_folder()) not in json.dumps(report), "the report names no folder of this machine"
    combined = report["comparisons"]["combined"]
    assert 0.0 <= combined["judged_preference"]["other"] <= 1.0
    assert combined["drift_pixels"]["other"] != combined["drift_pixels"]["adapter"] > 0.0


def test_the_page_shows_it(evaluated: tuple[Home, AdapterVersion, Path], tmp_path: Path) -> None:
    home, *_ = evaluated
    say("report", "zorb@1", "-o", tmp_path / "page.html", home=home.path)
    page = (tmp_path / "page.html").read_text()
    for text in (
        "Strength 0 equals the base bit for bit", "Drift of the class", "Unrelated prompts", "Memorization",
        "Loss by noise level", "modules</summary>", "License and consent", "MIT", "cannot draw such images",
        "Likeness by the judge", "Judge judge <code>",
    ):  # fmt: skip
        assert text in page, text


def test_the_embedder_of_faces_and_the_judge_are_part_of_the_key_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    judge = write_captioner(tmp_path / "models" / "judge", "llava")

    def key_of(text: str) -> str:
        (tmp_path / "line.yaml").write_text(text)
        spec = load_spec(tmp_path / "line.yaml")
        return prepare_job("report", spec.steps["report"], spec.folder).key({})

    other = shutil.copytree(tiny_folder() / "clip", tmp_path / "faces")
    named = PIPELINE.replace(str(tiny_folder() / "clip"), "faces")
    assert key_of(named) == key_of(PIPELINE), "the name of a folder changes nothing"
    assert key_of(PIPELINE.replace("    face_embedder", "    # face_embedder")) != key_of(PIPELINE)
    shutil.copytree(judge, tmp_path / "other")
    moved = PIPELINE.replace("judge: models/judge", "judge: other")
    assert key_of(moved) == key_of(PIPELINE), "the name of a folder changes nothing"
    assert key_of(PIPELINE.replace("    judge:", "    # judge:")) != key_of(PIPELINE)
    (tmp_path / "other" / "generation_config.json").write_text("{}")
    assert key_of(moved) != key_of(PIPELINE)
    (other / "preprocessor_config.json").write_text("{}")
    assert key_of(named) != key_of(PIPELINE)
    write_captioner(tmp_path / "blip", "blip")
    for name, problem in (("blip", "answers no questions"), ("nowhere", "unknown judge 'nowhere'")):
        with pytest.raises(BaseModelError, match=problem):
            key_of(PIPELINE.replace("judge: models/judge", f"judge: {name}"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("[class_drift, kid]", "[clip_t]"), "'clip_t' is not an optional metric; allowed:"),
        (("    combined: two@1\n", ""), "against 'combined'; allowed: base"),
        (("strengths: [0, 1]", "strengths: [11]"), "strengths"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_runs(change: tuple[str, str], problem: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "line.yaml").write_text(PIPELINE.replace(*change))
    with pytest.raises(SpecError, match=problem):
        load_spec(tmp_path / "line.yaml")
