"""Defines the step `preprocess`: crops and resizes the images of a manifest for training."""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.data.spec import PreprocessSettings
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step


class Preprocess(StepSpec, PreprocessSettings):
    """The dataset, the resolution or sizes, and the crop."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]


@step(Preprocess, produces="manifest", revision=2, imports=always("lora_engine.data.preprocess"))
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose images and masks have the requested sizes."""
    from lora_engine.data.preprocess import preprocess as preprocess_dataset

    preprocess_dataset(context.folder("dataset"), context.out, spec.narrow(PreprocessSettings), context.progress)
