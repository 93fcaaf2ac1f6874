from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.spec import load_spec
from tasks.errors import SpecError

Write = Callable[..., Path]

WHOLE = """\
name: stripes
base: tiny
seed: 7
steps:
  release:  {uses: register, adapter: adapter, alias: staging}
  adapter:  {uses: train, dataset: captions, steps: 4, learning_rate: 1e-3}
  photos:   {uses: ingest, images: images/}
  captions: {uses: caption, dataset: photos, trigger: sks, class_word: star}
"""


def test_steps_come_after_their_upstream_steps(pipeline: Write) -> None:
    spec = load_spec(pipeline(WHOLE))
    assert list(spec.steps) == ["photos", "captions", "adapter", "release"]


def test_steps_inherit_base_seed_and_name(pipeline: Write) -> None:
    spec = load_spec(pipeline(WHOLE))
    assert spec.steps["adapter"].model_dump()["base"] == "tiny"
    assert spec.steps["adapter"].model_dump()["seed"] == 7
    assert spec.steps["release"].model_dump()["name"] == "stripes"


def test_overrides_change_one_value(pipeline: Write) -> None:
    spec = load_spec(pipeline(WHOLE), ["adapter.steps=9", "steps.adapter.learning_rate=2e-3", "seed=8"])
    assert spec.steps["adapter"].model_dump()["steps"] == 9
    assert spec.steps["adapter"].model_dump()["learning_rate"] == 2e-3
    assert spec.steps["adapter"].model_dump()["seed"] == 8


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("steps: 4", "stepz: 4", 6, "unknown key 'adapter.stepz'"),
        ("steps: 4", "stepz: 4", 6, "did you mean 'steps'"),
        ("steps: 4", 'steps: "4"', 6, "adapter.steps is '4'"),
        ("steps: 4", "steps: 0", 6, "greater than or equal to 1"),
        ("steps: 4", "steps: 4, rank: 0", 6, "adapter.rank is 0"),
        ("steps: 4", "steps: 4, kind: lorra", 6, "adapter.kind is 'lorra'"),
        ("steps: 4", "steps: 4, kind: lorra", 6, "did you mean 'lora'"),
        ("steps: 4", "steps: 4, kind: {name: lokr, facto: 8}", 6, "did you mean 'factor'"),
        ("steps: 4", "steps: 4, overrides: {text: {rnk: 8}}", 6, "Allowed: alpha, kind, rank"),
        ("uses: train", "uses: trian", 6, "did you mean 'train'"),
        ("uses: train, ", "", 6, "lacks the key `uses`"),
        ("adapter: adapter", "adapter: adaptor", 5, "did you mean 'adapter'"),
        ("adapter: adapter", "adapter: photos", 5, "a step that produces a manifest"),
        ("dataset: photos", "dataset: captions", 8, "form a cycle"),
        ("dataset: photos", "dataset: zorb@production", 8, "a registered adapter"),
        ("images: images/", "images: missing/", 7, "does not exist"),
        ("images: images/", "images: pipeline.yaml", 7, "is not a folder"),
        ("dataset: captions, ", "", 6, "'adapter.dataset' is missing"),
        ("name: stripes", "name: Stripes!", 1, "name is 'Stripes!'"),
        ("seed: 7", "sead: 7", 3, "did you mean 'seed'"),
        ("base: tiny", "base: tinny", 2, "tiny"),
        ("base: tiny", "base: nobody/has-this-model", 2, "nobody/has-this-model"),
    ],
)
def test_mistakes_are_refused_with_file_line_value_and_hint(
    pipeline: Write, monkeypatch: pytest.MonkeyPatch, before: str, after: str, line: int, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert before in WHOLE
    path = pipeline(WHOLE.replace(before, after))
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    assert message in str(caught.value)
    assert f"{path}:{line}" in str(caught.value)


@pytest.mark.parametrize("override", ["adapter", "adapter.=", "nothing.here=1", "adapter.steps.deep=1"])
def test_overrides_of_unknown_keys_are_refused(pipeline: Write, override: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        load_spec(pipeline(WHOLE), [override])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot read the file"):
        load_spec(tmp_path / "nothing.yaml")
