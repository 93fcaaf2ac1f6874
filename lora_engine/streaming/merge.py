"""Merges whole checkpoints tensor by tensor, from file to file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.streaming.arithmetic import CHECKPOINT_METHODS, CheckpointMethod
from lora_engine.streaming.blocks import read_rows, refuse_not_finite
from lora_engine.streaming.channels import common_channels
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.output import check_apart, check_output, copy_whole, write_model
from lora_engine.streaming.provenance import without_stale
from lora_engine.streaming.rewrite import rewrite
from lora_engine.streaming.rounding import Rounding, RoundingMode

MERGED = "loraline.merged"


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `merge_checkpoints`.

    Attributes:
        files: The written files.
        tensors: Number of merged tensors.
        kept: Number of tensors that are not floats, copied from the first model.
        parents: Digest of each model's weights, in the order of the models.
        weights: The weights that were used.
        common_channels: Tensors that have more input channels in some models, such as inpainting models, with the
            number of channels that were merged; the first model's other channels are unchanged.
        warnings: Facts about the result that may be unintended.
        survived: Share of the first model's change that rounding to its dtypes keeps; see `Rounding.survived`.
        raised_scales: Number of scales of quantized weights that were raised because merged values would not fit.
    """

    files: list[Path]
    tensors: int
    kept: int
    parents: list[str]
    weights: list[float] = field(default_factory=list)
    common_channels: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    survived: float | None = None
    raised_scales: int = 0


def merge_checkpoints(
    models: Sequence[Path],
    weights: Sequence[float] | None,
    output: Path,
    *,
    method: str = "weighted-sum",
    options: Mapping[str, float] | None = None,
    component: str | None = None,
    architecture: str | None = None,
    rounding: RoundingMode = "nearest",
    seed: int = 0,
) -> CheckpointReport:
    """Merges whole models of one architecture. The result has the first model's layout, dtypes and other files.

    The arithmetic is in float32 (float64 for float64 tensors of the first model), and casts last. Tensors that are not
    floats come from the first model. If models read different numbers of input channels, the common ones are merged.
    After an error, there is no output.

    Args:
        models: Paths for `open_model`, all of one layout.
        weights: The weights that the method needs; None means equal shares, or 1 if the weights are not shares.
        output: Path of the new model; a folder if the first model is one. Written atomically.
        method: `weighted-sum`, `add-difference` or `ties`; see `CHECKPOINT_METHODS`.
        options: Options of the method by name; None means the defaults.
        component: Component of a single file; None means inferred.
        architecture: Architecture of original single files; None means inferred.
        rounding: `nearest` or `stochastic`; see `fuse`.
        seed: Seed of stochastic rounding.

    Raises:
        BaseModelError: A model cannot be read, or tensors are missing or differ in shape.
        SettingsError: The method is unknown, the number of models or weights is wrong, or the output is not valid.
    """
    chosen, settings = CHECKPOINT_METHODS[method], dict(options or {})
    weights = chosen.weights_for([None] * len(models)) if weights is None else list(weights)
    chosen.check(len(models), len(weights), settings)
    _check_finite(weights)
    opened = [open_model(path, component=component, architecture=architecture) for path in models]
    for model in opened[1:]:
        check_apart(model, output)
    check_output(opened[0], output)
    common = common_channels([_shapes(model) for model in opened])
    _check_tensors(opened, common)
    parents = [_digest(model) for model in opened]
    note: dict[str, Any] = {"method": method, "weights": weights, "options": settings, "parents": parents}
    if common:
        note["common_channels"] = common
    merge, cast = partial(chosen.merge, weights=weights, **settings), Rounding(rounding, seed)
    with ExitStack() as stack:
        sources = _Sources(stack)
        header = {MERGED: canonical_json(note).decode()}
        write = partial(_write, opened, chosen, merge, header, sources, common, cast)
        files = write_model(opened[0], output, write)
    floats = sum(stored.dtype in FLOATS for stored in opened[0].tensors.values())
    kept, warnings = len(opened[0].tensors) - floats, _warnings(chosen, weights)
    return CheckpointReport(
        files, floats, kept, parents, weights, common, warnings, survived=cast.survived, raised_scales=cast.raised
    )


