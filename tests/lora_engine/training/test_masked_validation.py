"""The validation loss with masks: a weighted mean over what counts, comparable with the loss without masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.pixels import write_png
from lora_engine.files import sha256_file
from lora_engine.training.examples import Example, text_encoder
from lora_engine.training.images import TrainingImages
from lora_engine.training.resolve import fit_options
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.methods import Mask
from lora_engine.training.validation import image_losses

SIDE = 16


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> BaseModel:
    return load_base(str(bases["small-sd"]), device="cpu")


@pytest.fixture
def example(tmp_path: Path) -> Example:
    file = tmp_path / "a.png"
    write_png(file, torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    return Example(file, sha256_file(file), "a star", (SIDE, SIDE))


def masked(example: Example, box: tuple[int, int, int, int], value: int = 255) -> Example:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(value, box)
    path = example.file.with_name(f"mask-{value}-{box}.png")
    mask.save(path)
    return replace(example, mask=path)


def loss(base: BaseModel, example: Example, mask: Mask | None) -> float:
    def latents(one: Example) -> torch.Tensor:
        return base.encode_images(one.pixels()[None])[0]

    (value,) = image_losses(base, latents, text_encoder(base, Captions()), [example], timesteps=3, mask=mask)
    return value


def test_the_loss_is_the_mean_over_what_the_mask_counts(base: BaseModel, example: Example) -> None:
    left, right = masked(example, (0, 0, SIDE // 2, SIDE)), masked(example, (SIDE // 2, 0, SIDE, SIDE))
    whole = loss(base, example, Mask())
    halves = [loss(base, half, Mask()) for half in (left, right)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5)
    assert abs(halves[0] - halves[1]) > 1e-4 * whole


@pytest.mark.parametrize("value", [255, 100])
def test_a_mask_of_one_value_changes_nothing(base: BaseModel, example: Example, value: int) -> None:
    full = masked(example, (0, 0, SIDE, SIDE), value)
    assert loss(base, full, Mask()) == pytest.approx(loss(base, example, None), rel=1e-5)


def test_masks_count_only_if_the_method_has_a_mask(base: BaseModel, example: Example) -> None:
    left = masked(example, (0, 0, SIDE // 2, SIDE))
    assert loss(base, left, None) == loss(base, example, None)
    assert loss(base, left, Mask()) != loss(base, left, None)


def test_what_the_floor_adds_counts(base: BaseModel, example: Example) -> None:
    left = masked(example, (0, 0, SIDE // 2, SIDE))
    inside, outside = loss(base, left, Mask()), loss(base, masked(example, (SIDE // 2, 0, SIDE, SIDE)), Mask())
    assert loss(base, left, Mask(floor=0.5)) == pytest.approx((1.5 * inside + 0.5 * outside) / 2, rel=1e-5)


def test_a_black_mask_has_no_loss(base: BaseModel, example: Example) -> None:
    assert loss(base, masked(example, (0, 0, 0, 0)), Mask()) == 0.0


def test_losses_with_other_masks_are_not_continued(example: Example) -> None:
    def validated_on(method: object, heldout: Example) -> str:
        settings = TrainSettings.model_validate({"method": method, "steps": 2})
        return fit_options(settings, TrainingImages((heldout,), (), (heldout,))).validated_on

    left = masked(example, (0, 0, SIDE // 2, SIDE))
    plain = {validated_on("finetune", one) for one in (example, left)}
    assert len(plain | {validated_on({"name": "finetune", "mask": {}}, left)}) == 3
    assert validated_on({"name": "finetune", "mask": {}}, example) in plain
