"""Which examples stand in which batch, under which noise: pure functions of (seed, number of the batch)."""

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
from lora_engine.training.augmentations import augmentations_of
from lora_engine.training.captions import Rewriter
from lora_engine.training.examples import Conditioner, Example, Size
from lora_engine.training.objective import draw_noise, draw_perturbation, draw_timesteps
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.objective import Objective


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; all tensors on the base's device.

    Attributes:
        latents: float32 [n, channels, height, width], without noise.
        noise: Of the same shape.
        timesteps: int64 [n]; float32 for a base of flow matching.
        conditioning: n rows.
        instances: The first so many rows are the person's pictures; the rest are class pictures.
        examples: What the first rows show; rows that a method adds have none.
        weights: float32, broadcast to the latents: how much each of their elements counts; None counts all alike.
        perturbation: Of the latents' shape: what is added to the noise that the network sees; None is nothing.
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


class Order:
    """An endless order of batches in which all pictures of a batch have one size.

    Within a size, the pictures come in shuffled rounds, one round after another, so that every batch is full however
    few pictures there are. Batches come in rounds of their own: in each, every picture is seen equally often, whatever
    the sizes; and the batches of a size are spread evenly over it, so that a short run, too, sees all sizes.

    Args:
        sizes: The size of each example.
        batch: Examples a batch.
        seed: Of the run.
    """

    def __init__(self, sizes: Sequence[Size], batch: int, seed: int) -> None:
        self._groups = {
            size: [place for place, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))
        }
        self._batch, self._seed = batch, seed
        # The shortest round in which every size fills whole batches: each picture then comes up `times` times.
        times = batch // math.gcd(batch, *(len(places) for places in self._groups.values()))
        self._counts = {size: len(places) * times // batch for size, places in self._groups.items()}
        self._length = sum(self._counts.values())
        # Bound to the instance, so that a cache never outlives its run.
        self._epoch = lru_cache(maxsize=4)(self._spread)

    def batch(self, number: int) -> tuple[Size, int, list[int]]:
        """The size of a batch, its number among the batches of that size, and the places of its examples."""
        epoch, slot = divmod(number, self._length)
        size, within = self._epoch(epoch)[slot]
        position = epoch * self._counts[size] + within
        places = self._groups[size]
        picks = rounds(len(places), position * self._batch, self._batch, self._seed, "instance", *size)
        return size, position, [places[pick] for pick in picks]

    def _spread(self, epoch: int) -> list[tuple[Size, int]]:
        # Batch j of k of a size falls somewhere within the j-th k-th of the round.
        draw = generator(self._seed, "slots", epoch)
        found: list[tuple[float, Size, int]] = []
        for size, count in self._counts.items():
            shifts = torch.rand(count, generator=draw, dtype=torch.float64).tolist()
            found += [((within + shifts[within]) / count, size, within) for within in range(count)]
        return [(size, within) for _, size, within in sorted(found)]


def rounds(count: int, start: int, length: int, seed: int, *purpose: str | int) -> list[int]:
    """A stretch of the endless sequence of shuffled rounds over `count` things."""
    found: list[int] = []
    epoch, place = divmod(start, count)
    while len(found) < length:
        order = torch.randperm(count, generator=generator(seed, "order", *purpose, epoch)).tolist()
        found += order[place : place + length - len(found)]
        epoch, place = epoch + 1, 0
    return found


class Mixer:
    """Gives the batch of any number, with its noise.

    Args:
        base: For the noise schedule and the device.
        latents: The latents of an example.
        conditioner: The conditioning of captions.
        examples: The person's pictures.
        class_examples: Class pictures; each batch then holds as many of them as of the person's.
        batch: Of the person's pictures.
        seed: Of the run.
        caption_dropout: Share of the captions that become empty.
        objective: Which noise at which timesteps.
        captions: How captions and looks of the person's pictures change.
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
    ) -> None:
        self._base, self._latents, self._conditioner = base, latents, conditioner
        self._seed, self._batch, self._dropout = seed, batch, caption_dropout
        self._examples = [example for example in examples for _ in range(example.repeats)]
        self._rewriter = Rewriter(captions or Captions())
        self._looks = augmentations_of(captions or Captions(), seed)
        self._objective = objective or Objective()
        self._order = Order([example.size for example in self._examples], batch, seed)
        self._classes: dict[Size, list[Example]] = {}
        for example in class_examples:
            self._classes.setdefault(example.size, []).append(example)

    def __call__(self, number: int) -> Batch:
        """The batch of that number; the same whenever it is asked for."""
        size, position, places = self._order.batch(number)
        chosen = self._vary([self._examples[place] for place in places], number)
        others = self._classes.get(size, [])
        if others:
            picks = rounds(len(others), position * self._batch, self._batch, self._seed, "class", *size)
            chosen += [others[pick] for pick in picks]
        draw = generator(self._seed, "noise", number)
        latents = torch.stack([self._latents(example) for example in chosen])
        noise = draw_noise(self._objective, latents.shape, draw)
        timesteps = draw_timesteps(self._objective, self._base.noise, len(chosen), draw, _sides(latents))
        dropped = (torch.rand(len(chosen), generator=draw) < self._dropout).tolist()
        perturbation = draw_perturbation(self._objective, latents.shape, draw)
        captions = ["" if drop else example.caption for drop, example in zip(dropped, chosen, strict=True)]
        device = self._base.device
        return Batch(
            latents=latents.to(device),
            noise=noise.to(device),
            timesteps=timesteps.to(device),
            conditioning=self._conditioner(captions, size).to(device),
            instances=len(places),
            examples=tuple(chosen),
            perturbation=None if perturbation is None else perturbation.to(device),
        )

    def _vary(self, chosen: Sequence[Example], number: int) -> list[Example]:
        # Draws of their own, so that none of these settings changes the noise.
        words, looks = (generator(self._seed, purpose, number) for purpose in ("caption", "look"))
        picks = torch.randint(len(self._looks), (len(chosen),), generator=looks).tolist()
        return [
            replace(example, caption=self._rewriter.rewrite(example.caption, words), augmentation=self._looks[pick])
            for example, pick in zip(chosen, picks, strict=True)
        ]
