"""Defines the step `preprocess`: crops and resizes the images of a manifest for training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from lora_engine.data.spec import PreprocessSettings
from lora_engine.families import Family
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step


class Preprocess(StepSpec, PreprocessSettings):
    """The dataset, the resolution or sizes, and the crop."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]

    @classmethod
    def family_defaults(cls, families: Collection[Family]) -> dict[str, Any]:
        """Records the original sizes for bases that read them."""
        return {"original_sizes": True} if any(family.reads_framing for family in families) else {}


@step(Preprocess, produces="manifest", revision=2, imports=always("lora_engine.data.preprocess"))
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose images and masks have the requested sizes."""
    from lora_engine.data.preprocess import preprocess as preprocess_dataset

    preprocess_dataset(context.folder("dataset"), context.out, spec.narrow(PreprocessSettings), context.progress)
