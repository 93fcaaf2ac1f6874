"""`preprocess`: the pictures of a manifest, cropped and resized for training."""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.data.spec import PreprocessSettings
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step


class Preprocess(StepSpec, PreprocessSettings):
    """To which resolution or sizes, and which part of each picture to keep."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]


@step(Preprocess, produces="manifest", revision=2, imports=always("lora_engine.data.preprocess"))
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose pictures, and their masks, have the sizes that were asked for."""
    from lora_engine.data.preprocess import preprocess as prepare

    prepare(context.folder("dataset"), context.out, spec.narrow(PreprocessSettings))
