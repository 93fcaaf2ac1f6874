"""What training lowers: which noise at which timesteps, and how an error counts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Objective(BaseModel):
    """The objective of the denoising methods; the defaults are the plain mean squared error over all timesteps."""

    model_config = ConfigDict(frozen=True, extra="forbid")
