"""Where and how training computes; nothing here changes what is computed, but for the last bits."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Running(BaseModel):
    """Devices, memory and speed; the defaults suit any machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
