"""Shows the datasets of a home with their captions, and finds the folders that they were read from."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.errors import DataError
from lora_engine.files import expand_home, sha256_file
from registry.entities import ArtifactRef
from registry.errors import StoreError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.operations.caption_edits import read_captions
from tasks.operations.report import read_manifest
from tasks.operations.status import has_tables

_THUMBNAIL = 192
_QUALITY = 80
_MAX_RUNS, _MAX_FOLDERS, _MAX_DEPTH = 200, 5_000, 5


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset that an ingest step made.

    Attributes:
        pipeline: Name of the pipeline.
        step: Name of the step.
        artifact: The images and the manifest.
    """

    pipeline: str
    step: str
    artifact: ArtifactRef


@dataclass(frozen=True)
class SheetImage:
    """An image of a dataset.

    Attributes:
        entry: What the manifest has of it.
        beside: The caption in the text file beside the image now; empty without a folder or a file.
        locked: Why it cannot be changed; empty if it can.
    """

    entry: ImageEntry
    beside: str
    locked: str

    @property
    def caption(self) -> str:
        """The caption that the next run uses."""
        return self.beside or self.entry.caption

    @property
    def is_changed(self) -> bool:
        """True if it is not the caption of the dataset."""
        return self.caption != self.entry.caption


def list_datasets(home: Home) -> list[DatasetEntry]:
    """Returns the latest dataset of each ingest step of each pipeline, the latest run first."""
    if not has_tables(home):
        return []
    found: dict[tuple[str, str], DatasetEntry] = {}
    with closing(Lineage(home.lineage_url)) as lineage:
        for run in lineage.runs(limit=_MAX_RUNS):
            for execution in lineage.executions(run.id):
                if execution.uses == "ingest" and execution.output is not None:
                    key = run.name, execution.step
                    found.setdefault(key, DatasetEntry(*key, execution.output))
    return list(found.values())


def dataset_roots(home: Home) -> list[Path]:
    """Returns the folders below which captions may be changed: `datasets` of loraline.yaml, or the home's project."""
    stated = home.settings.datasets
    if stated is not None:
        return [expand_home(text).resolve() for text in stated]
    return [home.path.resolve().parent] if home.path.name == ".loraline" else []


def find_folders(home: Home, manifest: Manifest) -> list[Path]:
    """Returns the folders that have every image of a dataset, the first of them with its bytes; sorted.

    Searches below `dataset_roots`, at most 5 folders deep, without links.
    """
    sources = [entry.source for entry in manifest.pictures]
    if not sources:
        return []
    found = []
    for root in dataset_roots(home):
        for folder in _walk(root, home.path.resolve()):
            first = folder / sources[0]
            if not first.is_file() or not all((folder / source).is_file() for source in sources):
                continue
            if sha256_file(first) == manifest.pictures[0].sha256:
                found.append(folder)
    return sorted(found)


def require_folder(home: Home, folder: str) -> Path:
    """Returns a folder that is below `dataset_roots`.

    Raises:
        DataError: It is not, or there is no such folder.
    """
    path, roots = Path(folder).resolve(), dataset_roots(home)
    if not path.is_dir() or not any(path.is_relative_to(root) for root in roots):
        raise DataError(
            f"captions below {folder[:200]!r} cannot be changed",
            allowed=", ".join(map(str, roots)) or "none",
            remedy="name the folder under `datasets` in the home's loraline.yaml",
        )
    return path


def read_sheet(home: Home, artifact: ArtifactRef, folder: Path | None) -> list[SheetImage]:
    """Returns the images of a dataset with their captions.

    Args:
        home: The home.
        artifact: A dataset.
        folder: The folder that it was read from; None shows the captions of the dataset.

    Raises:
        StoreError: The manifest is missing or damaged.
    """
    entries = read_manifest(home, artifact).pictures
    if folder is None:
        return [SheetImage(entry, "", "its folder was not found") for entry in entries]
    captions = read_captions(folder, [entry.source for entry in entries])
    return [_show(entry, captions.get(entry.source)) for entry in entries]


def read_thumbnail(home: Home, artifact: ArtifactRef, entry: ImageEntry) -> dict[str, Any] | None:
    """Returns the small image as `embed_image` does; None if its bytes are missing or damaged."""
    from PIL import Image

    from lora_engine.data.pages import embed_image

    try:
        content = open_store(home).read(artifact, entry.file)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return embed_image(image.convert("RGB"), _THUMBNAIL, _QUALITY)
    except (StoreError, OSError, Image.DecompressionBombError):
        return None


def _show(entry: ImageEntry, caption: str | DataError | None) -> SheetImage:
    if entry.alternatives:
        return SheetImage(entry, "", f"it has {len(entry.captions)} captions; change their file yourself")
    if isinstance(caption, DataError):
        return SheetImage(entry, "", caption.problem)
    return SheetImage(entry, caption or "", "it is not in the folder" if caption is None else "")


def _walk(root: Path, home: Path) -> Iterator[Path]:
    """Yields folders below a root, without links, hidden folders and the home."""
    for count, (name, folders, _) in enumerate(os.walk(root)):
        folder = Path(name)
        depth = len(folder.relative_to(root).parts)
        folders[:] = [
            child
            for child in sorted(folders)
            if depth < _MAX_DEPTH
            and not child.startswith(".")
            and not (folder / child).is_symlink()
            and folder / child != home
        ]
        if count >= _MAX_FOLDERS:
            return
        yield folder
