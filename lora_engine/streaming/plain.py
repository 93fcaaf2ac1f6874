"""Writes models without quantization: float8 weights, scaled or not, and those of bitsandbytes become bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lora_engine.checkpoints.packed import plan_packed
from lora_engine.checkpoints.quantization import StoredFile, is_description, read_stored
from lora_engine.checkpoints.stored_tensor import PLAIN, PlannedTensor, StoredTensor
from lora_engine.checkpoints.tensor_files import stored_tensors, write_tensors
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.streaming.model import StoredModel
from lora_engine.streaming.output import check_output, write_model
from lora_engine.streaming.provenance import without_stale

_INDEX = ".safetensors.index.json"
# ComfyUI's description of the layers' quantization.
_SETTINGS = "_quantization_metadata"


_Planned = tuple[dict[str, PlannedTensor], dict[str, str]]


def write_plain(source: Path, output: Path) -> list[Path]:
    """Writes a model with its quantized weights in bfloat16; all other tensors keep their bytes.

    Args:
        source: A `.safetensors` file of any names, or a folder with such files.
        output: Path of the new model; a folder if the source is one. Written atomically.

    Returns:
        The written files.

    Raises:
        BaseModelError: A file cannot be read, weights are packed by another program, or no weight is quantized.
        AdapterError: A file is not a safetensors file.
        SettingsError: The output is not valid, or weights of 4 bits need bitsandbytes, which is not installed.
    """
    found = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    plans = _plan([file for file in found if file.suffix == ".safetensors"])
    if not any(tensor.cast for planned, _ in plans.values() for tensor in planned.values()):
        raise BaseModelError(
            "no weight is quantized",
            where=str(source),
            allowed="float8 weights, with or without scales, or weights of bitsandbytes",
            remedy="use the model as it is",
        )
    files: dict[Path, StoredFile] = {file: ({}, {}) for file in found if file in plans or file.name.endswith(_INDEX)}
    model = StoredModel(source, "", files, tuple(file for file in found if file not in files), {})
    check_output(model, output)
    return write_model(model, output, partial(_write, plans))


def _plan(files: Sequence[Path]) -> dict[Path, _Planned]:
    """Returns the tensors of each file without quantization, and its metadata."""
    stored = {file: stored_tensors(file) for file in files}
    packed = {file: plan_packed(tensors) for file, (tensors, _) in stored.items()}
    rest = read_stored(files, {file: used for file, (_, used) in packed.items()})
    plans = {}
    for file, (tensors, metadata) in rest.items():
        plain = {
            name: PlannedTensor(tensor.shape, (tensor,), cast=PLAIN if _is_float8(tensor) else "")
            for name, tensor in tensors.items()
            if not is_description(name)
        }
        header = {name: text for name, text in without_stale(metadata).items() if name != _SETTINGS}
        plans[file] = ({**plain, **packed[file][0]}, header)
    return plans


def _write(plans: Mapping[Path, _Planned], source: Path, target: Path) -> None:
    if source not in plans:
        index = read_json_object(source, BaseModelError)
        written = {name for planned, _ in plans.values() for name in planned}
        names = {name: file for name, file in index.get("weight_map", {}).items() if name in written}
        atomic_write(target, canonical_json(index | {"weight_map": names}))
        return
    write_tensors(target, *plans[source])


def _is_float8(stored: StoredTensor) -> bool:
    return stored.scale is not None or stored.dtype.startswith("F8")
