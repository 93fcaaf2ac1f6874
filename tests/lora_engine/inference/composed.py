"""Adapters with effect, images with composed adapters, and a base with fused ones, for tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, collapse, create_adapter
from lora_engine.bases.base import BaseModel
from lora_engine.formats import Bundle, Card
from lora_engine.inference import ComposedEngine
from lora_engine.inference.composed_images import generate_composed
from lora_engine.inference.composition import compose
from lora_engine.inference.merged_cache import MergedCache
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.regions import NO_REGIONS, Regions
from lora_engine.inference.settled_tags import all_tags
from lora_engine.inference.source_image import SourceImage

STEPS, SIZE = 4, (16, 16)


def random_adapter(
    base: BaseModel, kind: str, seed: int, targets: Sequence[str] = ("attention", "text_encoder*.q_proj")
) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    adapter = create_adapter(base, list(targets), kind, rank=2, generator=draw)
    modules = {
        name: delta.with_factors(
            {key: 0.3 * torch.randn(factor.shape, generator=draw) for key, factor in delta.factors().items()}
        )
        for name, delta in adapter.modules.items()
    }
    return Adapter(modules, adapter.base, adapter.fingerprint)


def draw_composed(
    base: BaseModel,
    prompt: str,
    adapters: Sequence[Adapter] = (),
    *,
    negative: str = "",
    guidance: float = 3.0,
    engine: ComposedEngine = "auto",
    regions: Regions = NO_REGIONS,
    source: SourceImage | None = None,
    cache: MergedCache | None = None,
) -> Tensor:
    """Returns two images; the adapters are those of the tags of the prompt, then of its regions."""
    read = parse_prompt(prompt)
    tags = all_tags(read, regions)
    bundles = [(tag, Bundle(adapter, Card())) for tag, adapter in zip(tags, adapters, strict=True)]
    with compose(base, bundles, engine=engine, cache=cache) as made:
        return generate_composed(
            base,
            read,
            made,
            negative=parse_prompt(negative, is_negative=True),
            seeds=[1, 2],
            steps=STEPS,
            guidance=guidance,
            height=SIZE[0],
            width=SIZE[1],
            regions=regions,
            source=source,
        )


@contextmanager
def fused(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[None]:
    """Fuses adapters into the weights of a base, from a copy that is restored."""
    before = {name: copy.deepcopy(module.state_dict()) for name, module in base.modules.items()}
    for adapter, weight in adapters:
        collapse(base, adapter, weight)
    try:
        yield
    finally:
        for name, state in before.items():
            base.modules[name].load_state_dict(state)
