"""Defines the folders of images that become datasets, and compares their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from lora_engine.data.folder import Tree
from lora_engine.data.layout import FolderLayout
from lora_engine.data.spec import IngestSettings
from lora_engine.data.unpacking import Unpacked
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.captions import Captions

_PART = {
    "shuffle": "train.captions.shuffle",
    "keep_tokens": "train.captions.keep_tokens",
    "tag_dropout": "train.captions.tag_dropout",
    "prefix": "train.captions.prefix",
    "suffix": "train.captions.suffix",
    "flip": "train.captions.flip",
    "caption_dropout": "train.caption_dropout",
}
"""Setting of a dataset in `combine` -> that of the training."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images with the settings of its own steps.

    Attributes:
        path: The folder; None if it is not on this machine.
        translation: Settings of `ingest`, `preprocess` and `caption`; those of other steps are not its own.
        part: Its settings in `combine`.
    """

    path: Path | None
    translation: Translation
    part: dict[str, Any] = field(default_factory=dict)

    def count(self) -> int | None:
        """Returns the images of an epoch, each counted by its repeats; None without a folder."""
        if self.path is None:
            return None
        tree = Tree(self.path)
        settings = IngestSettings(
            repeats=self.translation.get("ingest.repeats") or {}, layout=self.translation.get("ingest.layout") or "auto"
        )
        layout = FolderLayout(self.path, Unpacked(tree), settings)
        images = sum(layout.repeats(name) for name in layout.names if tree.locate(name)[0].is_file())
        return images * int(self.part.get("repeats", 1))


@dataclass(frozen=True)
class Folders:
    """The folders of images.

    Attributes:
        images: Those of the user, at least one; the first has the settings of the whole translation.
        classes: Those of class images.
    """

    images: tuple[ImageFolder, ...]
    classes: tuple[ImageFolder, ...]

    def count(self) -> int | None:
        """Returns the images of an epoch, each counted by its repeats; None if a folder is not on this machine."""
        counts = [folder.count() for folder in self.images]
        return None if None in counts else sum(count for count in counts if count is not None)


def compare_folders(folders: Sequence[ImageFolder], translation: Translation) -> list[ImageFolder]:
    """Returns the folders with those settings of `combine` that differ from the training's.

    A setting of the training that differs between them without being one of `combine` is noted.
    """
    found = []
    for folder in folders:
        mine = folder.translation
        part = dict(folder.part)
        for name, path in _PART.items():
            value, usual = _value(mine, path), _value(translation, path)
            if value != usual:
                part[name] = value
        if (weight := mine.get("combine.parts.weight")) not in (None, 1.0):
            part["weight"] = weight
        for path, origin in mine.origins.items():
            own = path.startswith(("ingest.", "preprocess.", "caption.", "combine.")) or path in _PART.values()
            if not own and mine.get(path) != translation.get(path):
                shown = translation.get(path)
                reason = "one value for all datasets; " + (f"{shown!r} was taken" if shown is not None else "none")
                translation.drop(Setting(origin, mine.get(path), ""), reason)
        if mine is not translation:
            translation.dropped += [entry for entry in mine.dropped if entry not in translation.dropped]
        found.append(ImageFolder(folder.path, mine, part))
    return found


def _value(translation: Translation, path: str) -> Any:
    """Returns a setting of the training, or its default."""
    value = translation.get(path)
    model = Captions if path.startswith("train.captions.") else TrainSettings
    return model.model_fields[path.rpartition(".")[2]].default if value is None else value
