from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.data.images import write_mask
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import read_pixels, to_image
from lora_engine.training.augmentations import PLAIN, Augmentation, augmentations_of
from lora_engine.training.batches import Mixer
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.specs.captions import Captions, Colours

PIXELS = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_plain_look_changes_no_bit_and_is_not_in_a_key() -> None:
    assert torch.equal(PLAIN.apply(PIXELS), PIXELS)
    assert PLAIN.key() == {}
    assert augmentations_of(Captions(), 3) == (PLAIN,)


def test_mirroring_is_its_own_inverse_and_takes_the_mask_along() -> None:
    mirrored = Augmentation(mirrored=True)
    assert not torch.equal(mirrored.apply(PIXELS), PIXELS)
    assert torch.equal(mirrored.apply(mirrored.apply(PIXELS)), PIXELS)
    assert torch.equal(mirrored.mirror(PIXELS[:1]), mirrored.apply(PIXELS)[:1])


@pytest.mark.parametrize(
    "look",
    [
        Augmentation(brightness=0.5),
        Augmentation(contrast=0.5),
        Augmentation(saturation=0.5),
        Augmentation(hue=0.25),
        Augmentation(brightness=1.9),
    ],
)
def test_every_colour_change_changes_pixels_within_their_range(look: Augmentation) -> None:
    found = look.apply(PIXELS)
    assert found.dtype == PIXELS.dtype
    assert not torch.allclose(found, PIXELS, atol=0.05)
    assert found.min() >= -1
    assert found.max() <= 1
    mirrored = replace(look, mirrored=True)
    assert torch.equal(mirrored.apply(PIXELS), found.flip(-1))


def test_grey_has_no_hue_and_no_saturation() -> None:
    grey = PIXELS[:1].repeat(3, 1, 1)
    for look in (Augmentation(hue=0.3), Augmentation(saturation=0.2)):
        assert torch.allclose(look.apply(grey), grey, atol=1e-3)
    assert torch.allclose(Augmentation(hue=1.0).apply(PIXELS), PIXELS, atol=1e-5)
    assert torch.allclose(Augmentation(saturation=0.0).apply(PIXELS).std(dim=0), torch.zeros(8, 12), atol=1e-6)


def test_looks_are_few_and_follow_the_seed() -> None:
    settings = Captions(flip=True, colours=Colours(variants=2))
    looks = augmentations_of(settings, 1)
    assert len(set(looks)) == len(looks) == 2 * 3
    assert looks[0] == PLAIN
    assert augmentations_of(settings, 1) == looks
    assert augmentations_of(settings, 2) != looks
    assert all(abs(look.brightness - 1) <= 0.1 and look.hue == 0 for look in looks)
    assert {look.key()["look"]["mirrored"] for look in looks[1:]} == {False, True}


def test_batches_show_all_looks_with_latents_and_masks_that_belong_together(
    bases: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    settings = Captions(flip=True, colours=Colours(variants=1))
    encoder = Encoder(base, tmp_path / "cache", settings, seed=5)
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    write_mask(tmp_path / "mask.png", to_image(read_pixels(examples[0].file)))
    examples = tuple(replace(example, mask=tmp_path / "mask.png") for example in examples)
    encoder.prepare(examples, [], lambda: None)
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == len(examples) * 4
    mixer = Mixer(base, encoder.latents, encoder.conditioning, examples, batch=3, seed=5, captions=settings)
    seen = set()
    for number in range(12):
        batch = mixer(number)
        for row, example in enumerate(batch.examples):
            seen.add(example.look)
            with torch.no_grad():
                assert torch.equal(batch.latents[row], base.encode_images(example.pixels()[None])[0])
            plain = replace(example, look=PLAIN).mask_pixels()
            found = example.mask_pixels()
            assert plain is not None
            assert found is not None
            assert torch.equal(found, plain.flip(-1) if example.look.mirrored else plain)
    assert seen == set(augmentations_of(settings, 5))
    assert torch.equal(mixer(3).latents, mixer(3).latents)


def test_captions_and_looks_change_no_noise(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    batches = []
    for settings in (Captions(), Captions(flip=True, templates="object")):
        encoder = Encoder(base, tmp_path, settings, seed=5)
        mixer = Mixer(base, encoder.latents, encoder.conditioning, examples, batch=4, seed=5, captions=settings)
        batches.append(mixer(2))
    assert torch.equal(batches[0].noise, batches[1].noise)
    assert torch.equal(batches[0].timesteps, batches[1].timesteps)
    assert not torch.equal(batches[0].conditioning["states"], batches[1].conditioning["states"])
