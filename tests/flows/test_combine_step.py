"""Tests the step `combine` through pipeline files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.spec import load_spec
from registry.home import Home
from tasks.errors import SpecError
from tasks.job import prepare_job
from tasks.steps.combine import Combine
from tests.flows.made import run_line
from tests.flows.shared import draw_noise, training_here

Write = Callable[..., Path]
TWO = """\
name: try
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/}
  others:   {uses: ingest, images: others/}
  both:     {uses: combine, datasets: [{from: photos, repeats: 2, prefix: "a sketch, "}, others]}
  prepared: {uses: preprocess, dataset: both, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2}
  release:  {uses: register, adapter: adapter}
"""


@pytest.fixture
def two(pipeline: Write, tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "others").mkdir(exist_ok=True)
        draw_noise(tmp_path / "others" / "0.png", 9)
        return pipeline(text, images=2)

    return write


def test_a_training_on_two_datasets_has_the_images_of_both(two: Callable[[str], Path], home: Path) -> None:
    path = two(TWO)
    with training_here():
        version = run_line(path, Home.open(home))
    assert len(version.card["data"]) == 3
    combined = load_spec(path).steps["both"]
    assert isinstance(combined, Combine)
    assert (combined.datasets, [part.repeats for part in combined.parts]) == (("photos", "others"), [2, 1])


def test_settings_of_a_dataset_are_in_the_key_and_names_are_not(two: Callable[[str], Path]) -> None:
    def key(text: str) -> str:
        spec = load_spec(two(text))
        return prepare_job("both", spec.steps["both"], spec.folder).key({})

    assert key(TWO) == key(TWO.replace("others:", "more:").replace(", others]", ", more]"))
    assert key(TWO) == key(TWO.replace(", others]", ", {from: others}]"))
    assert key(TWO) != key(TWO.replace("repeats: 2", "repeats: 3"))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("repeats: 2", "repeat: 2", "repeat"),
        ("repeats: 2", "repeats: 0", "greater than or equal to 1"),
        ("from: photos", "from: photo", "did you mean 'photos'"),
        ("{from: photos, ", "{", "both"),
        (", others]", ", adapter]", "a step that produces a adapter"),
    ],
)
def test_mistakes_are_refused(two: Callable[[str], Path], before: str, after: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(two(TWO.replace(before, after)))
    assert message in str(caught.value)
    assert "pipeline.yaml:7" in str(caught.value)
