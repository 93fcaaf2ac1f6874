"""Recognizes quantized weights of models by their tensors' names, shapes and dtypes. Torch-free; reads no tensor.

A scaled weight is a float8 tensor with a scale beside it, which is part of its value. ComfyUI, musubi-tuner and
published models name it `scale_weight` or `weight_scale`. Packed weights have no elements that arithmetic could use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.tensor_files import stored_tensors
from lora_engine.errors import BaseModelError

_WEIGHT = "weight"
# Names beside `<module>.weight`.
_SCALES = ("scale_weight", "weight_scale")
# They describe how a program computes, not the weights.
_SETTINGS = ("scale_input", "input_scale", "comfy_quant")
_MARKER = "scaled_fp8"
_FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
# Part of a tensor name to the library and the form that have it; the first that matches a tensor counts.
_PACKED = {
    "quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    "quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    "SCB": "bitsandbytes int8",
    "weight_scale_2": "nvfp4",
    "weight_scale_inv": "fp8 with scales of square blocks",
    "qweight": "GPTQ, AWQ or SVDQuant",
    "weight._data": "quanto",
}
_ADVICE = "use the bf16, fp16 or fp8 file of the same model"
# Forms that `convert --to plain` reads.
_CONVERTIBLE = "bitsandbytes"


StoredFile = tuple[dict[str, StoredTensor], dict[str, str]]
"""Tensors by name, and the metadata."""


def read_stored(files: Iterable[Path], omit: Mapping[Path, Collection[str]] | None = None) -> dict[Path, StoredFile]:
    """Returns tensors and metadata of each file; scaled weights have their scale, which may be in another shard.

    Args:
        files: The files.
        omit: Names of tensors to leave out, by file; None means none.

    Raises:
        BaseModelError: As `attach_scales`, or a file is damaged.
        AdapterError: A file is not a safetensors file.
    """
    stored = {file: stored_tensors(file) for file in files}
    for file, names in (omit or {}).items():
        stored[file] = ({name: own for name, own in stored[file][0].items() if name not in names}, stored[file][1])
    shards: dict[Path, dict[str, StoredTensor]] = {}
    for file, (tensors, _) in stored.items():
        shards.setdefault(file.parent, {}).update(tensors)
    scaled = {folder: attach_scales(tensors) for folder, tensors in shards.items()}
    return {
        file: ({name: _with_scale(own, scaled[file.parent][name]) for name, own in tensors.items()}, metadata)
        for file, (tensors, metadata) in stored.items()
    }


def _with_scale(own: StoredTensor, attached: StoredTensor) -> StoredTensor:
    return attached if attached.path == own.path else own  # the name is in two files, which the caller refuses


def attach_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors of one component; scaled weights have their `scale`.

    Raises:
        BaseModelError: Weights are packed, or a scale does not fit its weight; names the form.
    """
    refuse_packed(tensors)
    attached = dict(tensors)
    for name, scale in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _SCALES:
            weight = f"{module}.{_WEIGHT}"
            _check_scale(name, scale, tensors.get(weight))
            attached[weight] = replace(tensors[weight], scale=scale)
    return attached


def weights_of(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors of one component as `attach_scales` does, without those that only describe quantization.

    Raises:
        BaseModelError: As `attach_scales`.
    """
    return {name: stored for name, stored in attach_scales(tensors).items() if not is_description(name)}


def is_description(name: str) -> bool:
    """Returns True if a tensor is no weight but describes the quantization of others: a scale, a marker, settings."""
    return name.rpartition(".")[2] in (*_SCALES, *_SETTINGS, _MARKER)


def refuse_packed(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises `BaseModelError` if weights are packed.

    Raises:
        BaseModelError: Names the form and the first such tensor.
    """
    packed = _packed_form(tensors)
    if packed is not None:
        form, name = packed
        raise BaseModelError(
            f"the weights are quantized as {form}",
            where=f"{tensors[name].path}: tensor {name!r}",
            allowed=f"weights in {', '.join(_FLOATS)}, the last two also with scales",
            remedy="write it without quantization first: loraline convert MODEL --to plain -o PLAIN"
            if form.startswith(_CONVERTIBLE)
            else _ADVICE,
        )


def is_packed(tensors: Mapping[str, StoredTensor]) -> bool:
    """Returns True if weights are packed, so no command can compute with them."""
    return _packed_form(tensors) is not None


def describe_quantization(tensors: Mapping[str, StoredTensor]) -> str:
    """Returns the quantization of a model's weights in words; empty if there is none."""
    packed = _packed_form(tensors)
    if packed is not None:
        return packed[0]
    scaled = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _SCALES}
    parts = [_counted(tensors, scaled, "scaled "), _counted(tensors, _modules(tensors) - scaled, "")]
    return ", ".join(filter(None, parts))


def _packed_form(tensors: Mapping[str, StoredTensor]) -> tuple[str, str] | None:
    for ending, form in _PACKED.items():
        for name in tensors:
            if name.endswith(f".{ending}"):
                return form, name
    for name, stored in tensors.items():
        if name.endswith(f".{_WEIGHT}") and stored.dtype not in _FLOATS:
            return f"{stored.dtype}{' integers' if stored.dtype[0] in 'IU' else ''}", name
    return None


def _check_scale(name: str, scale: StoredTensor, weight: StoredTensor | None) -> None:
    if weight is None:
        problem = "has no weight"
    elif scale.dtype not in _FLOATS[:4]:
        problem = f"has the dtype {scale.dtype}"
    elif not _fits(scale, weight):
        problem = f"has the shape {list(scale.shape)} for the weight {list(weight.shape)}"
    else:
        return
    raise BaseModelError(
        f"a scale of the quantized weights {problem}",
        where=f"{scale.path}: tensor {name!r}",
        allowed="one number for the weight, for a row or for equal parts of a row",
        remedy=_ADVICE,
    )


def _fits(scale: StoredTensor, weight: StoredTensor) -> bool:
    count = math.prod(scale.shape)
    rows = weight.shape[0] if weight.shape else 1
    if count == 1:
        return True
    return scale.shape[0] == rows and math.prod(weight.shape[1:]) % (count // rows) == 0


def _modules(tensors: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors if name.endswith(f".{_WEIGHT}")}


def _counted(tensors: Mapping[str, StoredTensor], modules: set[str], kind: str) -> str:
    dtypes = Counter(
        tensors[f"{module}.{_WEIGHT}"].dtype for module in sorted(modules) if f"{module}.{_WEIGHT}" in tensors
    )
    return ", ".join(f"{kind}{dtype.lower()} ({count})" for dtype, count in dtypes.items() if dtype in _FLOATS[4:])
