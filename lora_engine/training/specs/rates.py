"""Optimisers, learning rates by part and layer, averages of the weights."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Rates(BaseModel):
    """Learning rates of parts of the adapter; by default one for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")
