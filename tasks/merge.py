"""`merge`: several adapters become one that does what they do together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tasks.spec import StepSpec, Takes
from tasks.step import Context, step


class Merge(StepSpec):
    """Which adapters, each with which weight, and by which method.

    `concatenate` is exact: the result's effect is the weighted sum of theirs.
    """

    uses: Literal["merge"] = "merge"
    adapters: Annotated[tuple[str, ...], Takes("adapter"), Field(min_length=1)]
    weights: tuple[float, ...] | None = None
    method: Literal["concatenate"] = "concatenate"

    @model_validator(mode="after")
    def _one_weight_an_adapter(self) -> Merge:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters; give one weight an adapter"
            )
        return self


@step(Merge, gives="adapter", revision=1)
def merge(spec: Merge, context: Context) -> None:
    """Writes the merged adapter."""
    from lora_engine.merging.files import merge_files

    files = [folder / "adapter.safetensors" for folder in context.inputs["adapters"]]
    weights = spec.weights or (1.0,) * len(files)
    merge_files(files, weights, context.out / "adapter.safetensors", method=spec.method)
