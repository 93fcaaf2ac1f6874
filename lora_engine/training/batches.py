"""Chooses the examples and the noise of each batch: pure functions of (seed, batch number)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.seeds import generator
from lora_engine.training.captions import draw_caption
from lora_engine.training.examples import Conditioner, Example, ImageSize, encode_captions
from lora_engine.training.objective import draw_perturbation, draw_timesteps, draw_training_noise
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.objective import Objective
from lora_engine.training.variation import Variation


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass; all tensors on the base's device.

    Attributes:
        latents: float32 [n, channels, height, width], without noise.
        noise: float32 in the shape of `latents`.
        timesteps: int64 [n]; float32 for a flow-matching base.
        conditioning: Conditioning with n rows.
        instances: Number of leading rows with the user's images; the rest are class images.
        examples: Examples of the leading rows; rows that a method adds may have none.
        weights: float32, broadcast to the latents: loss weight of each element; None weighs all alike.
        perturbation: float32 in the shape of `latents`, added to the noise of the input only; None adds nothing.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    instances: int
    examples: tuple[Example, ...] = ()
    weights: Tensor | None = None
    perturbation: Tensor | None = None


def _sides(latents: Tensor) -> tuple[int, int]:
    return int(latents.shape[-2]), int(latents.shape[-1])


class BucketSampler:
    """An endless sequence of batches, each with images of one size.

    Within a size, images come in consecutive shuffled epochs, so every batch is full however few images there are.
    Batches come in epochs too: in each, every image is seen equally often, whatever its size. The batches of a size are
    spread evenly over the epoch, so that short runs see all sizes.

    Args:
        sizes: Size of each example.
        batch: Examples per batch.
        seed: Seed of the run.
    """

    def __init__(self, sizes: Sequence[ImageSize], batch: int, seed: int) -> None:
        self._groups = {
            size: [index for index, candidate in enumerate(sizes) if candidate == size] for size in sorted(set(sizes))
        }
        self._batch, self._seed = batch, seed
        # The shortest epoch in which every size fills whole batches; each image then occurs `times` times.
        times = batch // math.gcd(batch, *(len(indices) for indices in self._groups.values()))
        self._counts = {size: len(indices) * times // batch for size, indices in self._groups.items()}
        self._length = sum(self._counts.values())
        # Bound to the instance, so that the cache does not outlive its run.
        self._epoch = lru_cache(maxsize=4)(self._spread)

    def batch(self, number: int) -> tuple[ImageSize, int, list[int]]:
        """Returns a batch's size, its number among the batches of that size, and its examples' indices."""
        epoch, slot = divmod(number, self._length)
        size, within = self._epoch(epoch)[slot]
        position = epoch * self._counts[size] + within
        indices = self._groups[size]
        picks = shuffled_epochs(len(indices), position * self._batch, self._batch, self._seed, "instance", *size)
        return size, position, [indices[pick] for pick in picks]

    def epochs(self, number: int) -> list[int]:
        """Returns the epoch of each example of a batch, from 0: its passes over the examples of its size before."""
        size, position, indices = self.batch(number)
        count = len(self._groups[size])
        return [(position * self._batch + index) // count for index in range(len(indices))]

    def _spread(self, epoch: int) -> list[tuple[ImageSize, int]]:
        # Batch j of k of a size falls into the j-th of k equal parts of the epoch.
        draw = generator(self._seed, "slots", epoch)
        slots: list[tuple[float, ImageSize, int]] = []
        for size, count in self._counts.items():
            shifts = torch.rand(count, generator=draw, dtype=torch.float64).tolist()
            slots += [((within + shifts[within]) / count, size, within) for within in range(count)]
        return [(size, within) for _, size, within in sorted(slots)]


def shuffled_epochs(count: int, start: int, length: int, seed: int, *purpose: str | int) -> list[int]:
    """Returns a slice of the endless sequence of shuffled epochs over `count` items."""
    items: list[int] = []
    epoch, offset = divmod(start, count)
    while len(items) < length:
        order = torch.randperm(count, generator=generator(seed, "order", *purpose, epoch)).tolist()
        items += order[offset : offset + length - len(items)]
        epoch, offset = epoch + 1, 0
    return items


class BatchBuilder:
    """Builds the batch of any number, with its noise.

    Args:
        base: Base with the noise schedule and the device.
        latents: Returns the latents of an example.
        conditioner: Encodes captions.
        examples: The user's images.
        class_examples: Class images; each batch then has as many of them as of the user's.
        batch: The user's images per batch.
        seed: Seed of the run.
        caption_dropout: Share of the captions that are emptied.
        objective: Noise and timesteps; None is the default.
        captions: Caption and image augmentation of the user's images; None is none.
        accumulate: Batches per optimizer step.
    """

    def __init__(
        self,
        base: BaseModel,
        latents: Callable[[Example], Tensor],
        conditioner: Conditioner,
        examples: Sequence[Example],
        *,
        class_examples: Sequence[Example] = (),
        batch: int,
        seed: int,
        caption_dropout: float = 0.0,
        objective: Objective | None = None,
        captions: Captions | None = None,
        accumulate: int = 1,
    ) -> None:
        self._accumulate, self._dropout_every = accumulate, captions.dropout_every if captions else 0
        self._base, self._latents, self._conditioner = base, latents, conditioner
        self._seed, self._batch, self._dropout = seed, batch, caption_dropout
        self._examples = [example for example in examples for _ in range(example.repeats)]
        self._variation = Variation(captions or Captions(), seed)
        self._objective = objective or Objective()
        self._order = BucketSampler([example.size for example in self._examples], batch, seed)
        self._classes: dict[ImageSize, list[Example]] = {}
        for example in class_examples:
            self._classes.setdefault(example.size, []).append(example)

    def __call__(self, number: int) -> Batch:
        """Returns the batch of that number; always the same."""
        size, position, indices = self._order.batch(number)
        chosen = self._vary([self._examples[index] for index in indices], number)
        class_examples = self._classes.get(size, [])
        if class_examples:
            picks = shuffled_epochs(
                len(class_examples), position * self._batch, self._batch, self._seed, "class", *size
            )
            chosen += [class_examples[pick] for pick in picks]
        draw = generator(self._seed, "noise", number)
        latents = torch.stack([self._latents(example) for example in chosen])
        noise = draw_training_noise(self._objective, latents.shape, draw)
        timesteps = draw_timesteps(self._objective, self._base.noise, len(chosen), draw, _sides(latents))
        shares = torch.tensor([_caption_dropout(example, self._dropout) for example in chosen], dtype=torch.float32)
        dropped = (torch.rand(len(chosen), generator=draw) < shares).tolist()
        if self._dropout_every:
            for index, epoch in enumerate(self._order.epochs(number)):
                dropped[index] |= (epoch + 1) % self._dropout_every == 0
        perturbation = draw_perturbation(self._objective, latents.shape, draw)
        captions = ["" if drop else example.caption for drop, example in zip(dropped, chosen, strict=True)]
        device = self._base.device
        return Batch(
            latents=latents.to(device),
            noise=noise.to(device),
            timesteps=timesteps.to(device),
            conditioning=encode_captions(self._base, self._conditioner, captions, chosen),
            instances=len(indices),
            examples=tuple(chosen),
            weights=_part_weights(chosen, device),
            perturbation=None if perturbation is None else perturbation.to(device),
        )

    def _vary(self, chosen: Sequence[Example], number: int) -> list[Example]:
        # Separate generators, so that augmentation settings do not change the noise.
        caption_draws, augmentation_draws = (generator(self._seed, purpose, number) for purpose in ("caption", "look"))
        choices = [self._variation.augmentations(example.part) for example in chosen]
        most = max(map(len, choices))
        picks = torch.randint(most, (len(chosen),), generator=augmentation_draws).tolist()
        return [
            replace(
                example,
                caption=self._variation.rewriter(example.part).rewrite(
                    draw_caption(example.captions, caption_draws), caption_draws, number // self._accumulate
                ),
                augmentation=augmentations[pick * len(augmentations) // most],
            )
            for example, pick, augmentations in zip(chosen, picks, choices, strict=True)
        ]


def _caption_dropout(example: Example, share: float) -> float:
    own = None if example.part is None else example.part.caption_dropout
    return share if own is None else own


def _part_weights(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """Returns the loss weight of each row, float32 [n, 1, 1, 1], by its dataset; None if all are 1."""
    weights = [1.0 if example.part is None else example.part.weight for example in examples]
    return None if set(weights) == {1.0} else torch.tensor(weights, device=device).view(-1, 1, 1, 1)
