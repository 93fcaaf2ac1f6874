"""The captioners by name: where the captions of a dataset come from. Must not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel

from lora_engine.data.captioner_options import TaggerOptions, VlmOptions
from lora_engine.registries import NameOrOptions, Registry, spec_union

if TYPE_CHECKING:
    from lora_engine.data.manifest import Manifest
    from lora_engine.data.spec import CaptionSettings
    from lora_engine.progress import Progress


@dataclass(frozen=True)
class DescribeJob:
    """What a captioner that looks at images works on.

    Attributes:
        images: The files of the images.
        texts: Their existing captions; empty for none.
        options: The captioner's options, or its name if it has none.
        words: Placeholder -> value: trigger and class word.
        cache: Folder for the captions of single images, by content; None keeps none.
        progress: Called after each batch.
    """

    images: tuple[Path, ...]
    texts: tuple[str, ...]
    options: BaseModel | str
    words: Mapping[str, str]
    cache: Path | None
    progress: Progress


@dataclass(frozen=True)
class Captioner:
    """A captioner, one entry of `CAPTIONERS`.

    Attributes:
        name: The value of `captioner:` in a pipeline.
        title: The source of its captions, for help texts and tables.
        captions: (dataset, manifest, settings, progress) -> one caption per image, in the order of the manifest. The
            filled template is put before captions without the trigger, and replaces empty ones.
        spec: Class of its own options, with a field `name`; None means that it has none.
        adds_trigger: True if the captions contain the trigger without the template; they are then used as they are.
        imports: Modules to import before any step starts (see `tasks.imports`).
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
        describe: `module:function` of a captioner that looks at images, instead of `captions`: `DescribeJob` -> one
            caption per image. `existing` then says what becomes of captions that are there.
        models: (options) -> role -> (name of a model, `module:function` that finds it); their content is in cache keys.
    """

    name: str
    title: str
    captions: Callable[[Path, Manifest, CaptionSettings, Progress | None], list[str]] | None = None
    spec: type[BaseModel] | None = None
    adds_trigger: bool = False
    imports: tuple[str, ...] = ()
    revision: int = 0
    describe: str = ""
    models: Callable[[Any], Mapping[str, tuple[str, str]]] | None = None


CAPTIONERS: Registry[Captioner] = Registry(
    "captioner", entry=Captioner, source="lora_engine.data.captioners", group="loraline.captioners"
)


def captioner_setting() -> Any:
    """Returns the annotation of `captioner:`: a name, or name and options of a captioner that has options."""
    plain: Any = Literal[tuple(name for name, captioner in CAPTIONERS.items() if captioner.spec is None)]
    if all(captioner.spec is None for captioner in CAPTIONERS.values()):
        return plain
    return plain | Annotated[spec_union(CAPTIONERS, "name"), NameOrOptions()]


def _from_files(_dataset: Path, manifest: Manifest, _settings: CaptionSettings, _: Progress | None) -> list[str]:
    return [image.caption for image in manifest.pictures]


def _from_template(_dataset: Path, manifest: Manifest, _settings: CaptionSettings, _: Progress | None) -> list[str]:
    return [""] * len(manifest.pictures)


def _models_of_tagger(options: TaggerOptions) -> dict[str, tuple[str, str]]:
    return {"tagger": (options.model, "lora_engine.captioning.source:resolve_tagger")}


def _models_of_vlm(options: VlmOptions) -> dict[str, tuple[str, str]]:
    hint = _models_of_tagger(options.tagger) if options.tagger is not None else {}
    return {"vlm": (options.model, "lora_engine.captioning.source:resolve_vlm"), **hint}


FILES = Captioner("files", "the .txt file beside each image, or the template if there is none", _from_files)
TEMPLATE = Captioner("template", "the template for all images", _from_template)
VLM = Captioner(
    "vlm",
    "a vision-language model: BLIP, BLIP-2, Florence-2, Qwen-VL, SmolVLM, LLaVA (JoyCaption), PaliGemma",
    spec=VlmOptions,
    imports=("lora_engine.captioning.describe",),
    revision=1,
    describe="lora_engine.captioning.describe:describe_with_vlm",
    models=_models_of_vlm,
)
TAGGER = Captioner(
    "tagger",
    "a tagger of the WD family (ONNX)",
    spec=TaggerOptions,
    imports=("lora_engine.captioning.describe",),
    revision=1,
    describe="lora_engine.captioning.describe:describe_with_tagger",
    models=_models_of_tagger,
)
