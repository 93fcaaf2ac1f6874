"""Trains all ranks of one adapter at once, of which a prefix can be chosen: `rank: auto` (DyLoRA, arXiv 2210.07558)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from lora_engine.adapters import Attachment
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import module_shapes
from lora_engine.seeds import generator
from lora_engine.training.automatic import prefixes_up_to
from lora_engine.training.phases import Phase
from lora_engine.training.prepared import Prepared
from lora_engine.training.spec import TrainSettings


def highest_rank(prepared: Prepared, settings: TrainSettings) -> int:
    """Returns the highest rank that `rank: auto` can train: that of the smallest selected layer, at most 32."""
    shapes = module_shapes(prepared.base)
    selected = [shapes[name] for name in select_modules(shapes, settings.targets)]
    return max(prefixes_up_to(min(min(shape[0], math.prod(shape[1:])) for shape in selected)), default=1)


def with_prefixes(phase: Phase, attachment: Attachment, settings: TrainSettings) -> Phase:
    """Returns a phase of which each step trains the first ranks only, as many as are drawn (DyLoRA, arXiv 2210.07558).

    Args:
        phase: The phase.
        attachment: The adapter; all its deltas are plain LoRA.
        settings: The settings; all batches of a step train the same ranks.
    """
    ranks = prefixes_up_to(settings.rank)

    def context(number: int) -> AbstractContextManager[None]:
        rank = _draw(ranks, settings.seed, phase.name, number // settings.accumulate)
        return _both(phase.batch_context(number), attachment.first_ranks(rank))

    return replace(phase, batch_context=context)


def _draw(ranks: Sequence[int], seed: int, phase: str, step: int) -> int:
    return ranks[int(torch.randint(len(ranks), (), generator=generator(seed, "prefix", phase, step)))]


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield
