"""`ingest`: a folder of the user's pictures becomes a manifest; what cannot be used is set aside with its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from lora_engine.data.spec import IngestSettings
from tasks.spec import External, StepSpec
from tasks.step import Context, step


class Ingest(StepSpec, IngestSettings):
    """Which folder to take in, and which share of it to hold out from training."""

    uses: Literal["ingest"] = "ingest"
    images: Annotated[str, External("folder")]
    consent: Annotated[str | None, External("file")] = None


@step(Ingest, gives="manifest", revision=2)
def ingest(spec: Ingest, context: Context) -> None:
    """Writes a manifest with a clean copy of every usable picture and its caption."""
    from lora_engine.data.ingest import ingest as take_in

    settings = spec.narrow(IngestSettings)
    take_in(context.files["images"], context.out, settings, consent=context.files.get("consent"))
