"""The step `example-list`."""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.data.manifest import Manifest
from lora_engine.files import atomic_write
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class ListCaptions(StepSpec):
    """The dataset whose captions are listed."""

    uses: Literal["example-list"] = "example-list"
    dataset: Annotated[str, Input("manifest")]


@step(ListCaptions, produces="export", revision=1)
def list_captions(spec: ListCaptions, context: Context) -> None:
    """Writes `captions.txt`, one caption per line."""
    manifest = Manifest.load(context.folder("dataset"))
    lines = [f"{image.source}: {image.caption}" for image in manifest.pictures]
    atomic_write(context.out / "captions.txt", "\n".join(lines).encode())
