from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lora_engine.data.manifest import Manifest
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


def resized(folder: Path, number: int, size: tuple[int, int]) -> None:
    """Gives an image of a dataset another (height, width)."""
    manifest = Manifest.load(folder)
    images = list(manifest.pictures)
    path = folder / images[number].file
    with Image.open(path) as image:
        image.resize((size[1], size[0])).save(path)
    images[number] = images[number].model_copy(update={"height": size[0], "width": size[1]})
    manifest.model_copy(update={"pictures": tuple(images)}).save(folder)


def test_images_of_several_sizes_are_drawn_at_their_own_size(make_dataset: MakeDataset) -> None:
    folder = make_dataset(train=1, heldout=3)
    resized(folder, 1, (24, 16))
    plan = make_plan(EvaluateSettings(), folder)
    sizes = {request.prompt: request.size for request in plan.reference}
    assert sizes == {"a 1 zorb": (24, 16), "a 2 zorb": (16, 16), "a 3 zorb": (16, 16)}
    assert plan.sizes == [(16, 16), (24, 16)]
    assert {request.prompt: request.size for request in plan.with_trigger} == sizes
    other = make_plan(EvaluateSettings(), folder, prompts=("a zorb",))
    assert [request.size for request in other.with_trigger] == [(16, 16)], "the commonest size"


def test_images_with_one_caption_have_seeds_of_their_own(make_dataset: MakeDataset) -> None:
    plan = make_plan(EvaluateSettings(), make_dataset(heldout=4, caption="a zorb"))
    assert len({seed for request in plan.reference for seed in request.seeds}) == 8
    assert len({request.group for request in plan.reference}) == 4
    assert len(plan.with_trigger) == 1
    assert plan.with_trigger[0].seeds in [request.seeds for request in plan.reference], "drawn once for both"


def test_several_datasets_provide_held_out_images_each_once(make_dataset: MakeDataset) -> None:
    one = make_dataset("one", train=0, heldout=2, first=10)
    two = make_dataset("two", train=3, heldout=0, first=20)
    plan = make_plan(EvaluateSettings(), make_dataset(), heldout=(one, two, one))
    assert len(plan.reference) == 5
    assert {request.file.parents[1] for request in plan.reference if request.file} == {one, two}


def test_kin_of_training_images_are_left_out_by_name_and_refused_if_nothing_is_left(make_dataset: MakeDataset) -> None:
    other = make_dataset("other", train=0, heldout=3, first=2)  # its first image is the third of the training images
    plan = make_plan(EvaluateSettings(), make_dataset(), heldout=(other,))
    assert [(item.source, item.reason) for item in plan.left_out] == [
        ("0.png", "near-duplicate of the training image '2.png'")
    ]
    assert len(plan.reference) == 2
    same = make_dataset("same", train=0, heldout=2, first=1)
    with pytest.raises(
        DataError, match=r"all 2 held-out images are near-duplicates of training images, first '0\.png'"
    ):
        make_plan(EvaluateSettings(), make_dataset(), heldout=(same,))


def test_kin_among_the_held_out_images_are_one_group(make_dataset: MakeDataset) -> None:
    one = make_dataset("one", train=0, heldout=3, first=10)
    two = make_dataset("two", train=0, heldout=2, first=11)
    plan = make_plan(EvaluateSettings(), make_dataset(), heldout=(one, two))
    assert (len(plan.reference), len({request.group for request in plan.reference})) == (5, 3)


def chosen_on(folder: Path, count: int) -> TrainingRecord:
    on = [image.sha256 for image in Manifest.load(folder).of_split("heldout")][:count]
    chosen = {"from": [2, 4, 6], "step": 4, "by": "clip_i_paired", "on": on, "score": 0.9, "leave_one_out": 0.75}
    return TrainingRecord.model_validate({"chosen": chosen})


def test_images_that_a_checkpoint_was_chosen_on_are_left_out(make_dataset: MakeDataset) -> None:
    folder = make_dataset(heldout=8)
    plan = make_plan(EvaluateSettings(), folder, training=chosen_on(folder, 4))
    assert (len(plan.reference), plan.chosen) == (4, None)
    assert {item.reason for item in plan.left_out} == {"the checkpoint was chosen on it"}
    assert not {item.sha256 for item in plan.left_out} & {request.image for request in plan.reference}


def test_with_few_held_out_images_the_figure_of_the_choice_is_shown(make_dataset: MakeDataset) -> None:
    folder = make_dataset(heldout=7)
    plan = make_plan(EvaluateSettings(), folder, training=chosen_on(folder, 7))
    assert (len(plan.reference), plan.left_out) == (7, ())
    assert plan.chosen is not None
    assert plan.chosen.describe() == "chosen among 3 on these images: clip_i_paired 0.75 (leave-one-out)"
    untouched = make_plan(EvaluateSettings(), folder, training=chosen_on(make_dataset("else", heldout=3), 3))
    assert untouched.chosen is None


def test_masks_of_real_images_are_in_the_plan(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    manifest = Manifest.load(folder)
    images = list(manifest.pictures)
    name = f"masks/{images[3].sha256[:16]}.png"
    (folder / "masks").mkdir()
    Image.new("L", (16, 16), 255).save(folder / name)
    images[3] = images[3].model_copy(update={"mask": name})
    manifest.model_copy(update={"pictures": tuple(images)}).save(folder)
    masks = {request.prompt: request.mask for request in make_plan(EvaluateSettings(), folder).reference}
    assert masks == {"a 3 zorb": folder / name, "a 4 zorb": None}
