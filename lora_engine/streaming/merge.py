"""Merges whole checkpoints tensor by tensor, from file to file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from lora_engine.streaming.arithmetic import CHECKPOINT_METHODS, CheckpointMethod
from lora_engine.streaming.blocks import FLOATS, as_bytes
from lora_engine.streaming.direct_writer import read_bytes
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.output import check_apart, check_output, copy_whole, write_model
from lora_engine.streaming.provenance import without_stale
from lora_engine.streaming.rewrite import rewrite

MERGED = "loraline.merged"


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `merge_checkpoints`.

    Attributes:
        files: The written files.
        tensors: Number of merged tensors.
        kept: Number of tensors that are not floats, copied from the first model.
        parents: Digest of each model's weights, in the order of the models.
    """

    files: list[Path]
    tensors: int
    kept: int
    parents: list[str]


def merge_checkpoints(
    models: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    *,
    method: str = "weighted-sum",
    options: Mapping[str, float] | None = None,
    component: str | None = None,
    architecture: str | None = None,
) -> CheckpointReport:
    """Merges whole models of one architecture. The result has the first model's layout, dtypes and other files.

    The arithmetic is in float32 (float64 for float64 tensors of the first model), and casts last. Tensors that are not
    floats come from the first model. After an error, there is no output.

    Args:
        models: Paths for `open_model`, all of one layout.
        weights: The weights that the method needs.
        output: Path of the new model; a folder if the first model is one. Written atomically.
        method: `weighted-sum`, `add-difference` or `ties`; see `CHECKPOINT_METHODS`.
        options: Options of the method by name; None means the defaults.
        component: Component of a single file; None means inferred.
        architecture: Architecture of original single files; None means inferred.

    Raises:
        BaseModelError: A model cannot be read, or tensors are missing or differ in shape.
        SettingsError: The method is unknown, the number of models or weights is wrong, or the output is not valid.
    """
    chosen, settings = CHECKPOINT_METHODS[method], dict(options or {})
    chosen.check(len(models), len(weights), list(settings))
    _check_numbers(weights, settings)
    opened = [open_model(path, component=component, architecture=architecture) for path in models]
    for model in opened[1:]:
        check_apart(model, output)
    check_output(opened[0], output)
    _check_tensors(opened)
    parents = [_digest(model) for model in opened]
    note = {"method": method, "weights": list(weights), "options": settings, "parents": parents}
    merge = partial(chosen.merge, weights=list(weights), **settings)
    with ExitStack() as stack:
        sources = _Sources(stack)
        write = partial(_write, opened, chosen, merge, {MERGED: canonical_json(note).decode()}, sources)
        files = write_model(opened[0], output, write)
    floats = sum(stored.dtype in FLOATS for stored in opened[0].tensors.values())
    return CheckpointReport(files, floats, len(opened[0].tensors) - floats, parents)


class _Sources:
    """The source files, each opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def read(self, stored: StoredTensor, first: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Reads rows of a tensor, starting at `first`, as `[rows, inner]` in a dtype."""
        if stored.path not in self._open:
            descriptor = os.open(stored.path, os.O_RDONLY)
            self._stack.callback(os.close, descriptor)
            self._open[stored.path] = descriptor
        block = torch.empty(shape, dtype=FLOATS[stored.dtype])
        offset = stored.offset + first * shape[1] * block.element_size()
        read_bytes(self._open[stored.path], as_bytes(block), offset)
        return block.to(dtype)


@dataclass(frozen=True)
class _Merge:
    """A `Change` that merges a block of the first model with the same block of the others."""

    others: Sequence[StoredTensor]
    merge: Callable[[Sequence[Tensor]], Tensor]
    is_whole: bool
    sources: _Sources
    bound: float = math.inf

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        """Changes a block in place."""
        others = [self.sources.read(other, first, values.shape, values.dtype) for other in self.others]
        values.copy_(self.merge([values, *others]))


def _write(
    models: Sequence[StoredModel],
    method: CheckpointMethod,
    merge: Callable[..., Tensor],
    note: dict[str, str],
    sources: _Sources,
    source: Path,
    target: Path,
) -> None:
    tensors, metadata = models[0].files[source]
    others = [model.tensors for model in models[1:]]
    keys = {name: key for key, (file, name) in models[0].origins.items() if file == source}
    changes = {
        name: partial(_Merge, [other[keys[name]] for other in others], merge, not method.is_elementwise, sources)
        for name, stored in tensors.items()
        if stored.dtype in FLOATS
    }
    if changes:
        rewrite(tensors, target, without_stale(metadata) | note, changes)
    else:
        copy_whole(source, target)


def _check_tensors(models: Sequence[StoredModel]) -> None:
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
            if stored.shape != second.shape or (stored.dtype in FLOATS) != (second.dtype in FLOATS):
                raise BaseModelError(
                    f"the tensor {name!r} is {second.dtype} {list(second.shape)}, and in the first model"
                    f" {stored.dtype} {list(stored.shape)}",
                    where=str(model.path),
                    allowed="models of one architecture",
                    remedy="choose other models",
                )


def _check_numbers(weights: Sequence[float], options: Mapping[str, float]) -> None:
    for weight in weights:
        if not math.isfinite(weight):
            raise SettingsError(f"the weight {weight!r}", allowed="a finite number", remedy="choose another weight")
    for name, value in options.items():
        maximum = 1.0 if name == "density" else math.inf
        if not 0.0 < value <= maximum or not math.isfinite(value):
            allowed = "above 0, up to 1" if name == "density" else "a finite number above 0"
            raise SettingsError(f"{name} is {value!r}", allowed=allowed, remedy="choose another value")


def _digest(model: StoredModel) -> str:
    files = sorted(model.files)
    if model.path.is_file():
        return sha256_file(files[0])
    return sha256_bytes(canonical_json({str(file.relative_to(model.path)): sha256_file(file) for file in files}))
