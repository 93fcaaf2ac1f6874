"""Masks, teachers and identity: the arithmetic of loss terms and transforms beside the denoising loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.noise import NoiseSchedule, flow_schedule_from
from lora_engine.data.pixels import write_png
from lora_engine.errors import SettingsError
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.embeddings import decay_norms
from lora_engine.training.examples import Example
from lora_engine.training.identity import (
    IdentityLoss,
    center_crop,
    identity_loss,
    load_subject_embedder,
    predicted_clean,
)
from lora_engine.training.losses import DenoisingLoss, PriorLoss
from lora_engine.training.masks import mask_transform, mask_weights, random_mask
from lora_engine.training.methods.inpainting import Inpainting, inpainting_transform
from lora_engine.training.preservation import OutputPreservation, class_captions
from lora_engine.training.specs.methods import Identity, Mask

HALF = torch.zeros(1, 1, 8, 8)
HALF[..., :4] = 1.0


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(base: BaseModel, examples: tuple[Example, ...], instances: int) -> Batch:
    latents = draw(len(examples), *base.latent_shape((16, 16)))
    return Batch(
        latents=latents,
        noise=draw(*latents.shape, seed=1),
        timesteps=torch.tensor([5, 500, 900, 30])[: len(examples)],
        conditioning=base.encode_text([example.caption for example in examples]),
        instances=instances,
        examples=examples,
    )


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> BaseModel:
    return load_base(str(bases["small-sd"]), device="cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Example, ...]:
    folder = tmp_path_factory.mktemp("images")
    images = []
    for number in range(4):
        write_png(folder / f"{number}.png", draw(3, 16, 16, seed=number).clamp(-1, 1))
        images.append(Example(folder / f"{number}.png", f"{number:064d}", f"a sks star {number}", (16, 16)))
    mask = torch.full((3, 16, 16), -1.0)
    mask[:, :, :8] = 1.0
    write_png(folder / "mask.png", mask)
    return (replace(images[0], mask=folder / "mask.png"), *images[1:])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_masked_loss_is_its_closed_form(temperature: float, floor: float) -> None:
    predicted, target = draw(1, 4, 4, 4), draw(1, 4, 4, 4, seed=1)
    mask = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    weights = mask_weights(mask, (4, 4), Mask(temperature=temperature, floor=floor))
    batch = Batch(target, target, torch.tensor([1]), None, 1, weights=weights)  # type: ignore[arg-type]
    share = mask.reshape(4, 4, 4, 4).mean(dim=(1, 3))
    expected = ((share + floor) ** temperature * (predicted - target)[0] ** 2).mean()
    assert torch.allclose(DenoisingLoss()(predicted, target, batch), expected, rtol=1e-5)
    if (temperature, floor) == (1.0, 0.0):
        # cloneofsimo multiplies prediction and target, which squares the mask.
        squared = ((share * predicted - share * target) ** 2).mean()
        assert not torch.allclose(DenoisingLoss()(predicted, target, batch), squared, rtol=1e-2)


def test_normalised_weights_have_a_mean_of_one_whatever_the_mask_covers() -> None:
    small = torch.zeros(2, 1, 8, 8)
    small[0, ..., 0, 0] = 1.0
    weights = mask_weights(small, (4, 4), Mask(normalise=True))
    assert torch.allclose(weights[0].mean(), torch.tensor(1.0))
    assert weights[1].abs().max() == 0


@pytest.mark.parametrize(("floor", "outside"), [(0.0, False), (0.1, True)])
def test_gradients_are_zero_outside_a_mask(
    base: BaseModel, examples: tuple[Example, ...], floor: float, outside: bool
) -> None:
    batch = mask_transform(Mask(floor=floor))(make_batch(base, examples, 3), 0)
    assert batch.weights is not None
    predicted = draw(*batch.latents.shape, seed=5).requires_grad_()
    terms = DenoisingLoss()(predicted, batch.noise, batch) + PriorLoss(1.0)(predicted, batch.noise, batch)
    torch.autograd.backward(terms)
    assert predicted.grad is not None
    moved = predicted.grad.abs().amax(dim=1) > 0
    width = predicted.shape[-1] // 2
    assert moved[0, :, :width].all()
    assert bool(moved[0, :, width:].any()) is outside
    # Images without a mask, and class images, have weight 1.
    assert moved[1:].all()


def test_masks_are_mirrored_with_their_images(base: BaseModel, examples: tuple[Example, ...]) -> None:
    batch = make_batch(base, examples[:1], 1)
    plain = mask_transform(Mask())(batch, 0).weights
    mirrored = replace(examples[0], augmentation=replace(examples[0].augmentation, mirrored=True))
    other = mask_transform(Mask())(replace(batch, examples=(mirrored,)), 0).weights
    assert plain is not None
    assert other is not None
    assert torch.equal(plain.flip(-1), other)
    assert not torch.equal(plain, other)


def test_random_masks_have_all_shapes_and_depend_on_their_seed_only() -> None:
    settings = Inpainting(strokes=0.5, whole=0.2)
    masks = [random_mask((16, 24), settings, generator(1, "mask", number)) for number in range(60)]
    again = [random_mask((16, 24), settings, generator(1, "mask", number)) for number in range(60)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    covered = [mask.mean().item() for mask in masks]
    assert {tuple(mask.shape) for mask in masks} == {(1, 16, 24)}
    assert set(torch.cat(masks).flatten().tolist()) == {0.0, 1.0}
    assert 0.05 < sum(share == 1.0 for share in covered) / 60 < 0.4
    assert min(covered) > 0
    assert len(set(covered)) > 20


@pytest.mark.parametrize("strokes", [0.0, 1.0])
def test_boxes_keep_to_their_size_range(strokes: float) -> None:
    settings = Inpainting(strokes=strokes, whole=0.0, smallest=0.25, largest=0.5)
    masks = [random_mask((16, 16), settings, generator(2, "mask", number)) for number in range(30)]
    are_boxes = [mask.sum() == mask.amax(-1).sum() * mask.amax(-2).sum() for mask in masks]
    assert all(are_boxes) is (strokes == 0.0)
    if strokes == 0.0:
        assert {int(mask.amax(-1).sum()) for mask in masks} == {4, 5, 6, 7, 8}


def test_given_masks_hide_their_area(base: BaseModel, examples: tuple[Example, ...]) -> None:
    batch = make_batch(base, examples[:2], 2)
    given = inpainting_transform(base, Inpainting(masks="given", surroundings=0.25, whole=0.0), 3)(batch, 0)
    assert given.weights is not None
    width = given.weights.shape[-1] // 2
    assert set(given.weights[0, ..., :width].flatten().tolist()) == {1.0}
    assert set(given.weights[0, ..., width:].flatten().tolist()) == {0.25}
    # The second image has none, and gets a random one.
    assert given.weights[1].min() == 0.25
    other = inpainting_transform(base, Inpainting(masks="given", surroundings=0.25, whole=0.0), 4)(batch, 0)
    assert other.weights is not None
    assert torch.equal(given.weights[0], other.weights[0])
    assert not torch.equal(given.weights[1], other.weights[1])


def test_the_teacher_is_the_base_without_the_adapter(base: BaseModel, examples: tuple[Example, ...]) -> None:
    adapter = create_adapter(base, ["attention", "text"], generator=generator(1, "factors"))
    changed = {
        name: delta.with_factors({key: value + 0.3 for key, value in delta.factors().items()})
        for name, delta in adapter.modules.items()
    }
    alone = base.encode_text(["a star 0", "a star 1"])
    with attach(base, replace(adapter, modules=changed)) as attachment:

        @contextmanager
        def disabled() -> Iterator[None]:
            attachment.multiplier = 0.0
            yield
            attachment.multiplier = 1.0

        to_class_caption = class_captions(None, "sks", "star")
        preservation = OutputPreservation(
            base,
            lambda texts, size: base.encode_text(texts),
            lambda texts, size: base.encode_text(texts),
            disabled,
            to_class_caption,
        )
        batch = preservation.add_rows(make_batch(base, examples[:2], 2), 0)
        assert (len(batch.latents), batch.instances) == (4, 2)
        noisy = base.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = torch.zeros_like(noisy)
        targets = preservation.replace_targets(batch, target)
        attached = base.predict(noisy[2:], batch.timesteps[2:], batch.conditioning.index([2, 3]))
    expected = base.predict(noisy[2:], batch.timesteps[2:], alone)
    assert torch.equal(targets[2:], expected)
    assert torch.equal(targets[:2], target[:2])
    assert not targets.requires_grad
    assert not torch.allclose(attached, expected, atol=1e-3)


def test_captions_of_the_class_name_the_class_once() -> None:
    to_class_caption = class_captions(None, "sks", "star")
    assert to_class_caption("a sks star on sks, Sks stars") == "a star on star, star stars"
    assert to_class_caption("asks") == "asks"
    assert class_captions("a \\1 star", "sks", None)("anything") == "a \\1 star"
    with pytest.raises(SettingsError, match="no class caption"):
        class_captions(None, None, "star")


@pytest.mark.parametrize("parameterization", ["eps", "v_prediction", "flow"])
def test_a_perfect_prediction_gives_the_clean_image(parameterization: str) -> None:
    if parameterization == "flow":
        schedule: NoiseSchedule = flow_schedule_from({})
    else:
        schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000), parameterization)
    clean, noise, timesteps = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1), torch.tensor([1, 300, 900])
    noisy, target = schedule.add_noise(clean, noise, timesteps), schedule.target(clean, noise, timesteps)
    assert torch.allclose(predicted_clean(schedule, noisy, target, timesteps), clean, atol=1e-4)


def test_identity_has_a_gradient_towards_the_images_and_only_with_little_noise(
    base: BaseModel, examples: tuple[Example, ...]
) -> None:
    loss = identity_loss(base, Identity(weight=2.0, until=0.3), examples, None)
    assert isinstance(loss, IdentityLoss)
    assert torch.allclose(loss.reference.norm(), torch.tensor(1.0))
    batch = make_batch(base, examples[:3], 3)
    predicted = draw(*batch.latents.shape, seed=7).requires_grad_()
    value = loss(predicted, batch.noise, batch)
    torch.autograd.backward(value)
    assert predicted.grad is not None
    # Timesteps 5, 500 and 900 of 1000.
    assert (predicted.grad.flatten(1).abs().amax(dim=1) > 0).tolist() == [True, False, False]
    late = replace(batch, timesteps=batch.timesteps.clamp(min=300))
    assert loss(predicted, batch.noise, late) == 0
    step = predicted.detach() - 0.01 * predicted.grad / predicted.grad.norm()
    assert loss(step, batch.noise, batch) < value
    assert torch.allclose(loss(predicted, batch.noise, batch), value)


def test_any_image_model_is_an_embedder(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    ViTModel(ViTConfig(intermediate_size=16, **small)).save_pretrained(tmp_path / "vit")
    Dinov2Model(Dinov2Config(mlp_ratio=1, **small)).save_pretrained(tmp_path / "dino")
    pixels = draw(2, 3, 20, 24).requires_grad_()
    for name in ("vit", "dino"):
        embeddings = load_subject_embedder(tmp_path / name)(pixels)
        assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-5)
        (gradient,) = torch.autograd.grad(embeddings[:, 0].sum(), pixels)
        assert gradient.abs().max() > 0
    with pytest.raises(SettingsError, match="cannot be loaded"):
        load_subject_embedder(tmp_path / "nothing")
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(SettingsError, match="cannot be loaded"):
        load_subject_embedder(tmp_path / "vit")


def test_a_center_crop_keeps_the_center() -> None:
    pixels = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(center_crop(pixels, 1.0), pixels)
    assert center_crop(pixels, 0.5).flatten()[0] == 18
    assert center_crop(pixels, 0.01).shape == (1, 1, 1, 1)


def test_norms_decay_by_the_formula() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.1]])
    decay_norms(vectors, 0.4, 0.25)
    assert torch.allclose(vectors.norm(dim=-1), torch.tensor([5.0 + 0.25 * (0.4 - 5.0), 0.0, 0.1 + 0.25 * 0.3]))
    assert torch.allclose(vectors[0] / vectors[0].norm(), torch.tensor([0.6, 0.8]))
    decay_norms(vectors, 0.4, 1.0)
    assert torch.allclose(vectors.norm(dim=-1), torch.tensor([0.4, 0.0, 0.4]))
