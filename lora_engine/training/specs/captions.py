"""What happens to captions and pictures on their way into a batch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Captions(BaseModel):
    """How captions change from batch to batch; by default not at all."""

    model_config = ConfigDict(frozen=True, extra="forbid")
