"""Creates adapters for a base, which change nothing before they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.delta import Delta, kinds
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import Base, as_tree, module_shapes
from lora_engine.errors import SettingsError


@dataclass(frozen=True)
class LayerSettings:
    """Settings of a new delta.

    Attributes:
        kind: Name of an adapter kind.
        rank: Inner dimension.
        alpha: The scale is `alpha / rank` for most kinds; None means the kind's default, a scale of 1.
        options: Keyword options of the kind; see `lora_engine.catalog.kinds`.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def create(self, layer: nn.Module, generator: torch.Generator | None) -> Delta:
        """Creates a delta for a layer.

        Raises:
            SettingsError: The kind is unknown, or a setting is not valid for the layer.
        """
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias = bias_of(layer)
        return kinds[self.kind].create(
            weight.detach(), bias if bias is None else bias.detach(), self.rank, self.alpha, generator, **self.options
        )


def create_adapter(
    base: Base,
    targets: str | Sequence[str] = "attention",
    kind: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, LayerSettings] | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:
    """Creates an adapter for a base: factors in float32 on the CPU, and a delta of zero.

    Args:
        base: A base model, a diffusers pipeline, a torch module, or torch modules by component name.
        targets: See `select_modules`.
        kind: Name of an adapter kind.
        rank: Inner dimension.
        alpha: The scale is `alpha / rank`; None means the rank, which gives scale 1.
        options: Keyword options of the kind.
        overrides: Pattern (as in `targets`) to other settings for the selected modules that it matches; the last match
            wins.
        generator: Draws the random factors; equal generator states give equal adapters.

    Raises:
        SettingsError: A kind or target is unknown, a setting is not valid for a target (the message names it), or an
            override matches none of the selected modules.
    """
    tree = as_tree(base)
    shapes = module_shapes(tree)
    plain = LayerSettings(kind, rank, alpha, options or {})
    settings = dict.fromkeys(select_modules(shapes, targets), plain)
    for pattern, special in (overrides or {}).items():
        matches = settings.keys() & select_modules(shapes, pattern)
        if not matches:
            raise SettingsError(
                f"override {pattern!r} matches none of the {len(settings)} modules that the targets select",
                remedy="add the modules to the targets, or fix the pattern",
            )
        settings |= dict.fromkeys(matches, special)
    modules: dict[str, Delta] = {}
    for name, layer_settings in settings.items():
        try:
            modules[name] = layer_settings.create(innermost(tree.get_module(name)), generator)
        except SettingsError as error:
            if error.where:
                raise
            raise error.at(name) from error
    return Adapter(modules, tree.family, tree.fingerprint)
