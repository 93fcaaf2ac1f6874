"""Defines the step `caption`: sets the caption of every image of a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.spec import CaptionSettings
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class Caption(StepSpec, CaptionSettings):
    """The dataset, the source of captions, and the trigger word."""

    uses: Literal["caption"] = "caption"
    dataset: Annotated[str, Input("manifest")]


def find_imports(spec: Caption, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that the captioner imports."""
    del folder
    yield "lora_engine.data.caption"
    yield from CAPTIONERS[spec.captioner_name].imports


@step(
    Caption,
    produces="manifest",
    revision=2,
    imports=find_imports,
    entries=lambda spec: [(CAPTIONERS, spec.captioner_name)],
)
def caption(spec: Caption, context: Context) -> None:
    """Writes a manifest of the same images with all captions set."""
    from lora_engine.data.caption import caption as describe

    describe(context.folder("dataset"), context.out, spec.narrow(CaptionSettings), progress=context.progress)
