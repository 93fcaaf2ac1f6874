"""`ingest`: a folder of the user's pictures becomes a manifest; what cannot be used is set aside with its reason."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from tasks.spec import External, StepSpec
from tasks.step import Context, always, step


class Ingest(StepSpec, IngestSettings):
    """Which folder to take in, what is stated about its pictures, and which share of it to hold out from training."""

    uses: Literal["ingest"] = "ingest"
    images: Annotated[str, External("folder")]
    consent: Annotated[str | None, External("file")] = None


def find_revoked(spec: Ingest, folder: Path, revoked: Collection[str]) -> set[str]:
    """What of the revoked is in the folder of pictures or in what is stated about them.

    Args:
        spec: Which folder.
        folder: Where the pipeline file lies.
        revoked: Digests of pictures, and ids of consents.
    """
    from lora_engine.data.consent import read_consent
    from lora_engine.data.folder import candidates

    try:
        stated = read_consent(folder / spec.consent).values() if spec.consent is not None else ()
    except DataError:
        stated = ()  # the step itself says what is wrong with it
    found = {each.consent for each in stated if each.consent is not None} & set(revoked)
    digests = {sha256_file(path) for path in candidates(folder / spec.images) if path.is_file()}
    return found | (digests & set(revoked))


@step(Ingest, gives="manifest", revision=3, excludes=find_revoked, imports=always("lora_engine.data.ingest"))
def ingest(spec: Ingest, context: Context) -> None:
    """Writes a manifest with a clean copy of every usable picture and its caption."""
    from lora_engine.data.ingest import ingest as take_in

    take_in(
        context.files["images"],
        context.out,
        spec.narrow(IngestSettings),
        consent=context.files.get("consent"),
        revoked=context.excluded,
    )
