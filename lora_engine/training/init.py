"""Initializes the adapter and the learned token of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.adapters import Adapter, LayerSettings, create_adapter
from lora_engine.adapters.regularization import check_low_rank
from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.errors import SettingsError
from lora_engine.formats.embeddings import Embedding
from lora_engine.seeds import generator
from lora_engine.training.captions import Rewriter
from lora_engine.training.embeddings import init_token
from lora_engine.training.examples import Example
from lora_engine.training.initial import InitialAdapter, start_from, start_token
from lora_engine.training.rates import learning_rates
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.methods import TokenSettings


def init_adapter(base: BaseModel, settings: TrainSettings, initial: InitialAdapter | None = None) -> Adapter:
    """Returns the adapter before its first step; without modules for a method that trains a token only.

    Args:
        base: The base.
        settings: The settings.
        initial: The adapter to start from; None starts with a difference of zero.

    Raises:
        SettingsError: A target, a kind or a rate does not suit the base, or the initial adapter the settings.
    """
    if not settings.method.has_adapter:
        if initial is not None and initial.bundle.adapter.modules:
            raise SettingsError(
                f"method {settings.method.name!r} trains no adapter, but init has one",
                where="init",
                remedy="choose another method, or leave init out",
            )
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
    if initial is None:
        return adapter
    has_alpha = settings.alpha is not None or any(override.alpha for override in settings.overrides.values())
    return start_from(initial, adapter, base, keeps_scale=not has_alpha)


def init_embeddings(
    base: BaseModel,
    settings: TrainSettings,
    manifest: Manifest,
    examples: Sequence[Example],
    initial: InitialAdapter | None = None,
) -> tuple[Embedding, ...]:
    """Returns the learned token before its first step; empty if the method learns none.

    Raises:
        SettingsError: The token does not suit the captions, or the initial adapter's tokens the method.
    """
    method = settings.method
    if not isinstance(method, TokenSettings):
        if initial is not None:
            start_token(initial, None)
        return ()
    rewriter = Rewriter(settings.captions)
    captions = [rewriter.rewrite(text) for example in examples for text in example.captions]
    token = init_token(base, method, manifest.trigger, manifest.class_word, captions, seed=settings.seed)
    return (token if initial is None else start_token(initial, token) or token,)


def _overrides(settings: TrainSettings) -> dict[str, LayerSettings]:
    overrides = {}
    for pattern, override in settings.overrides.items():
        kind = override.kind or settings.kind
        alpha = override.alpha or (None if override.rank else settings.alpha)
        overrides[pattern] = LayerSettings(kind.name, override.rank or settings.rank, alpha, kind.options())
    return overrides
