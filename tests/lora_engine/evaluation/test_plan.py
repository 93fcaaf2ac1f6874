from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_engine.errors import DataError
from lora_engine.evaluation.chosen import TrainingRecord, read_training_record
from lora_engine.evaluation.plan import make_plan
from lora_engine.evaluation.prompts import read_prompts, remove_trigger
from lora_engine.evaluation.spec import EvaluateSettings

MakeDataset = Callable[..., Path]


@pytest.mark.parametrize(
    ("prompt", "class_word", "bare"),
    [
        ("a red zorb on the left", "star", "a red star on the left"),
        ("a zorb star on blue", "star", "a star on blue"),
        ("a zorb star, a ZORB", "star", "a star, a"),
        ("a red zorb, on blue", None, "a red, on blue"),
        ("a zorb", None, "a"),
        ("zorb", "star", "star"),
        ("zorbs and unzorb", "star", "zorbs and unzorb"),
        ("a zorb", "\\1 dog", "a \\1 dog"),
    ],
)
def test_the_trigger_is_replaced_or_removed(prompt: str, class_word: str | None, bare: str) -> None:
    assert remove_trigger(prompt, "zorb", class_word) == bare


def test_without_a_trigger_the_prompt_stays() -> None:
    assert remove_trigger("a  star", None, "star") == "a  star"


def test_prompts_are_read_without_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# what to draw\n\na red zorb \r\n  a\x1b blue one\n", encoding="utf-8")
    assert read_prompts(path) == ("a red zorb", "a blue one")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"# nothing\n\n", "has 0 prompts"),
        (b"a\n" * 1_001, "has 1001 prompts"),
        (b"a\n" + b"x" * 2_001, "line 2 has 2001 characters"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")


def test_the_plan_uses_held_out_images_and_their_captions(make_dataset: MakeDataset) -> None:
    plan = make_plan(EvaluateSettings(), make_dataset())
    assert plan.measured_on == "heldout"
    assert {request.prompt for request in plan.reference} == {"a 3 zorb", "a 4 zorb"}
    assert [request.prompt for request in plan.with_trigger] == [request.prompt for request in plan.reference]
    assert {request.prompt for request in plan.without_trigger} == {"a 3 star", "a 4 star"}


def test_without_held_out_images_the_plan_measures_on_training_images(make_dataset: MakeDataset) -> None:
    plan = make_plan(EvaluateSettings(max_pictures=2), make_dataset(heldout=0))
    assert (plan.measured_on, len(plan.reference)) == ("training", 2)


def test_another_dataset_can_provide_the_held_out_images(make_dataset: MakeDataset) -> None:
    other = make_dataset("other", train=4, heldout=0, first=10, caption="other {number}")
    plan = make_plan(EvaluateSettings(), make_dataset(), heldout=(other,), prompts=("one", "one", "two"))
    assert (plan.measured_on, len(plan.reference)) == ("heldout", 4)
    assert {request.file.parents[1] for request in plan.reference if request.file} == {other}
    assert [request.prompt for request in plan.with_trigger] == ["one", "two"]


def test_held_out_images_that_were_trained_on_are_refused(make_dataset: MakeDataset) -> None:
    other = make_dataset("other", train=2, heldout=0, first=10)
    digest = json.loads((other / "manifest.json").read_bytes())["pictures"][0]["sha256"]
    with pytest.raises(DataError, match=r"1 of 2 held-out images were trained on, first '0\.png'"):
        make_plan(EvaluateSettings(), make_dataset(), heldout=(other,), training=TrainingRecord(trained_on=(digest,)))


def test_seeds_do_not_depend_on_the_other_prompts(make_dataset: MakeDataset) -> None:
    dataset, settings = make_dataset(), EvaluateSettings(seeds=3)
    alone = make_plan(settings, dataset, prompts=("a zorb",)).with_trigger[0]
    second = make_plan(settings, dataset, prompts=("a cat", "a zorb")).with_trigger[1]
    assert alone == second
    assert len(set(alone.seeds)) == 3
    reseeded = make_plan(EvaluateSettings(seeds=3, seed=1), dataset, prompts=("a zorb",)).with_trigger[0]
    assert not set(reseeded.seeds) & set(alone.seeds)


def test_the_record_of_the_training_is_read_beside_the_adapter(tmp_path: Path) -> None:
    assert read_training_record(tmp_path) == TrainingRecord()
    (tmp_path / "training.json").write_text('{"trained_on": ["abc"], "loss": []}')
    assert read_training_record(tmp_path).trained_on == ("abc",)
    assert read_training_record(tmp_path / "adapter.safetensors").trained_on == ("abc",)
    for content in ("[]", '{"trained_on": 3}', '{"chosen": {"from": [], "step": 1, "by": "x", "on": []}}'):
        (tmp_path / "training.json").write_text(content)
        with pytest.raises(DataError, match=r"training\.json"):
            read_training_record(tmp_path)
