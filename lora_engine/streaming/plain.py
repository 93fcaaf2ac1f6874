"""Writes models without quantization: float8 weights, scaled or not, become bfloat16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lora_engine.checkpoints.quantization import StoredFile, is_description, read_stored
from lora_engine.checkpoints.tensor_files import PLAIN, PlannedTensor, StoredTensor, write_tensors
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.streaming.model import StoredModel
from lora_engine.streaming.output import check_output, write_model
from lora_engine.streaming.provenance import without_stale

_INDEX = ".safetensors.index.json"
# ComfyUI's description of the layers' quantization.
_SETTINGS = "_quantization_metadata"


def write_plain(source: Path, output: Path) -> list[Path]:
    """Writes a model with its float8 weights in bfloat16, times their scales; all other tensors keep their bytes.

    Args:
        source: A `.safetensors` file of any names, or a folder with such files.
        output: Path of the new model; a folder if the source is one. Written atomically.

    Returns:
        The written files.

    Raises:
        BaseModelError: A file cannot be read, weights are packed, or no weight is float8.
        AdapterError: A file is not a safetensors file.
        SettingsError: The output is not valid.
    """
    found = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    attached = read_stored(file for file in found if file.suffix == ".safetensors")
    if not any(_is_quantized(stored) for tensors, _ in attached.values() for stored in tensors.values()):
        raise BaseModelError(
            "no weight is quantized",
            where=str(source),
            allowed="a model with float8 weights, with or without scales",
            remedy="use the model as it is",
        )
    indexes: dict[Path, StoredFile] = {file: ({}, {}) for file in found if file.name.endswith(_INDEX)}
    others = tuple(file for file in found if file not in attached and file not in indexes)
    model = StoredModel(source, "", {**attached, **indexes}, others, {})
    check_output(model, output)
    return write_model(model, output, partial(_write, attached))


def _write(files: Mapping[Path, StoredFile], source: Path, target: Path) -> None:
    if source not in files:
        index = json.loads(source.read_bytes())
        names = {name: file for name, file in index.get("weight_map", {}).items() if not is_description(name)}
        atomic_write(target, canonical_json(index | {"weight_map": names}))
        return
    tensors, metadata = files[source]
    planned = {
        name: PlannedTensor(stored.shape, (stored,), cast=PLAIN if _is_quantized(stored) else "")
        for name, stored in tensors.items()
        if not is_description(name)
    }
    write_tensors(target, planned, {name: text for name, text in without_stale(metadata).items() if name != _SETTINGS})


def _is_quantized(stored: StoredTensor) -> bool:
    return stored.scale is not None or stored.dtype.startswith("F8")
