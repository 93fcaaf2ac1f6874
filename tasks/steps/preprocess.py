"""Defines the step `preprocess`: crops and resizes the images of a manifest for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from lora_engine.data.spec import PreprocessSettings
from tasks.digests import PathDigest
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step


class Preprocess(StepSpec, PreprocessSettings):
    """The dataset, the resolution or sizes, and the crop."""

    uses: Literal["preprocess"] = "preprocess"
    dataset: Annotated[str, Input("manifest")]


def find_preprocess_revision(spec: Preprocess, _: Mapping[str, PathDigest]) -> int:
    """Returns 2 for buckets; since revision 3, squares have a largest factor of enlargement."""
    return 2 if spec.crop == "bucket" else 3


@step(
    Preprocess,
    produces="manifest",
    revision=3,
    revisions=find_preprocess_revision,
    imports=always("lora_engine.data.preprocess"),
)
def preprocess(spec: Preprocess, context: Context) -> None:
    """Writes a manifest whose images and masks have the requested sizes."""
    from lora_engine.data.preprocess import preprocess as preprocess_dataset

    preprocess_dataset(context.folder("dataset"), context.out, spec.narrow(PreprocessSettings), context.progress)
