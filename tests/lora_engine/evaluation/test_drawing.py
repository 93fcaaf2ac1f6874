from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.manifest import Manifest
from lora_engine.embedding.embedder import load_embedder
from lora_engine.evaluation.drawing import draw_evaluation
from lora_engine.evaluation.evidence import Evidence
from lora_engine.evaluation.plan import make_plan
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.progress import no_progress

MakeDataset = Callable[..., Path]
SETTINGS = EvaluateSettings(steps=1, seeds=1)


@pytest.fixture(scope="module")
def model(base: Path) -> BaseModel:
    return load_base(str(base), device="cpu")


def write_masks(folder: Path, shade: Callable[[int, int], int]) -> None:
    """Gives every image of a dataset a mask, from (x, y) to its gray."""
    manifest = Manifest.load(folder)
    (folder / "masks").mkdir(exist_ok=True)
    images = []
    for image in manifest.pictures:
        mask = Image.new("L", (image.width, image.height))
        mask.putdata([shade(x, y) for y in range(image.height) for x in range(image.width)])
        mask.save(folder / f"masks/{image.sha256[:16]}.png")
        images.append(image.model_copy(update={"mask": f"masks/{image.sha256[:16]}.png"}))
    manifest.model_copy(update={"pictures": tuple(images)}).save(folder)


def losses(model: BaseModel, folder: Path) -> torch.Tensor:
    drawn = draw_evaluation(
        SETTINGS,
        make_plan(SETTINGS, folder),
        model=model,
        bundles={"base": (), "candidate": ()},
        progress=no_progress,
    )
    return torch.from_numpy(drawn.heldout.values["base"])


def test_a_mask_weights_the_loss_of_its_image(model: BaseModel, make_dataset: MakeDataset) -> None:
    plain = losses(model, make_dataset())
    parts = []
    for name, shade in (("left", lambda x, y: 255 * (x < 8)), ("right", lambda x, y: 255 * (x >= 8))):
        folder = make_dataset("dataset")
        write_masks(folder, shade)
        parts.append(losses(model, folder))
        assert not torch.allclose(parts[-1], plain), name
    torch.testing.assert_close((parts[0] + parts[1]) / 2, plain)


@pytest.mark.parametrize("gray", [0, 255])
def test_a_mask_that_weights_all_alike_changes_no_loss(model: BaseModel, make_dataset: MakeDataset, gray: int) -> None:
    plain = losses(model, make_dataset())
    folder = make_dataset("dataset")
    write_masks(folder, lambda x, y: gray)
    torch.testing.assert_close(losses(model, folder), plain)


def test_every_size_is_drawn(model: BaseModel, make_dataset: MakeDataset) -> None:
    from tests.lora_engine.evaluation.test_plan import resized

    folder = make_dataset()
    resized(folder, 4, (32, 16))
    drawn = draw_evaluation(
        SETTINGS,
        make_plan(SETTINGS, folder),
        model=model,
        bundles={"base": (), "candidate": ()},
        progress=no_progress,
    )
    shapes = {images.request.prompt: tuple(images.images["base"].shape) for images in drawn.sets["reference"]}
    assert shapes == {"a 3 zorb": (1, 3, 16, 16), "a 4 zorb": (1, 3, 32, 16)}


def test_masked_likeness_does_not_see_the_background_of_real_images(
    model: BaseModel, make_dataset: MakeDataset, clip_folder: Path
) -> None:
    folder = make_dataset()
    write_masks(folder, lambda x, y: 255 * (x < 8))
    plan = make_plan(SETTINGS, folder)
    drawn = draw_evaluation(SETTINGS, plan, model=model, bundles={"base": (), "candidate": ()}, progress=no_progress)
    images = drawn.sets["reference"][0]
    assert images.reference is not None
    changed = images.reference.clone()
    changed[:, :, 8:] = 1.0
    embedder = load_embedder(clip_folder)

    def embed(reference: torch.Tensor, *, masked: bool) -> torch.Tensor:
        from dataclasses import replace

        evidence = Evidence(("base", "candidate"), drawn.sets, drawn.heldout, masked_likeness=masked)
        return evidence.embed(replace(images, reference=reference), "reference", embedder)

    torch.testing.assert_close(embed(images.reference, masked=True), embed(changed, masked=True))
    assert not torch.allclose(embed(images.reference, masked=False), embed(changed, masked=False))
