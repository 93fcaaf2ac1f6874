"""The adapters that a model is to be given: read, checked against the model, and laid out as terms by tensor.

All refusals happen here, before a byte is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta
from lora_engine.adapters.tree import near_names
from lora_engine.errors import AdapterError, BaseModelError, SettingsError
from lora_engine.formats import read_adapter
from lora_engine.merging.deltas import needs_base_values
from lora_engine.streaming.blocks import FLOATS, read_tensor
from lora_engine.streaming.model import Place, StoredModel
from lora_engine.streaming.provenance import FusedAdapter, adapter_digest
from lora_engine.streaming.updates import Term

Weighted = Sequence[tuple[Path, float]]
Sameness = Literal["same", "other", "unknown"]
Terms = dict[tuple[Path, str], list[Term]]
"""What is added to each tensor, by file and name there."""


@dataclass(frozen=True)
class Given:
    """An adapter with its weight.

    Attributes:
        adapter: As read for the model.
        weight: Its multiplier.
        entry: What the header of the model says of it.
    """

    adapter: Adapter
    weight: float
    entry: FusedAdapter


def read_given(model: StoredModel, adapters: Weighted) -> list[Given]:
    """Reads adapters for a model.

    Raises:
        AdapterError: A file that is no adapter, or one that does not fit the model.
        SettingsError: No adapter, or a weight that is not finite.
    """
    if not adapters:
        raise SettingsError("no adapter is given", allowed="one or more", remedy="name an adapter")
    found = []
    for path, weight in adapters:
        if not math.isfinite(weight):
            raise SettingsError(f"the weight of {str(path)!r} is {weight!r}", allowed="a finite number")
        adapter, card = read_adapter(path, model.module_shapes)
        if adapter.base and model.family and adapter.base != model.family:
            raise AdapterError(
                f"the adapter is for {adapter.base!r} and the model is {model.family!r}",
                where=str(path),
                remedy="choose a model of the adapter's family",
            )
        found.append(Given(adapter, float(weight), FusedAdapter(adapter_digest(path), float(weight), card.title)))
    return found


def check_base(base: StoredModel | None, given: Sequence[Given], *, is_other_allowed: bool) -> Sameness:
    """Whether a model is the one that adapters name by fingerprint; nothing is hashed where no adapter names one.

    Raises:
        BaseModelError: It is another one, and that is not allowed.
    """
    named = {one.adapter.fingerprint for one in given} - {None}
    found = base.fingerprint() if base is not None and named else None
    if found is None or base is None:
        return "unknown"
    if named == {found}:
        return "same" if all(one.adapter.fingerprint for one in given) else "unknown"
    if not is_other_allowed:
        other = min(str(name) for name in named - {found})
        raise BaseModelError(
            f"the model is {found[:16]}... and an adapter was made for {other[:16]}...",
            where=str(base.path),
            allowed="the base that the adapter names by its fingerprint",
            remedy="give that base, or allow another one",
        )
    return "other"


def terms_of(model: StoredModel, given: Sequence[Given], *, sign: float, reference: StoredModel | None = None) -> Terms:
    """What is added to each tensor.

    Args:
        model: The model that is changed.
        given: The adapters.
        sign: 1 to put them in, -1 to take them out.
        reference: The model that the deltas refer to, where it is not the one that is changed.

    Raises:
        AdapterError: A module that is missing, a bias that its layer has not, an adapter without modules.
        BaseModelError: A weight of a dtype that no arithmetic is done on.
    """
    terms: Terms = {}
    for one in given:
        if not one.adapter.modules:
            raise AdapterError("the adapter has no modules", remedy="check the file that it came from")
        for module, delta in one.adapter.modules.items():
            for part in _parts(model, module, delta):
                name = f"{module}.{part}"
                place = model.places[name]
                _check_dtype(place)
                if one.weight == 0.0:
                    continue
                read = None if reference is None else partial(read_place, reference.places[name])
                term = Term(delta, sign * one.weight, place, part == "bias", read)
                terms.setdefault((place.stored.path, place.name), []).append(term)
    return terms


def check_removable(given: Sequence[Given]) -> None:
    """Does nothing for adapters whose deltas do not depend on the weight that they are added to.

    Raises:
        AdapterError: A kind depends on it (DoRA, OFT, IA3), so that taking out needs the base.
    """
    for name, delta in (item for one in given for item in one.adapter.modules.items()):
        if needs_base_values(delta):
            raise AdapterError(
                f"what an adapter of kind {delta.kind!r} adds depends on the weight before, which is gone",
                where=name,
                allowed="kinds whose delta stands for itself, or the base beside the fused model",
                remedy="name the base that it was fused into",
            )


def check_same(model: StoredModel, other: StoredModel) -> None:
    """Does nothing for two models that have the same tensors.

    Raises:
        BaseModelError: Names or shapes differ; counts them and names the first.
    """
    mine = {name: (place.name, place.shape) for name, place in model.places.items()}
    theirs = {name: (place.name, place.shape) for name, place in other.places.items()}
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        first = differing[0]
        shown = [list(found[first][1]) if first in found else "missing" for found in (mine, theirs)]
        raise BaseModelError(
            f"{len(differing)} tensors are not the same in name and shape in both models; the first is {first!r},"
            f" {shown[0]} in one and {shown[1]} in the other",
            where=f"{model.path}, {other.path}",
            allowed="two models of one architecture in one layout",
            remedy="check that both are what you meant",
        )


def read_place(place: Place) -> Tensor:
    """The weight or the bias of a module, in its stored dtype and the module's own shape."""
    source = os.open(place.stored.path, os.O_RDONLY)
    try:
        tensor = read_tensor(source, place.stored)
    finally:
        os.close(source)
    part = tensor[slice(*place.rows)] if tensor.dim() else tensor
    return (part.T if place.transposed else part).reshape(place.shape)


def _parts(model: StoredModel, module: str, delta: Delta) -> Iterable[str]:
    if module not in model.module_shapes:
        raise AdapterError(f"the model has no module {module!r}", allowed=near_names(module, model.module_shapes))
    bias = model.places.get(f"{module}.bias")
    if delta.delta_bias(None if bias is None else torch.zeros(bias.shape)) is None:
        return ("weight",)
    if bias is None:
        raise AdapterError(
            "the adapter changes a bias and the module has none",
            where=module,
            remedy="take a model whose layer has a bias",
        )
    return ("weight", "bias")


def _check_dtype(place: Place) -> None:
    if place.stored.dtype not in FLOATS:
        raise BaseModelError(
            f"the dtype of the weight is {place.stored.dtype}",
            where=f"{place.stored.path}: tensor {place.name!r}",
            allowed=", ".join(FLOATS),
            remedy="take the model in one of these dtypes",
        )
