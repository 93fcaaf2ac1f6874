"""Maps the dtype names of specs, the command line and safetensors to those of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lora_engine.errors import SettingsError
from lora_engine.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

STORED_DTYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
}
"""Safetensors' name of a dtype to torch's."""
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
DtypeName = Literal["float32", "float16", "bfloat16"]


def name_of_dtype(tensor: Tensor) -> str:
    """Returns torch's name of a tensor's dtype, such as `float16`; of a mapped tensor without importing torch."""
    name: str = getattr(tensor, "dtype_name", "")
    return name or str(tensor.dtype).removeprefix("torch.")


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns the dtype of that name; None for None.

    Raises:
        SettingsError: The name is unknown.
    """
    if name is None:
        return None
    if name not in get_args(DtypeName):
        raise SettingsError(
            f"unknown dtype {name!r}", allowed=", ".join(get_args(DtypeName)), remedy="choose one of these"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype
