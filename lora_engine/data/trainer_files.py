"""Reads the dataset files of other trainers: OneTrainer's concepts, ai-toolkit's datasets, SimpleTuner's backends.

Follows OneTrainer 23df383, ai-toolkit 27a03a9 and SimpleTuner bc8e6ab. Paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from lora_engine.data.folder import Tree, open_inside
from lora_engine.data.groups import FolderNames, Grouping, ImageGroup, SettingsObject, bounded_caption, objects_of
from lora_engine.data.manifest import MAX_ALTERNATIVES, MAX_CAPTION, MAX_REPEATS, Split
from lora_engine.data.text_files import clean_text, printable, read_text
from lora_engine.documents.json_source import parse_json
from lora_engine.documents.yaml_source import read_document
from lora_engine.errors import DataError

_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class DatasetFile:
    """The dataset file of a trainer.

    Attributes:
        title: Its kind, in the report.
        patterns: Patterns of its usual lower-case names.
        endings: Endings of its names if the layout is stated.
        read: Takes (data, folders, tree); yields groups and notes.
    """

    title: str
    patterns: tuple[str, ...]
    endings: tuple[str, ...]
    read: Callable[[Any, FolderNames, Tree], Iterator[ImageGroup | str]]


def find_dataset_file(layout: str, companions: Collection[str]) -> tuple[str, str] | None:
    """Returns layout and name of the dataset file; None if there is none.

    Args:
        layout: A key of `DATASET_FILES`, or `auto` for any of them.
        companions: The text files of the folder.

    Raises:
        DataError: The stated layout has no such file.
    """
    layouts = [layout] if layout != "auto" else list(DATASET_FILES)
    by_depth = sorted(companions, key=lambda name: (name.count("/"), name))
    for name in by_depth:
        for candidate in layouts:
            if any(fnmatchcase(PurePosixPath(name).name.lower(), p) for p in DATASET_FILES[candidate].patterns):
                return candidate, name
    if layout == "auto":
        return None
    endings = DATASET_FILES[layout].endings
    own = [name for name in by_depth if name.lower().endswith(endings) and "/" not in name]
    if len(own) != 1:
        raise DataError(
            f"layout is {layout}, but the folder has {len(own) or 'no'} files that may describe it",
            allowed=" or ".join(DATASET_FILES[layout].patterns),
            remedy="rename the file",
        )
    return layout, own[0]


def read_dataset_file(layout: str, name: str, tree: Tree, names: Collection[str]) -> Grouping:
    """Returns what a dataset file says about the folders of images.

    Args:
        layout: See `DATASET_FILES`.
        name: The file.
        tree: All files.
        names: Names of all files.

    Raises:
        DataError: It is invalid, or names a folder that is not there.
    """
    kind = DATASET_FILES[layout]
    groups: list[ImageGroup] = []
    notes: list[str] = []
    for item in kind.read(_load(name, tree), FolderNames(names, name), tree):
        if isinstance(item, str):
            notes.append(item)
            continue
        if (twin := next((group for group in groups if group.folder == item.folder), None)) is not None:
            raise DataError(
                f"{twin.label!r} and {item.label!r} have the same folder {printable(item.folder)!r}",
                where=printable(name),
                allowed="a folder for each",
                remedy="merge the two entries",
            )
        groups.append(item)
    return Grouping(kind.title, name, tuple(groups), tuple(notes))


def _load(name: str, tree: Tree) -> Any:
    path, root = tree.locate(name)
    if name.lower().endswith(".json"):
        return parse_json(read_text(path, root, _MAX_BYTES), printable(name), DataError)
    open_inside(path, root).close()
    return read_document(path, DataError, allowed="a mapping").data


def _read_concepts(data: Any, folders: FolderNames, tree: Tree) -> Iterator[ImageGroup | str]:
    uses: dict[str, Split] = {"STANDARD": "train", "VALIDATION": "heldout", "PRIOR_PREDICTION": "class"}
    for concept in objects_of(data, "concepts"):
        path = concept.text("path")
        label = clean_text(concept.text("name")) or PurePosixPath(path.replace("\\", "/")).name
        kind = concept.text("type", "STANDARD")
        if kind not in uses:
            raise DataError(f"type is {kind!r}", where=concept.where, allowed=", ".join(uses))
        if not concept.flag("enabled", True):
            with_folder = _find_or_none(folders, path, concept.where)
            if with_folder is not None:
                yield ImageGroup(with_folder, label, skipped=f"the concept {label!r} is disabled")
            continue
        text = concept.entry("text")
        source = text.text("prompt_source", "sample")
        group = ImageGroup(
            folders.find(path, concept.where),
            label,
            split=uses[kind],
            is_recursive=concept.flag("include_subdirectories", False),
            first_line=True,
        )
        if source == "concept":
            first, further = _read_prompts(tree, text.text("prompt_path"), folders, text)
            group = replace(group, captions="stated", text=first, alternatives=further)
        elif source == "filename":
            group = replace(group, captions="file name")
        elif source != "sample":
            raise DataError(f"prompt_source is {source!r}", where=text.where, allowed="sample, concept, filename")
        balancing = concept.number("balancing", 1.0)
        if not 0 < balancing <= MAX_REPEATS:
            raise DataError(f"balancing is {balancing:g}", where=concept.where, allowed=f"up to {MAX_REPEATS}")
        if concept.text("balancing_strategy", "REPEATS") == "SAMPLES":
            group = replace(group, samples=round(balancing))
        else:
            group = replace(group, repeats=max(1, round(balancing)))
            if balancing != group.repeats:
                yield f"{label!r} has {balancing:g} repeats, and {group.repeats} are used"
        if concept.number("loss_weight", 1.0) != 1.0:
            yield f"the loss weight of {label!r} is not used"
        yield group


def _read_prompts(tree: Tree, stated: str, folders: FolderNames, text: SettingsObject) -> tuple[str, tuple[str, ...]]:
    """Returns the first line of a file of prompts, and further ones that are no longer than a caption may be."""
    path = PurePosixPath(stated.replace("\\", "/"))
    if not path.name:
        raise DataError("prompt_path is missing", where=text.where)
    folder = folders.find(path.parent.as_posix(), text.where)
    file, root = tree.locate((PurePosixPath(folder) / path.name).as_posix())
    lines = [line for line in map(clean_text, read_text(file, root, _MAX_BYTES).splitlines()) if line]
    first = bounded_caption(lines[0], printable(path.name)) if lines else ""
    further = dict.fromkeys(line for line in lines[1:] if len(line) <= MAX_CAPTION and line != first)
    return first, tuple(further)[: MAX_ALTERNATIVES - 1]


def _read_toolkit(data: Any, folders: FolderNames, _: Tree) -> Iterator[ImageGroup | str]:
    whole = SettingsObject(data, "datasets")
    processes = whole.entry("config").entries("process") or [whole]
    for process in processes:
        trigger = process.text("trigger_word") or None
        for dataset in process.entries("datasets"):
            path = dataset.text("folder_path") or dataset.text("dataset_path")
            ending = "." + dataset.text("caption_ext", "txt").lstrip(".")
            if ending not in {".txt", ".caption", ".json"}:
                yield f"captions in {printable(ending)!r} files of {printable(path)!r} are not read"
            masks = dataset.text("mask_path")
            if dataset.flag("invert_mask", False):
                yield f"the masks of {printable(path)!r} are inverted there, and not here"
            yield ImageGroup(
                folders.find(path, dataset.where),
                PurePosixPath(path.replace("\\", "/")).name,
                repeats=dataset.repeats("num_repeats"),
                split="class" if dataset.flag("is_reg", False) else "train",
                text=dataset.caption("default_caption"),
                trigger=dataset.text("trigger_word") or trigger,
                masks=folders.find(masks, dataset.where) if masks else None,
            )


def _read_backends(data: Any, folders: FolderNames, _: Tree) -> Iterator[ImageGroup | str]:
    backends = list(objects_of(data, "backends"))
    masks = {
        entry.text("id"): entry.text("instance_data_dir")
        for entry in backends
        if entry.text("dataset_type") == "conditioning" and entry.text("conditioning_type") == "mask"
    }
    used = {text for entry in backends if (text := entry.text("conditioning_data")) in masks}
    for backend in backends:
        kind, path = backend.text("dataset_type", "image"), backend.text("instance_data_dir")
        label = clean_text(backend.text("id")) or path
        reason = _why_skipped(backend, kind, label)
        if reason is not None:
            folder = _find_or_none(folders, path, backend.where)
            if folder is not None and label not in used:
                yield ImageGroup(folder, label, skipped=reason)
            continue
        group = ImageGroup(
            folders.find(path, backend.where),
            label,
            repeats=backend.repeats("repeats", extra=True),
            split="heldout"
            if kind == "eval"
            else "class"
            if backend.flag("is_regularisation_data", False)
            else "train",
            first_line=True,
            masks=folders.find(masks[text], backend.where)
            if (text := backend.text("conditioning_data")) in used
            else None,
        )
        strategy = backend.text("caption_strategy", "textfile")
        if strategy == "filename":
            group = replace(group, captions="file name")
        elif strategy == "instanceprompt":
            group = replace(group, captions="stated", text=backend.caption("instance_prompt"))
        elif strategy not in {"textfile", "parquet"}:
            yield f"the caption_strategy {printable(strategy)!r} of {label!r} is not known and not used"
        if backend.number("probability", 1.0) != 1.0:
            yield f"the probability of {label!r} is not used"
        yield group


def _why_skipped(backend: SettingsObject, kind: str, label: str) -> str | None:
    if backend.flag("disabled", False):
        return f"the backend {label!r} is disabled"
    if kind not in {"image", "eval"}:
        return f"the backend {label!r} has {printable(kind)}"
    if (place := backend.text("type", "local")) != "local":
        raise DataError(f"type is {place!r}", where=backend.where, allowed="local", remedy="download its images")
    return None


def _find_or_none(folders: FolderNames, path: str, where: str) -> str | None:
    try:
        return folders.find(path, where) if path else None
    except DataError:
        return None  # a folder that is not used need not exist


DATASET_FILES = {
    "onetrainer": DatasetFile("OneTrainer concepts", ("concepts.json",), (".json",), _read_concepts),
    "ai-toolkit": DatasetFile(
        "ai-toolkit datasets",
        ("ai-toolkit.y*ml", "ai_toolkit.y*ml", "ai-toolkit.json", "ai_toolkit.json"),
        (".yaml", ".yml", ".json"),
        _read_toolkit,
    ),
    "simpletuner": DatasetFile(
        "SimpleTuner backends", ("multidatabackend.json", "multidatabackend[_-]*.json"), (".json",), _read_backends
    ),
}
"""Layout -> its file."""
