"""Dequantizes weights that bitsandbytes packed: 4 bits (nf4, fp4) by the library, 8 bits by their row scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS
from lora_engine.checkpoints.stored_tensor import PLAIN, PlannedTensor, StoredTensor
from lora_engine.documents import parse_json
from lora_engine.errors import BaseModelError, SettingsError

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_ROWS = ".SCB"
_DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
# The scale of a row is its largest absolute value, stored as 127.
_LARGEST = 127.0


def plan_packed(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, PlannedTensor], set[str]]:
    """Returns the weights that bitsandbytes packed, in bfloat16, and the names of all tensors that they consist of.

    Raises:
        BaseModelError: The description of a weight is malformed.
        SettingsError: Weights have 4 bits, and bitsandbytes is not installed.
    """
    planned: dict[str, PlannedTensor] = {}
    used: set[str] = set()
    for name, stored in tensors.items():
        state = next((ending for ending in _STATES if name.endswith(ending)), "")
        if state:
            weight = name.removesuffix(state)
            parts = {key: part for key, part in tensors.items() if key == weight or key.startswith(f"{weight}.")}
            shape = _shape_of(stored, name)
            planned[weight] = PlannedTensor(shape, (), cast=PLAIN, source=_source(partial(_four_bits, parts, weight)))
            used |= parts.keys()
        elif name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            rows = tensors.get(f"{module}.weight")
            if rows is None or stored.shape != rows.shape[:1]:
                raise _malformed(stored.path, name)
            planned[f"{module}.weight"] = PlannedTensor(
                rows.shape, (), cast=PLAIN, source=_source(partial(_eight_bits, rows, stored))
            )
            used |= {name, f"{module}.weight", f"{module}.weight_format"}
    if any(name.endswith(_STATES) for name in tensors):
        _library()
    return planned, used


def _source(read: Callable[[], Tensor]) -> Callable[[], Iterator[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        yield read().to(FLOATS[PLAIN]).contiguous().reshape(-1).view(torch.uint8).numpy().data

    return chunks


def _four_bits(parts: Mapping[str, StoredTensor], weight: str) -> Tensor:
    functional = _library()
    state = {name.removeprefix(f"{weight}."): _read(part) for name, part in parts.items() if name != weight}
    try:
        quantization = functional.QuantState.from_dict(state, device=torch.device("cpu"))
        values: Tensor = functional.dequantize_4bit(_read(parts[weight]), quantization)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise _malformed(next(iter(parts.values())).path, weight) from error
    return values


def _eight_bits(weight: StoredTensor, scales: StoredTensor) -> Tensor:
    return _read(weight).float().mul_(_read(scales).float().div_(_LARGEST)[:, None])


def _read(stored: StoredTensor) -> Tensor:
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        content = bytearray(stored.size)
        view = memoryview(content)
        while view:
            count = file.readinto(view)
            if not count:
                raise BaseModelError("the file was truncated while it was read", where=str(stored.path))
            view = view[count:]
    return torch.frombuffer(content, dtype=_DTYPES[stored.dtype]).view(stored.shape)


def _shape_of(state: StoredTensor, name: str) -> tuple[int, ...]:
    try:
        entries = parse_json(
            bytes(_read(state).view(torch.uint8).numpy()), f"{state.path}: tensor {name!r}", BaseModelError
        )
        return tuple(int(size) for size in entries["shape"])
    except (BaseModelError, ValueError, KeyError, TypeError) as error:
        raise _malformed(state.path, name) from error


def _malformed(path: Path, name: str) -> BaseModelError:
    return BaseModelError(
        "the description of the quantized weight is malformed",
        where=f"{path}: tensor {name!r}",
        allowed="the tensors that bitsandbytes saves with a weight",
        remedy="save or download the model again",
    )


def _library() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise SettingsError(
            "weights of 4 bits need bitsandbytes, which is not installed",
            remedy="install it: pip install 'loraline[quantised]'",
        ) from error
    return functional