def _warnings(method: CheckpointMethod, weights: Sequence[float]) -> list[str]:
    total = math.fsum(weights)
    if not method.shares or abs(total - 1.0) <= 1e-6:
        return []
    return [f"the weights sum to {total:g}, which scales the model by about that factor; they normally sum to 1"]


class _Sources:
    """The source files, each opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def read(self, stored: StoredTensor, first: int, rows: int, dtype: torch.dtype) -> Tensor:
        """Reads rows of a tensor, starting at `first`, as `[rows, inner]` in a dtype."""
        if stored.path not in self._open:
            descriptor = os.open(stored.path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[stored.path] = descriptor
        return read_rows(self._open[stored.path], stored, first, rows).to(dtype)


@dataclass(frozen=True)
class _Merge:
    """A `Change` that merges a block of the first model with the same block of the others.

    Attributes:
        width: Number of elements per row that all models have; None means all.
    """

    others: Sequence[StoredTensor]
    width: int | None
    merge: Callable[[Sequence[Tensor]], Tensor]
    is_whole: bool
    sources: _Sources
    bound: float = math.inf

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        """Changes a block in place."""
        others = [self.sources.read(other, first, len(values), values.dtype) for other in self.others]
        common = [tensor[:, : self.width] for tensor in (values, *others)]
        common[0].copy_(self.merge(common))


def _write(
    models: Sequence[StoredModel],
    method: CheckpointMethod,
    merge: Callable[..., Tensor],
    note: dict[str, str],
    sources: _Sources,
    common: Mapping[str, int],
    rounding: Rounding,
    source: Path,
    target: Path,
) -> None:
    tensors, metadata = models[0].files[source]
    others = [model.tensors for model in models[1:]]
    keys = {name: key for key, (file, name) in models[0].origins.items() if file == source}
    changes = {}
    for name, stored in tensors.items():
        if name in keys and stored.dtype in FLOATS:
            channels = common.get(keys[name])
            width = None if channels is None else channels * math.prod(stored.shape[2:])
            same = [other[keys[name]] for other in others]
            changes[name] = partial(_Merge, same, width, merge, not method.is_elementwise, sources)
    if changes:
        rewrite(tensors, target, without_stale(metadata) | note, changes, rounding=rounding)
    else:
        refuse_not_finite(tensors.items())
        copy_whole(source, target)


def _shapes(model: StoredModel) -> dict[str, tuple[int, ...]]:
    return {name: stored.shape for name, stored in model.tensors.items()}


def _check_tensors(models: Sequence[StoredModel], common: Mapping[str, int]) -> None:
    first = models[0].tensors
    for model in models[1:]:
        other = model.tensors
        missing = sorted(first.keys() ^ other.keys())
        if missing:
            lacks, has = (models[0], model) if missing[0] in other else (model, models[0])
            raise BaseModelError(
                f"{len(missing)} tensors are not in both models; {missing[0]!r} is only in {str(has.path)!r}",
                where=str(lacks.path),
                allowed="models of one architecture in one layout",
                remedy="convert both to one layout, or choose other models",
            )
        for name, stored in first.items():
            second = other[name]
            is_same_shape = stored.shape == second.shape or name in common
            if not is_same_shape or (stored.dtype in FLOATS) != (second.dtype in FLOATS):
                raise BaseModelError(
                    f"the tensor {name!r} is {second.dtype} {list(second.shape)}, and in the first model"
                    f" {stored.dtype} {list(stored.shape)}",
                    where=str(model.path),
                    allowed="models of one architecture",
                    remedy="choose other models",
                )


def _check_finite(weights: Sequence[float]) -> None:
    for weight in weights:
        if not math.isfinite(weight):
            raise SettingsError(f"the weight {weight!r}", allowed="a finite number", remedy="choose another weight")


def _digest(model: StoredModel) -> str:
    files = sorted(model.files)
    if model.path.is_file():
        return sha256_file(files[0])
    return sha256_bytes(canonical_json({str(file.relative_to(model.path)): sha256_file(file) for file in files}))
