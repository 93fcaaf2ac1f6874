"""Saying what a checkpoint is, without converting it and without reading a tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_engine.bases.layout import INDEX, read_layout
from lora_engine.checkpoints.folder import read_components
from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import AVERAGES, checkpoint_names, stored_name
from lora_engine.checkpoints.original import OriginalFile, open_original
from lora_engine.checkpoints.plan import folder_architecture, folder_tensors
from lora_engine.checkpoints.recognize import recognize
from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.errors import BaseModelError
from lora_engine.formats.pickles import is_pickled
from lora_engine.formats.safetensors_io import read_header

_COMPONENTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a whole base model: a diffusers folder, a `.ckpt`, or a file with an original's names.

    Raises:
        AdapterError: A `.safetensors` file whose header cannot be read.
    """
    if path.is_dir():
        return (path / INDEX).is_file()
    if not path.is_file() or is_pickled(path):
        return path.suffix.lower() == ".ckpt"
    return any(name.startswith(_COMPONENTS) for name in read_header(path)[0])


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint is and what is in it, as plain values that JSON can hold.

    Args:
        path: An original single file, or a diffusers folder.

    Returns:
        `layout` (`ldm` or `diffusers`), `architecture`, `prediction` and what decided it, `variant`, and for each
        component its tensors, parameters and dtypes. Of a single file also what lacks, what is unused and why, what is
        unknown, whether it has running averages, and `problem` where it cannot be converted.

    Raises:
        BaseModelError: Nothing there, or a folder that is no base.
        AdapterError: The file cannot be read, or is refused.
    """
    if path.is_dir():
        return _inspect_folder(path)
    with open_original(path) as original:
        found: dict[str, Any] = {"layout": "ldm", "file": path.name, "metadata": dict(original.metadata)}
        found |= {"tensors": len(original.tensors), "dropped": list(original.dropped)}
        try:
            return found | _inspect_original(original)
        except BaseModelError as error:
            return found | {"architecture": None, "problem": error.problem}


def _inspect_original(original: OriginalFile) -> dict[str, Any]:
    told = recognize(original.shapes, original.metadata, str(original.path), steps=original.steps)
    names = checkpoint_names(told.architecture)
    pairs = [(entry, stored_name(entry, original.tensors)) for entry in names]
    missing = sorted({entry.stored for entry, key in pairs if key is None})
    parts: dict[str, dict[str, StoredTensor]] = {}
    for entry, key in pairs:
        if key is not None:
            parts.setdefault(entry.component, {})[key] = original.tensors[key]
    used = {key for _, key in pairs}
    rest = {name: reason_unused(name) for name in original.tensors if name not in used}
    found: dict[str, Any] = {
        "architecture": told.architecture,
        "variant": told.variant,
        "prediction": told.prediction,
        "prediction_decided_by": told.decided_by,
        "components": {name: _summary(tensors.values()) for name, tensors in parts.items()},
        "missing": missing,
        "unused": dict(Counter(reason for reason in rest.values() if reason)),
        "unknown": sorted(name for name, reason in rest.items() if reason is None),
        "has_averages": any(name.startswith(AVERAGES) for name in original.tensors),
    }
    return found | ({"problem": f"{len(missing)} tensors lack"} if missing else {})


def _inspect_folder(path: Path) -> dict[str, Any]:
    components = read_components(path)
    layout = read_layout(path)
    return {
        "layout": "diffusers",
        "file": path.name,
        "architecture": folder_architecture(layout.family.adapters, components),
        "variant": "inpainting" if layout.family.name.endswith("inpainting") else "",
        "prediction": components["scheduler"].config.get("prediction_type", "epsilon"),
        "prediction_decided_by": "the scheduler's settings",
        "components": {name: _summary(tensors.values()) for name, tensors in folder_tensors(path).items()},
    }


def _summary(tensors: Iterable[StoredTensor]) -> dict[str, Any]:
    held = list(tensors)
    return {
        "tensors": len(held),
        "parameters": sum(math.prod(tensor.shape) for tensor in held),
        "bytes": sum(tensor.size for tensor in held),
        "dtypes": dict(Counter(tensor.dtype for tensor in held)),
    }
