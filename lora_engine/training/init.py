"""Initializes the adapter and the learned token of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.adapters import Adapter, LayerSettings, create_adapter
from lora_engine.adapters.regularization import check_low_rank
from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.formats.embeddings import Embedding
from lora_engine.seeds import generator
from lora_engine.training.captions import Rewriter
from lora_engine.training.embeddings import init_token
from lora_engine.training.examples import Example
from lora_engine.training.rates import learning_rates
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.methods import TokenSettings


def init_adapter(base: BaseModel, settings: TrainSettings) -> Adapter:
    """Returns the adapter before its first step; without modules for a method that trains a token only.

    Raises:
        SettingsError: A target, a kind or a rate does not suit the base.
    """
    if not settings.method.has_adapter:
        return Adapter({}, base.family, base.fingerprint)
    adapter = create_adapter(
        base,
        settings.targets,
        settings.kind.name,
        settings.rank,
        settings.alpha,
        options=settings.kind.options(),
        overrides=_overrides(settings),
        generator=generator(settings.seed, "factors"),
    )
    for setting in ("rank_dropout", "norm_limit"):
        if getattr(settings, setting):
            check_low_rank(adapter, setting)
    names = [f"{module}.{factor}" for module, delta in adapter.modules.items() for factor in delta.factors()]
    if names:
        learning_rates(names, settings.rates, settings.learning_rate)  # raises for rates that match nothing
    return adapter


def init_embeddings(
    base: BaseModel, settings: TrainSettings, manifest: Manifest, examples: Sequence[Example]
) -> tuple[Embedding, ...]:
    """Returns the learned token before its first step; empty if the method learns none."""
    method = settings.method
    if not isinstance(method, TokenSettings):
        return ()
    rewriter = Rewriter(settings.captions)
    captions = [rewriter.rewrite(example.caption) for example in examples]
    return (init_token(base, method, manifest.trigger, manifest.class_word, captions, seed=settings.seed),)


def _overrides(settings: TrainSettings) -> dict[str, LayerSettings]:
    overrides = {}
    for pattern, override in settings.overrides.items():
        kind = override.kind or settings.kind
        alpha = override.alpha or (None if override.rank else settings.alpha)
        overrides[pattern] = LayerSettings(kind.name, override.rank or settings.rank, alpha, kind.options())
    return overrides
