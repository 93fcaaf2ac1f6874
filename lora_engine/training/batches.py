"""Which examples stand in which batch, under which noise: pure functions of (seed, number of the batch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.seeds import generator
from lora_engine.training.examples import Conditioner, Example, Size


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; all tensors on the base's device.

    Attributes:
        latents: float32 [n, channels, height, width], without noise.
        noise: Of the same shape.
        timesteps: int64 [n].
        conditioning: n rows.
        instances: The first so many rows are the person's pictures; the rest are class pictures.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    instances: int


class Order:
    """An endless order of batches in which all pictures of a batch have one size.

    Within a size, the pictures come in shuffled rounds, one round after another, so that every batch is full however
    few pictures there are. A size comes up in proportion to its pictures.

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
        self._slots = [size for size, places in self._groups.items() for _ in range(max(1, -(-len(places) // batch)))]
        # Bound to the instance, so that a cache never outlives its run.
        self._epoch = lru_cache(maxsize=4)(self._shuffle_slots)

    def batch(self, number: int) -> tuple[Size, int, list[int]]:
        """The size of a batch, its number among the batches of that size, and the places of its examples."""
        epoch, slot = divmod(number, len(self._slots))
        size, within = self._epoch(epoch)[slot]
        position = epoch * self._slots.count(size) + within
        places = self._groups[size]
        picks = rounds(len(places), position * self._batch, self._batch, self._seed, "instance", *size)
        return size, position, [places[pick] for pick in picks]

    def _shuffle_slots(self, epoch: int) -> list[tuple[Size, int]]:
        order = torch.randperm(len(self._slots), generator=generator(self._seed, "slots", epoch)).tolist()
        seen: dict[Size, int] = {}
        found: list[tuple[Size, int]] = []
        for place in order:
            size = self._slots[place]
            found.append((size, seen.get(size, 0)))
            seen[size] = seen.get(size, 0) + 1
        return found


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
    ) -> None:
        self._base, self._latents, self._conditioner = base, latents, conditioner
        self._examples, self._seed, self._batch, self._dropout = examples, seed, batch, caption_dropout
        self._order = Order([example.size for example in examples], batch, seed)
        self._classes: dict[Size, list[Example]] = {}
        for example in class_examples:
            self._classes.setdefault(example.size, []).append(example)

    def __call__(self, number: int) -> Batch:
        """The batch of that number; the same whenever it is asked for."""
        size, position, places = self._order.batch(number)
        chosen = [self._examples[place] for place in places]
        others = self._classes.get(size, [])
        if others:
            picks = rounds(len(others), position * self._batch, self._batch, self._seed, "class", *size)
            chosen += [others[pick] for pick in picks]
        draw = generator(self._seed, "noise", number)
        latents = torch.stack([self._latents(example) for example in chosen])
        noise = torch.randn(latents.shape, generator=draw)
        timesteps = torch.randint(self._base.noise.timesteps, (len(chosen),), generator=draw)
        dropped = (torch.rand(len(chosen), generator=draw) < self._dropout).tolist()
        captions = ["" if drop else example.caption for drop, example in zip(dropped, chosen, strict=True)]
        device = self._base.device
        return Batch(
            latents=latents.to(device),
            noise=noise.to(device),
            timesteps=timesteps.to(device),
            conditioning=self._conditioner(captions, size).to(device),
            instances=len(places),
        )
