"""Writes the pipeline file of `loraline init --from`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.coming_from.finish import finish
from flows.coming_from.fit_base import fit_base
from flows.coming_from.gui import to_options
from flows.coming_from.images import find_images
from flows.coming_from.local_files import set_local_files
from flows.coming_from.options import TRAINERS
from flows.coming_from.parts import ImageFolder
from flows.coming_from.pipeline_text import write_text
from flows.coming_from.read import Setting, SettingsSource, read_source
from flows.coming_from.translate import translate
from flows.coming_from.translation import Translation
from flows.spec import check_document
from lora_engine.bases.defaults import family_of, training_defaults
from lora_engine.bases.source import TINY, split_hub_id
from lora_engine.documents import read_document
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write, expand_home
from tasks.errors import SpecError


@dataclass(frozen=True)
class Converted:
    """A written pipeline file.

    Attributes:
        path: The file.
        trainer: Name of the trainer whose settings were read.
        dropped: (option, value, reason) of what was not carried over.
        images: The folders of images.
    """

    path: Path
    trainer: str
    dropped: tuple[tuple[str, Any, str], ...]
    images: tuple[Path, ...]


def convert_settings(
    folder: Path, source: Path, *, dataset: Path | None = None, base: str | None = None, images: Path | None = None
) -> Converted:
    """Writes `pipeline.yaml` with the settings of another trainer's file.

    Args:
        folder: The folder of the pipeline file; created.
        source: The file; see `read_source`.
        dataset: The dataset file of sd-scripts.
        base: The base; None takes the one of the settings.
        images: The folder of images, or of the folders of the settings; None takes those, or `folder / "images"` if
            none exists.

    Raises:
        SpecError: The file cannot be read, a setting is not valid, or another pipeline file exists. Nothing is written.
    """
    read = read_source(source, dataset)
    if read.trainer == "sd" and source.suffix.lower() == ".json":
        read = replace(read, settings=tuple(to_options(read.settings)))
    if images is not None and not images.is_dir():
        raise SpecError(f"{str(images)!r} is not a folder", where="--images", remedy="give the folder with the images")
    translation = translate(read)
    folders = find_images(read, translation, images)
    _set_base(translation, read, base, folders.images)
    set_local_files(translation, read.path.parent)
    finish(translation, read.trainer, folders.count)
    path = folder / "pipeline.yaml"
    text = write_text(translation, read, folders, path)
    if path.exists() and path.read_text() != text:
        raise SpecError("the file exists with different content", where=str(path), remedy="choose another folder")
    paths = tuple(mine.path or folder / "images" for mine in folders.images)
    _check(text, path, read, folders.images[0].path is None)
    for inner in paths:
        inner.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
    return Converted(path, TRAINERS[read.trainer], tuple(translation.dropped), paths)


def _set_base(
    translation: Translation, source: SettingsSource, base: str | None, images: tuple[ImageFolder, ...]
) -> None:
    named = next(
        (
            s
            for s in source.settings
            if s.name in ("pretrained_model_name_or_path", "model.name_or_path", "base_model_name")
        ),
        Setting("base", "", str(source.path)),
    )
    base = base or translation.get("file.base")
    if not base:
        raise SpecError("the file names no base model", where=str(source.path), remedy="give it with --base")
    try:
        if base != TINY and split_hub_id(base) is None:
            base = str((source.path.parent / expand_home(base)).resolve())
        defaults, family = training_defaults(base), family_of(base)
    except (OSError, RuntimeError) as error:  # a name that is too long, or of an unknown user
        raise SpecError(f"the base is {base[:100]!r}", where=named.where, remedy="give it with --base") from error
    except BaseModelError as error:
        raise SpecError(
            error.problem, where=named.where, allowed=error.allowed, remedy="give it with --base"
        ) from error
    translation.set("file.base", base, named.name)
    fit_base(translation, source.trainer, base, family)
    for mine in [folder.translation for folder in images]:
        if mine.get("preprocess.resolution") is None:
            mine.set("preprocess.resolution", defaults.resolution, defaults.reasons.get("resolution", "of the base"))
        if mine.get("preprocess.crop") is None:
            mine.set("preprocess.crop", "center", "part of an image that is kept")
        if mine.get("preprocess.crop") != "bucket":
            mine.steps["preprocess"].pop("buckets", None)


def _check(text: str, path: Path, source: SettingsSource, needs_images: bool) -> None:
    """Validates the text as the pipeline file, before anything is written."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "pipeline.yaml"
        file.write_text(text)
        try:
            document = read_document(file, SpecError, allowed="a mapping")
            if needs_images:
                (Path(name) / "images").mkdir()  # the real folder is created afterwards
            check_document(replace(document, path=file if needs_images else path), check_bases=False)
        except SpecError as error:
            raise SpecError(
                f"{error.problem} in the pipeline that it gives",
                where=str(source.path),
                allowed=error.allowed,
                remedy=error.remedy or "correct the value",
            ) from None
