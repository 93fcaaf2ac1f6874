"""Dtypes by the names that specs and the command line use."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from lora_engine.errors import SettingsError

DtypeName = Literal["float32", "float16", "bfloat16"]


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None for None.

    Raises:
        SettingsError: Another name.
    """
    if name is None:
        return None
    if name not in get_args(DtypeName):
        raise SettingsError(f"the dtype {name!r}", allowed=", ".join(get_args(DtypeName)), remedy="choose one of these")
    found: torch.dtype = getattr(torch, name)
    return found
