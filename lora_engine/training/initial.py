"""Reads the adapter that a training starts from, and fits it to the settings without changing its effect."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, DoraDelta, FullDelta, LoraDelta
from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.tree import as_tree, module_shapes
from lora_engine.bases.base import BaseModel
from lora_engine.bases.options import differing_options
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import sha256_file
from lora_engine.finite import check_finite
from lora_engine.formats import Bundle, Card, read_bundle
from lora_engine.formats.embeddings import Embedding

_log = logging.getLogger(__name__)
_RESIZE = "loraline resize FILE --others lora --rank N --base BASE -o lora.safetensors"
_LORA_ONLY = "; kinds lora, rslora, lora-fa and full start from a LoRA, others from their own kind and size"


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter that a training starts from.

    Attributes:
        bundle: The adapter with its card and learned tokens; its modules fit the base.
        file: The file.
        sha256: Digest of the file.
    """

    bundle: Bundle
    file: Path
    sha256: str

    @property
    def parent(self) -> str:
        """Title and digest of the file, for the recipe."""
        return f"{self.bundle.card.title or self.file.stem} sha256:{self.sha256}"

    @property
    def card(self) -> Card:
        """The card in the file's header."""
        return self.bundle.card


def read_initial(file: Path, base: BaseModel) -> InitialAdapter:
    """Reads an adapter file and checks it against the base.

    Raises:
        AdapterError: The file is no valid adapter, has non-finite values, or is for another family or base.
    """
    bundle = read_bundle(file, module_shapes(base))
    adapter = bundle.adapter
    for noun, stated, expected in (
        ("family", adapter.base, base.family),
        ("base model", adapter.fingerprint, base.fingerprint),
    ):
        if stated and stated != expected:
            raise AdapterError(
                f"init is for {noun} {stated!r}, but the training's is {expected!r}",
                where=str(file),
                remedy="choose an adapter of this base, or train on the base of the adapter",
            )
    if differing := differing_options(bundle.card, base.options):
        _log.warning("init was trained with %s: its effect differs from that of its training; set the options alike, "
                     "unless that is meant", "; ".join(differing))  # fmt: skip
    for name, delta in adapter.modules.items():
        check_finite(delta.factors(), f"{file}: module {name!r}")
    for embedding in bundle.embeddings:
        check_finite(embedding.vectors, f"{file}: token {embedding.token!r}")
    return InitialAdapter(bundle, file, sha256_file(file))


def start_from(initial: InitialAdapter, new: Adapter, base: BaseModel, *, keeps_scale: bool) -> Adapter:
    """Returns a new adapter with the effect of the initial one; modules that only the new one has keep their zero.

    Args:
        initial: The adapter to start from.
        new: An adapter of the settings, before its first step.
        base: The base.
        keeps_scale: True takes the initial alpha over rank where the new scale is the default 1.

    Raises:
        SettingsError: The new adapter lacks a module, or cannot have the same effect; says what to change.
    """
    old = initial.bundle.adapter.modules
    missing = sorted(old.keys() - new.modules.keys())
    if missing:
        raise SettingsError(
            f"targets select {len(new.modules)} layers, but not {len(missing)} of the {len(old)} of init, first "
            f"{missing[0]!r}",
            where="init",
            remedy="add them to targets",
        )
    tree, modules = as_tree(base), dict(new.modules)
    for name, delta in old.items():
        layer = innermost(tree.get_module(name))
        try:
            modules[name] = _fitted(delta, modules[name], layer, keeps_scale=keeps_scale)
        except SettingsError as error:
            raise error.at(f"init, module {name!r}") from error
    return replace(new, modules=modules)


