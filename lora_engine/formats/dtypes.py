"""Maps the dtype names of specs, the command line and safetensors to those of torch."""

from __future__ import annotations

from typing import Literal, get_args

from lora_engine.errors import SettingsError
from lora_engine.lazy_torch import torch

WRITTEN_DTYPES = {
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
}
"""Safetensors' name of a dtype that files are written in to torch's, in the order of the safetensors library."""
STORED_DTYPES = WRITTEN_DTYPES | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
}
"""The same for every dtype that is read."""
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
DtypeName = Literal["float32", "float16", "bfloat16"]


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
