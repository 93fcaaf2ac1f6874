"""Finds the folders of images of another trainer's settings, and counts their images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.coming_from.options import options_of
from flows.coming_from.read import Setting, SettingsSource
from flows.coming_from.translate import apply
from flows.coming_from.translation import Translation
from flows.coming_from.values import is_off, number, truth
from lora_engine.data.folder import Tree
from lora_engine.data.layout import FolderLayout
from lora_engine.data.spec import IngestSettings
from lora_engine.data.unpacking import Unpacked

_REPEATS = ("concepts.balancing", "num_repeats", "dataset_repeats", "datasets.num_repeats", "repeats")


@dataclass(frozen=True)
class Folders:
    """The folders of images.

    Attributes:
        images: The folder of the user's images; None if none exists on this machine.
        classes: The folder of class images; None without one.
        class_words: The words of the class images' folder, such as `1_star`; empty for other names.
        repeats: `repeats` of the step `ingest`.
        layout: `layout` of the step `ingest`.
    """

    images: Path | None
    classes: Path | None
    class_words: str
    repeats: Literal["folders"] | dict[str, int]
    layout: Literal["auto", "plain"]

    def count(self) -> int | None:
        """Returns the images of an epoch, each counted by its repeats; None without a folder."""
        folder = self.images
        if folder is None:
            return None
        tree = Tree(folder)
        layout = FolderLayout(folder, Unpacked(tree), IngestSettings(repeats=self.repeats, layout=self.layout))
        return sum(layout.repeats(name) for name in layout.names if tree.locate(name)[0].is_file())


def find_images(source: SettingsSource, translation: Translation, images: Path | None) -> Folders:
    """Carries the options of the images over.

    Args:
        source: The settings.
        translation: Gets the settings of `ingest` and `caption`, and those of the first folder.
        images: The user's folder of images; None takes the one that the settings name.

    Raises:
        SpecError: An option has a value of the wrong type.
    """
    by_name = {setting.name: setting for setting in source.settings}
    subsets = [_Subset.of(subset, source.trainer) for subset in source.subsets]
    subsets = [subset for subset in subsets if subset.folder is not None]
    own = [subset for subset in subsets if not subset.is_class]
    if own:
        apply(translation, source.trainer, own[0].options)
        _compare(own, translation)
        named, classes = own[0].folder, next((s.folder for s in subsets if s.is_class), None)
        if own[0].repeats > 1:
            translation.set("ingest.repeats", {"*": own[0].repeats}, "num_repeats")
    else:
        named = by_name.get("train_data_dir") or by_name.get("instance_data_dir")
        classes = by_name.get("reg_data_dir") or by_name.get("class_data_dir")
    _set_prior(by_name, classes, translation)
    folder = images or _existing(named, source, translation)
    if not own and folder is not None and source.trainer == "sd":
        _kohya_folders(folder, translation)
    elif folder is not None and any(_is_counted(path) for path in folder.iterdir()):
        translation.set("ingest.layout", "plain", "names of folders have no meaning there")
    _caption(by_name, own[0] if own else None, translation)
    repeats = translation.get("ingest.repeats") or {}
    class_folder = _existing(classes, source, translation)
    words = _words(class_folder) if class_folder is not None else []
    return Folders(
        folder, class_folder, words[0] if len(words) == 1 else "", repeats, translation.get("ingest.layout") or "auto"
    )


@dataclass(frozen=True)
class _Subset:
    folder: Setting | None
    is_class: bool
    repeats: int
    caption: Setting | None
    options: tuple[Setting, ...]

    @classmethod
    def of(cls, settings: Sequence[Setting], trainer: str) -> _Subset:
        by_name = {setting.name: setting for setting in settings}
        folder = next(
            (s for name, s in by_name.items() if name.rpartition(".")[2] in ("image_dir", "folder_path", "path")), None
        )
        repeats = next((max(1, round(number(by_name[name]))) for name in _REPEATS if name in by_name), 1)
        known = options_of(trainer)
        ours = {name: known[name].ours for name in by_name if name in known}
        outside = {"ingest.images", "ingest.repeats", "caption.template"}
        rest = tuple(
            s
            for s in settings
            if ours.get(s.name) not in outside and s.name.rpartition(".")[2] not in ("is_reg", "enabled", "name")
        )
        is_class = any(truth(by_name[name]) for name in ("is_reg", "datasets.is_reg") if name in by_name)
        caption = by_name.get("class_tokens") or by_name.get("datasets.default_caption")
        return cls(folder, is_class, repeats, caption, rest)


def _compare(subsets: Sequence[_Subset], translation: Translation) -> None:
    for subset in subsets[1:]:
        if subset.folder is not None:
            translation.drop(subset.folder, "one folder for a run; put all images into subfolders of one folder")


def _existing(setting: Setting | None, source: SettingsSource, translation: Translation) -> Path | None:
    if setting is None or is_off(setting.value):
        return None
    path = Path(str(setting.value))
    # A name of the file can be too long, or of an unknown user.
    with suppress(OSError, RuntimeError):
        path = path.expanduser()
        for candidate in (path, source.path.parent / path):
            if candidate.is_dir():
                return candidate.resolve()
    translation.drop(setting, "no such folder on this machine; give one with --images")
    return None


def _set_prior(by_name: dict[str, Setting], classes: Setting | None, translation: Translation) -> None:
    """Keeps the settings of class images if they are used, and removes them otherwise."""
    switch = by_name.get("with_prior_preservation")
    is_used = truth(switch) if switch is not None else classes is not None and not is_off(classes.value)
    train = translation.steps["train"]
    if is_used:
        train.setdefault("prior", {})
    else:
        train.pop("prior", None)


def _kohya_folders(folder: Path, translation: Translation) -> None:
    """Reads names such as `10_sks dog`: repeats, and the caption of images without one."""
    words = _words(folder)
    if not any(_is_counted(path) for path in folder.iterdir()):
        return
    translation.set("ingest.repeats", "folders", "names such as 10_word")
    if len(words) == 1:
        translation.set("caption.template", words[0], "the folder's name")
    elif words:
        setting = Setting("train_data_dir", ", ".join(words), "")
        translation.drop(setting, "words of several folders as captions; write .txt files")


def _is_counted(path: Path) -> bool:
    return path.is_dir() and path.name.partition("_")[0].isdigit()


def _words(folder: Path) -> list[str]:
    """Returns the different texts behind the number of folders such as `10_sks dog`."""
    names = [path.name.partition("_")[2] for path in folder.iterdir() if _is_counted(path)]
    return sorted({name for name in names if name})


def _caption(by_name: dict[str, Setting], subset: _Subset | None, translation: Translation) -> None:
    if subset is not None and subset.caption is not None and not is_off(subset.caption.value):
        translation.set("caption.template", str(subset.caption.value), subset.caption.name)
    template, trigger = translation.get("caption.template"), translation.get("caption.trigger")
    if template is not None and trigger is not None:
        text = template.replace("[trigger]", "{trigger}")
        translation.set("caption.template", text if "{trigger}" in text else f"{{trigger}} {text}", "default_caption")
