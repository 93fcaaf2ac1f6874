"""The captioners by name: where the captions of a dataset come from. Must not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel

from lora_engine.registries import NameOrOptions, Registry, spec_union

if TYPE_CHECKING:
    from lora_engine.data.manifest import ImageEntry, Manifest
    from lora_engine.data.spec import CaptionSettings
    from lora_engine.progress import Progress


@dataclass(frozen=True)
class Captioner:
    """A captioner, one entry of `CAPTIONERS`.

    Attributes:
        name: The value of `captioner:` in a pipeline.
        title: The source of its captions, for help texts and tables.
        captions: (dataset, manifest, settings, progress) -> one caption per image, in the order of the manifest.
        spec: Class of its own options, with a field `name`; None means that it has none.
        adds_trigger: True if the captions contain the trigger without the template.
        imports: Modules to import before any step starts (see `tasks.imports`).
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    name: str
    title: str
    captions: Callable[[Path, Manifest, CaptionSettings, Progress | None], list[str]]
    spec: type[BaseModel] | None = None
    adds_trigger: bool = False
    imports: tuple[str, ...] = ()
    revision: int = 0


CAPTIONERS: Registry[Captioner] = Registry(
    "captioner", entry=Captioner, source="lora_engine.data.captioners", group="loraline.captioners"
)


def captioner_setting() -> Any:
    """Returns the annotation of `captioner:`: a name, or name and options of a captioner that has options."""
    plain: Any = Literal[tuple(name for name, captioner in CAPTIONERS.items() if captioner.spec is None)]
    if all(captioner.spec is None for captioner in CAPTIONERS.values()):
        return plain
    return plain | Annotated[spec_union(CAPTIONERS, "name"), NameOrOptions()]


def _from_files(_dataset: Path, manifest: Manifest, settings: CaptionSettings, _: Progress | None) -> list[str]:
    return [_own_or_template(image, settings) for image in manifest.pictures]


def _own_or_template(image: ImageEntry, settings: CaptionSettings) -> str:
    from lora_engine.data.caption import holds_word, render_template

    if not image.caption:
        return render_template(settings)
    if settings.trigger is None or holds_word(image.caption, settings.trigger):
        return image.caption
    # The caption must contain the trigger, or training would not learn it.
    return f"{render_template(settings)}, {image.caption}"


def _from_template(_dataset: Path, manifest: Manifest, settings: CaptionSettings, _: Progress | None) -> list[str]:
    from lora_engine.data.caption import render_template

    return [render_template(settings)] * len(manifest.pictures)


FILES = Captioner("files", "the .txt file beside each image, or the template if there is none", _from_files)
TEMPLATE = Captioner("template", "the template for all images", _from_template)
