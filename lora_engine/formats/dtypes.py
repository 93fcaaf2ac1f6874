"""Maps the dtype names of specs and the command line to torch dtypes."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from lora_engine.errors import SettingsError

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
