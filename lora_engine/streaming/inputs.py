"""Reads the adapters to fuse, checks them against the model, and collects the updates of each tensor.

All checks run here, before a byte is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta
from lora_engine.adapters.module_names import near_names
from lora_engine.checkpoints.scales import FLOATS
from lora_engine.errors import AdapterError, BaseModelError, SettingsError
from lora_engine.formats import read_adapter
from lora_engine.streaming.blocks import read_tensor
from lora_engine.streaming.model import StoredModel, TensorLocation
from lora_engine.streaming.provenance import FusedAdapter, adapter_digest
from lora_engine.streaming.updates import Update

Weighted = Sequence[tuple[Path, float]]
Sameness = Literal["same", "other", "unknown"]
Updates = dict[tuple[Path, str], list[Update]]
"""File and tensor name to the updates of the tensor."""


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter with its weight.

    Attributes:
        adapter: The adapter, read for the model.
        weight: Multiplier of the adapter.
        entry: The entry for the header of the fused model.
    """

    adapter: Adapter
    weight: float
    entry: FusedAdapter


def read_adapters(model: StoredModel, adapters: Weighted) -> list[WeightedAdapter]:
    """Reads adapters for a model.

    Raises:
        AdapterError: A file is not an adapter, or does not fit the model.
        SettingsError: There is no adapter, or a weight is not finite.
    """
    if not adapters:
        raise SettingsError("there are no adapters", allowed="one or more", remedy="name an adapter")
    loaded = []
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
        entry = FusedAdapter(adapter_digest(path), float(weight), card.title)
        loaded.append(WeightedAdapter(adapter, float(weight), entry))
    return loaded


def check_base(base: StoredModel | None, adapters: Sequence[WeightedAdapter], *, is_other_allowed: bool) -> Sameness:
    """Compares the fingerprint of a model with those that adapters name; hashes nothing if no adapter names one.

    Raises:
        BaseModelError: The model is another one, and `is_other_allowed` is False.
    """
    named = {item.adapter.fingerprint for item in adapters} - {None}
    fingerprint = base.fingerprint() if base is not None and named else None
    if fingerprint is None or base is None:
        return "unknown"
    if named == {fingerprint}:
        return "same" if all(item.adapter.fingerprint for item in adapters) else "unknown"
    if not is_other_allowed:
        other = min(str(name) for name in named - {fingerprint})
        raise BaseModelError(
            f"the model is {fingerprint[:16]}... and an adapter was trained for {other[:16]}...",
            where=str(base.path),
            allowed="the base that the adapter names by its fingerprint",
            remedy="use that base, or allow another one",
        )
    return "other"


def updates_by_tensor(
    model: StoredModel, adapters: Sequence[WeightedAdapter], *, sign: float, reference: StoredModel | None = None
) -> Updates:
    """Returns the updates of each tensor.

    Args:
        model: The model to change.
        adapters: The adapters with their weights.
        sign: 1 to fuse, -1 to unfuse.
        reference: The model that the deltas refer to; None means `model`.

    Raises:
        AdapterError: A module or a bias is missing in the model, or an adapter has no modules.
        BaseModelError: The dtype of a weight does not support arithmetic.
    """
    updates: Updates = {}
    for item in adapters:
        if not item.adapter.modules:
            raise AdapterError("the adapter has no modules", remedy="check the file that it was read from")
        for module, delta in item.adapter.modules.items():
            for part in _parts(model, module, delta):
                name = f"{module}.{part}"
                location = model.locations[name]
                _check_dtype(location)
                if item.weight == 0.0:
                    continue
                read = None if reference is None else partial(read_location, reference.locations[name])
                update = Update(delta, sign * item.weight, location, part == "bias", read)
                updates.setdefault((location.stored.path, location.name), []).append(update)
    return updates


def check_removable(adapters: Sequence[WeightedAdapter]) -> None:
    """Raises `AdapterError` if a delta depends on the weight that it was added to.

    Raises:
        AdapterError: A kind depends on the weight (DoRA, OFT, IA3), and needs the base to be unfused.
    """
    for name, delta in (entry for item in adapters for entry in item.adapter.modules.items()):
        if delta.reads_base:
            raise AdapterError(
                f"the delta of kind {delta.kind!r} depends on the original weight, which is not in the fused model",
                where=name,
                allowed="kinds whose delta does not depend on the weight, or the base together with the fused model",
                remedy="name the base that it was fused into",
            )


def check_same_tensors(
    model: StoredModel, other: StoredModel, except_for: Collection[str] = (), *, in_any_layout: bool = False
) -> None:
    """Raises `BaseModelError` if the tensors of two models differ in name or shape, except for some names.

    Args:
        model: A model.
        other: Another one.
        except_for: Canonical names that are not compared.
        in_any_layout: True compares canonical names and shapes; False also the names in the files.

    Raises:
        BaseModelError: Names or shapes differ; the message has their number and the first name.
    """
    first_shapes, second_shapes = (
        {name: ("" if in_any_layout else location.name, location.shape) for name, location in item.locations.items()}
        for item in (model, other)
    )
    names = first_shapes.keys() | second_shapes.keys()
    differing = sorted(
        name for name in names if first_shapes.get(name) != second_shapes.get(name) and name not in except_for
    )
    if differing:
        first = differing[0]
        shown = [list(shapes[first][1]) if first in shapes else "missing" for shapes in (first_shapes, second_shapes)]
        raise BaseModelError(
            f"{len(differing)} tensors differ in name or shape between the models; the first is {first!r},"
            f" {shown[0]} in one and {shown[1]} in the other",
            where=f"{model.path}, {other.path}",
            allowed="two models of one architecture in one layout",
            remedy="check both paths",
        )


def read_location(location: TensorLocation) -> Tensor:
    """Reads the weight or the bias of a module, in the module's shape; in its stored dtype, or float32 if scaled."""
    source = os.open(location.stored.path, os.O_RDONLY)
    try:
        tensor = read_tensor(source, location.stored)
    finally:
        os.close(source)
    return location.view(tensor)


def _parts(model: StoredModel, module: str, delta: Delta) -> Iterable[str]:
    if module not in model.module_shapes:
        raise AdapterError(f"the model has no module {module!r}", allowed=near_names(module, model.module_shapes))
    bias = model.locations.get(f"{module}.bias")
    if delta.delta_bias(None if bias is None else torch.zeros(bias.shape)) is None:
        return ("weight",)
    if bias is None:
        raise AdapterError(
            "the adapter changes a bias that the module does not have",
            where=module,
            remedy="use a model whose layer has a bias",
        )
    return ("weight", "bias")


def _check_dtype(location: TensorLocation) -> None:
    if location.stored.dtype not in FLOATS:
        raise BaseModelError(
            f"the dtype of the weight is {location.stored.dtype}",
            where=f"{location.stored.path}: tensor {location.name!r}",
            allowed=", ".join(FLOATS),
            remedy="use the model in one of these dtypes",
        )
