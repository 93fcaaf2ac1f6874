"""Finds the folders of images of another trainer's settings, and counts their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from flows.coming_from.parts import Folders, ImageFolder, compare_folders
from flows.coming_from.read import Setting, SettingsSource
from flows.coming_from.source_folder import SourceFolder
from flows.coming_from.translate import apply, translate
from flows.coming_from.translation import Translation
from flows.coming_from.values import is_off, truth
from lora_engine.data.folder import Tree, list_tree
from lora_engine.data.subsets import find_subsets
from lora_engine.files import expand_home, is_present_folder


def find_images(source: SettingsSource, translation: Translation, images: Path | None) -> Folders:
    """Carries the options of the images over.

    Args:
        source: The settings.
        translation: Gets the settings of `ingest` and `caption`, and those of the first folder.
        images: The user's folder of images, or the folder of the folders that the settings name; None takes those.

    Raises:
        SpecError: An option has a value of the wrong type.
    """
    by_name = {setting.name: setting for setting in source.settings}
    subsets = [SourceFolder.of(subset, source.trainer) for subset in source.subsets]
    subsets = [subset for subset in subsets if subset.folder is not None and subset.is_used(translation)]
    own = [subset for subset in subsets if not subset.is_class]
    classes = [subset for subset in subsets if subset.is_class]
    if not own:
        return _one_folder(source, translation, images, by_name)
    found = [(subset, _locate(subset, source, translation, images, len(own))) for subset in own]
    used: list[tuple[SourceFolder, Path | None]] = [entry for entry in found if entry[1] is not None]
    if images is not None and not used:
        used = [(own[0], images)]
    used = used or found[:1]
    folders = []
    for number, (subset, path) in enumerate(used):
        mine = translation if number == 0 else _translated(source)
        apply(mine, source.trainer, subset.options)
        if path is not None and any(_is_counted(inner) for inner in path.iterdir()):
            mine.set("ingest.layout", "plain", "names of folders have no meaning there")
        _caption(by_name, subset, mine)
        folders.append(ImageFolder(path, mine, {"repeats": subset.repeats} if subset.repeats > 1 else {}))
    if len(folders) > 1:
        folders = compare_folders(folders, translation)
    elif used[0][0].repeats > 1:
        translation.set("ingest.repeats", {"*": used[0][0].repeats}, "num_repeats")
        folders = [ImageFolder(used[0][1], translation)]
    if len(folders) == 1 and translation.get("combine.parts.weight") not in (None, 1.0):
        origin = translation.origins["combine.parts.weight"]
        weight = translation.get("combine.parts.weight")
        translation.drop(Setting(origin, weight, ""), "a weight of all images; change learning_rate")
    _set_prior(by_name, classes[0].folder if classes else None, translation)
    return Folders(tuple(folders), tuple(_class_folders(classes, source, translation)))


def _one_folder(
    source: SettingsSource, translation: Translation, images: Path | None, by_name: dict[str, Setting]
) -> Folders:
    classes = by_name.get("reg_data_dir") or by_name.get("class_data_dir")
    _set_prior(by_name, classes, translation)
    named = by_name.get("train_data_dir") or by_name.get("instance_data_dir")
    folder = images or _existing(named, source, translation)
    if folder is not None and source.trainer == "sd":
        _kohya_folders(folder, translation)
    elif folder is not None and any(_is_counted(path) for path in folder.iterdir()):
        translation.set("ingest.layout", "plain", "names of folders have no meaning there")
    _caption(by_name, None, translation)
    class_folder = _existing(classes, source, translation)
    if class_folder is None:
        return Folders((ImageFolder(folder, translation),), ())
    mine = Translation()
    if translation.get("ingest.repeats") == "folders":
        mine.set("ingest.repeats", "folders", "")
    return Folders((ImageFolder(folder, translation),), (_class_folder(class_folder, mine),))


def _class_folders(
    subsets: Sequence[SourceFolder], source: SettingsSource, translation: Translation
) -> Iterator[ImageFolder]:
    for subset in subsets:
        if (path := _existing(subset.folder, source, translation)) is not None:
            mine = Translation()
            if subset.caption is not None and not is_off(subset.caption.value):
                mine.set("caption.template", str(subset.caption.value), subset.caption.name)
            yield _class_folder(path, mine)


def _class_folder(path: Path, translation: Translation) -> ImageFolder:
    words = _words(path)
    if len(words) == 1 and translation.get("caption.template") is None:
        translation.set("caption.template", words[0], "the folder's name")
    return ImageFolder(path, translation)


def _translated(source: SettingsSource) -> Translation:
    """Returns the shared settings without what they drop, which is noted already."""
    translation = translate(source)
    translation.dropped.clear()
    return translation


def _locate(
    subset: SourceFolder, source: SettingsSource, translation: Translation, images: Path | None, count: int
) -> Path | None:
    """Returns the folder of a subset, or the one with its name in the user's folder."""
    if images is None or subset.folder is None:
        return _existing(subset.folder, source, translation)
    if count == 1:
        return images
    with suppress(OSError):  # a name that is too long
        inner = images / PurePosixPath(str(subset.folder.value).replace("\\", "/")).name
        if inner != images and inner.is_dir():
            return inner
    translation.drop(subset.folder, "no such folder in the one of --images")
    return None


def _existing(setting: Setting | None, source: SettingsSource, translation: Translation) -> Path | None:
    if setting is None or is_off(setting.value):
        return None
    path = Path(str(setting.value))
    # A name of the file can be too long, or of an unknown user.
    with suppress(OSError, RuntimeError):
        path = expand_home(path)
        for candidate in (path, source.path.parent / path):
            if is_present_folder(candidate):
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
    elif words and not find_subsets(list_tree(Tree(folder)).images):  # otherwise ingest reads them
        setting = Setting("train_data_dir", ", ".join(words), "")
        translation.drop(setting, "words of several folders as captions; write .txt files")


def _is_counted(path: Path) -> bool:
    return path.is_dir() and path.name.partition("_")[0].isdigit()


def _words(folder: Path) -> list[str]:
    """Returns the different texts behind the number of folders such as `10_sks dog`."""
    names = [path.name.partition("_")[2] for path in folder.iterdir() if _is_counted(path)]
    return sorted({name for name in names if name})


def _caption(by_name: dict[str, Setting], subset: SourceFolder | None, translation: Translation) -> None:
    if subset is not None and subset.caption is not None and not is_off(subset.caption.value):
        translation.set("caption.template", str(subset.caption.value), subset.caption.name)
    template, trigger = translation.get("caption.template"), translation.get("caption.trigger")
    if template is not None and trigger is not None:
        text = template.replace("[trigger]", "{trigger}")
        translation.set("caption.template", text if "{trigger}" in text else f"{{trigger}} {text}", "default_caption")