def start_token(initial: InitialAdapter, new: Embedding | None) -> Embedding | None:
    """Returns the learned token to start with: that of the file if it has one.

    Raises:
        SettingsError: The file has tokens that the method does not train, or in other sizes.
    """
    embeddings = initial.bundle.embeddings
    if not embeddings:
        return new
    tokens = ", ".join(repr(embedding.token) for embedding in embeddings)
    match = next((embedding for embedding in embeddings if new is not None and embedding.token == new.token), None)
    if new is None or match is None or len(embeddings) > 1:
        trained = "no token" if new is None else f"the token {new.token!r}"
        raise SettingsError(
            f"init has the learned tokens {tokens}, but the method trains {trained}",
            where="init",
            remedy="choose method pivotal or textual-inversion with this token, or an adapter without one",
        )
    shapes = [{part: list(rows.shape) for part, rows in item.vectors.items()} for item in (match, new)]
    if shapes[0] != shapes[1]:
        raise SettingsError(
            f"init has vectors of shape {shapes[0]} for {new.token!r}, but the settings give {shapes[1]}",
            where="init",
            remedy="set the method's `vectors` to those of init",
        )
    return match


def _fitted(old: Delta, new: Delta, layer: nn.Module, *, keeps_scale: bool) -> Delta:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    old = _as_float32(old.reshaped_for(tuple(weight.shape)))
    if isinstance(new, FullDelta) and not isinstance(old, FullDelta):
        return _as_full(old, weight, bias_of(layer))
    if isinstance(old, LoraDelta) and isinstance(new, LoraDelta):
        return _enlarged(old, new, keeps_scale=keeps_scale)
    if isinstance(old, DoraDelta) and isinstance(new, DoraDelta) and old.axis == new.axis:
        inner, direction = old.inner, new.inner
        if isinstance(inner, LoraDelta) and isinstance(direction, LoraDelta):
            return DoraDelta(_enlarged(inner, direction, keeps_scale=keeps_scale), old.magnitude)
    if type(old) is type(new) and _shapes(old) == _shapes(new):
        return old
    raise SettingsError(
        f"init has kind {old.kind!r} with factors {_shapes(old)}, which kind {new.kind!r} with {_shapes(new)} cannot "
        "start from",
        remedy=f"train kind {old.kind} in the same sizes, or convert it first: {_RESIZE}{_LORA_ONLY}",
    )


def _enlarged(old: LoraDelta, new: LoraDelta, *, keeps_scale: bool) -> LoraDelta:
    """Returns the old factors, padded: new rows of `down` are random and their columns of `up` are zero."""
    if old.mid is not None and new.mid is None:
        old = old.without_core()
    if old.rank > new.rank or (old.mid is None) != (new.mid is None):
        problem = f"rank {new.rank} is less than the {old.rank} of init"
        raise SettingsError(
            problem if old.rank > new.rank else "init has no Tucker core, but the kind has tucker: true",
            remedy=f"set rank: {old.rank} or more, or reduce it first: loraline resize FILE --rank {new.rank} -o OUT"
            if old.rank > new.rank
            else "leave tucker out",
        )
    keeps = keeps_scale and new.scale == 1.0 and old.alpha != 0.0
    alpha = old.scale * new.rank if keeps else new.alpha
    ratio = 1.0 if keeps else old.scale / new.scale
    rank, down, up = old.rank, new.down.clone(), torch.zeros_like(new.up)
    down[:rank] = old.down
    up[:, :rank] = (old.up.double() * ratio).float()
    mid = None
    if new.mid is not None and old.mid is not None:
        mid = new.mid.clone()
        mid[:rank] = 0.0
        mid[:rank, :rank] = old.mid
    return replace(new, down=down, up=up, alpha=alpha, mid=mid, bias=old.bias)


def _as_full(old: Delta, weight: Tensor, bias: Tensor | None) -> FullDelta:
    return FullDelta(old.delta_weight(weight).float().cpu(), old.delta_bias(bias))


def _as_float32(delta: Delta) -> Delta:
    return delta.with_factors({name: factor.float().cpu() for name, factor in delta.factors().items()})


def _shapes(delta: Delta) -> Mapping[str, list[int]]:
    return {name: list(factor.shape) for name, factor in delta.factors().items()}
