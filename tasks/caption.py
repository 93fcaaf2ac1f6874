"""`caption`: every picture of a manifest gets the words that it will be trained with."""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.data.spec import CaptionSettings
from tasks.spec import StepSpec, Takes
from tasks.step import Context, step


class Caption(StepSpec, CaptionSettings):
    """Where captions come from, and the trigger word that they must hold."""

    uses: Literal["caption"] = "caption"
    dataset: Annotated[str, Takes("manifest")]


@step(Caption, gives="manifest", revision=2)
def caption(spec: Caption, context: Context) -> None:
    """Writes a manifest of the same pictures in which every caption is set."""
    from lora_engine.data.caption import caption as describe

    describe(context.folder("dataset"), context.out, spec.narrow(CaptionSettings), progress=context.progress)
