from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.data.images import write_mask
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import read_pixels, to_image
from lora_engine.training.augmentations import UNCHANGED, Augmentation, augmentations_of
from lora_engine.training.batches import BatchBuilder
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.specs.captions import Captions, ColorJitter

PIXELS = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_plain_augmentation_changes_no_bit_and_no_key() -> None:
    assert torch.equal(UNCHANGED.apply(PIXELS), PIXELS)
    assert UNCHANGED.key() == {}
    assert augmentations_of(Captions(), 3) == (UNCHANGED,)


def test_mirroring_is_its_own_inverse_and_applies_to_the_mask() -> None:
    mirrored = Augmentation(mirrored=True)
    assert not torch.equal(mirrored.apply(PIXELS), PIXELS)
    assert torch.equal(mirrored.apply(mirrored.apply(PIXELS)), PIXELS)
    assert torch.equal(mirrored.mirror(PIXELS[:1]), mirrored.apply(PIXELS)[:1])


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(brightness=0.5),
        Augmentation(contrast=0.5),
        Augmentation(saturation=0.5),
        Augmentation(hue=0.25),
        Augmentation(brightness=1.9),
    ],
)
def test_every_color_change_keeps_pixels_in_range(augmentation: Augmentation) -> None:
    changed = augmentation.apply(PIXELS)
    assert changed.dtype == PIXELS.dtype
    assert not torch.allclose(changed, PIXELS, atol=0.05)
    assert changed.min() >= -1
    assert changed.max() <= 1
    mirrored = replace(augmentation, mirrored=True)
    assert torch.equal(mirrored.apply(PIXELS), changed.flip(-1))


def test_gray_has_no_hue_and_no_saturation() -> None:
    gray = PIXELS[:1].repeat(3, 1, 1)
    for augmentation in (Augmentation(hue=0.3), Augmentation(saturation=0.2)):
        assert torch.allclose(augmentation.apply(gray), gray, atol=1e-3)
    assert torch.allclose(Augmentation(hue=1.0).apply(PIXELS), PIXELS, atol=1e-5)
    assert torch.allclose(Augmentation(saturation=0.0).apply(PIXELS).std(dim=0), torch.zeros(8, 12), atol=1e-6)


def test_augmentations_are_few_and_depend_on_the_seed() -> None:
    settings = Captions(flip=True, colours=ColorJitter(variants=2))
    augmentations = augmentations_of(settings, 1)
    assert len(set(augmentations)) == len(augmentations) == 2 * 3
    assert augmentations[0] == UNCHANGED
    assert augmentations_of(settings, 1) == augmentations
    assert augmentations_of(settings, 2) != augmentations
    assert all(abs(augmentation.brightness - 1) <= 0.1 and augmentation.hue == 0 for augmentation in augmentations)
    assert {augmentation.key()["look"]["mirrored"] for augmentation in augmentations[1:]} == {False, True}


def test_batches_have_all_augmentations_with_matching_latents_and_masks(
    bases: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    settings = Captions(flip=True, colours=ColorJitter(variants=1))
    encoder = Encoder(base, tmp_path / "cache", settings, seed=5)
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    write_mask(tmp_path / "mask.png", to_image(read_pixels(examples[0].file)))
    examples = tuple(replace(example, mask=tmp_path / "mask.png") for example in examples)
    encoder.prepare(examples, [])
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == len(examples) * 4
    builder = BatchBuilder(base, encoder.latents, encoder.conditioning, examples, batch=3, seed=5, captions=settings)
    seen = set()
    for number in range(12):
        batch = builder(number)
        for row, example in enumerate(batch.examples):
            seen.add(example.augmentation)
            with torch.no_grad():
                assert torch.equal(batch.latents[row], base.encode_images(example.pixels()[None])[0])
            plain = replace(example, augmentation=UNCHANGED).mask_pixels()
            mask = example.mask_pixels()
            assert plain is not None
            assert mask is not None
            assert torch.equal(mask, plain.flip(-1) if example.augmentation.mirrored else plain)
    assert seen == set(augmentations_of(settings, 5))
    assert torch.equal(builder(3).latents, builder(3).latents)


def test_captions_and_augmentations_change_no_noise(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    batches = []
    for settings in (Captions(), Captions(flip=True, templates="object")):
        encoder = Encoder(base, tmp_path, settings, seed=5)
        builder = BatchBuilder(
            base, encoder.latents, encoder.conditioning, examples, batch=4, seed=5, captions=settings
        )
        batches.append(builder(2))
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert torch.equal(batches[0].timesteps, batches[1].timesteps)
    assert not torch.equal(batches[0].conditioning["states"], batches[1].conditioning["states"])
