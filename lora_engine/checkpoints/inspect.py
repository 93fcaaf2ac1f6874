"""Describes checkpoints without converting them or reading tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_engine.checkpoints.folder import read_components
from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import AVERAGES, checkpoint_names, stored_name
from lora_engine.checkpoints.original import OriginalFile, open_original
from lora_engine.checkpoints.plan import folder_architecture, folder_tensors
from lora_engine.checkpoints.recognize import recognize
from lora_engine.checkpoints.tensor_files import StoredTensor
from lora_engine.errors import BaseModelError
from lora_engine.families.layout import INDEX, read_layout
from lora_engine.files import FilePath
from lora_engine.formats.pickles import is_pickled
from lora_engine.formats.safetensors_io import read_header

_COMPONENTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


def is_checkpoint(path: Path) -> bool:
    """Returns True for a full base model: a diffusers folder, a `.ckpt`, or a file with original tensor names.

    Raises:
        AdapterError: The header of a `.safetensors` file cannot be read.
    """
    if path.is_dir():
        return (path / INDEX).is_file()
    if not path.is_file() or is_pickled(path):
        return path.suffix.lower() == ".ckpt"
    return any(name.startswith(_COMPONENTS) for name in read_header(path)[0])


def inspect_checkpoint(path: FilePath) -> dict[str, Any]:
    """Describes a checkpoint and its contents as JSON values.

    Args:
        path: An original single file, or a diffusers folder.

    Returns:
        `layout` (`ldm` or `diffusers`), `architecture`, `prediction` with the reason, `variant`, and for each component
        its tensors, parameters and dtypes. For a single file also missing, unused (with reasons) and unknown tensors,
        whether it has running averages, and `problem` if it cannot be converted.

    Raises:
        BaseModelError: The path does not exist, or is a folder that is no base.
        AdapterError: The file cannot be read, or is refused.
    """
    path = Path(path)
    if path.is_dir():
        return _inspect_folder(path)
    with open_original(path) as original:
        report: dict[str, Any] = {"layout": "ldm", "file": path.name, "metadata": dict(original.metadata)}
        report |= {"tensors": len(original.tensors), "dropped": list(original.dropped)}
        try:
            return report | _inspect_original(original)
        except BaseModelError as error:
            return report | {"architecture": None, "problem": error.problem}


def _inspect_original(original: OriginalFile) -> dict[str, Any]:
    recognized = recognize(original.shapes, original.metadata, str(original.path), steps=original.steps)
    names = checkpoint_names(recognized.architecture)
    pairs = [(entry, stored_name(entry, original.tensors)) for entry in names]
    missing = sorted({entry.stored for entry, key in pairs if key is None})
    parts: dict[str, dict[str, StoredTensor]] = {}
    for entry, key in pairs:
        if key is not None:
            parts.setdefault(entry.component, {})[key] = original.tensors[key]
    used = {key for _, key in pairs}
    rest = {name: reason_unused(name) for name in original.tensors if name not in used}
    report: dict[str, Any] = {
        "architecture": recognized.architecture,
        "variant": recognized.variant,
        "prediction": recognized.prediction,
        "prediction_decided_by": recognized.decided_by,
        "components": {name: _summary(tensors.values()) for name, tensors in parts.items()},
        "missing": missing,
        "unused": dict(Counter(reason for reason in rest.values() if reason)),
        "unknown": sorted(name for name, reason in rest.items() if reason is None),
        "has_averages": any(name.startswith(AVERAGES) for name in original.tensors),
    }
    return report | ({"problem": f"{len(missing)} tensors are missing"} if missing else {})


def _inspect_folder(path: Path) -> dict[str, Any]:
    components = read_components(path)
    layout = read_layout(path)
    return {
        "layout": "diffusers",
        "file": path.name,
        "architecture": folder_architecture(layout.family.name, components),
        "variant": layout.pipeline.variant,
        "prediction": components["scheduler"].config.get("prediction_type", "epsilon"),
        "prediction_decided_by": "the scheduler's settings",
        "components": {name: _summary(tensors.values()) for name, tensors in folder_tensors(path).items()},
    }


def _summary(tensors: Iterable[StoredTensor]) -> dict[str, Any]:
    entries = list(tensors)
    return {
        "tensors": len(entries),
        "parameters": sum(math.prod(tensor.shape) for tensor in entries),
        "bytes": sum(tensor.size for tensor in entries),
        "dtypes": dict(Counter(tensor.dtype for tensor in entries)),
    }
