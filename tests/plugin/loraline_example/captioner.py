"""The captioner `example-names`, with an option of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from lora_engine.data.captioners import Captioner

if TYPE_CHECKING:
    from lora_engine.data.manifest import Manifest
    from lora_engine.data.spec import CaptionSettings
    from lora_engine.progress import Progress


class Names(BaseModel):
    """Captions from file names.

    Attributes:
        separator: Text in a file name that means a space.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["example-names"] = "example-names"
    separator: str = "_"


def captions(dataset: Path, manifest: Manifest, settings: CaptionSettings, progress: Progress | None) -> list[str]:
    """Returns the file name of each image as words, after the trigger."""
    options = Names.model_validate(settings.captioner)
    names = [Path(image.source).stem.replace(options.separator, " ") for image in manifest.pictures]
    return [" ".join(filter(None, (settings.trigger, name))) for name in names]


CAPTIONER = Captioner(name="example-names", title="the file names", captions=captions, spec=Names, adds_trigger=True)
