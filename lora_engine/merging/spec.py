"""Options that all merge methods share. Must not import torch; each method declares its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Weight = FiniteFloat | dict[str, FiniteFloat]
"""A number for the whole adapter, or numbers by pattern over module names; see `lora_engine.merging.weights`."""

Density = Annotated[float, Field(gt=0.0, le=1.0)]


class MergeOptions(BaseModel):
    """Options of all methods: the compression of the result.

    Attributes:
        rank: Rank of the result; with energy or error, the maximum rank. None keeps an exact result exact, and uses
            the sum of the ranks for an elementwise method.
        energy: Use the least rank that keeps this share of the squared norm.
        error: Use the least rank with at most this relative error.
        kind: Kind of the result: `lora`, or `full` (the dense difference, which is never compressed).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: FiniteFloat | None = Field(default=None, gt=0.0, le=1.0)
    error: FiniteFloat | None = Field(default=None, ge=0.0, lt=1.0)
    kind: Literal["lora", "full"] = "lora"

    @property
    def name(self) -> str:
        """Name of the method."""
        return str(type(self).model_fields["method"].default)

    @property
    def compresses(self) -> bool:
        """True if rank, energy or error is set."""
        return (self.rank, self.energy, self.error) != (None, None, None)

    def parameters(self) -> dict[str, Any]:
        """Returns the options of the method by name, without those of all methods."""
        shared = {*MergeOptions.model_fields, "method"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}

    @model_validator(mode="after")
    def _full_is_not_compressed(self) -> MergeOptions:
        if self.kind == "full" and self.compresses:
            raise ValueError("rank, energy and error belong to kind lora; leave them out, or choose lora")
        return self
