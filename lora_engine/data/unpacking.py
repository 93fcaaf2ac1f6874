"""Unpacks the archives and tables of a folder of images into a work folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_engine.data.archives import clean_member_name, is_archive, is_table
from lora_engine.data.decoders import shared_decoders
from lora_engine.data.folder import Tree, is_hidden
from lora_engine.data.metadata import Row
from lora_engine.errors import DataError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif"})


@dataclass
class Unpacked:
    """What was in the archives and tables.

    Attributes:
        tree: All files.
        archive: Name of the archive that has them all; empty for a folder.
        refused: Name of an archive, or of a member or row with an image -> why it cannot be used.
        rows: Name of a table -> what it states of images; their names are relative to the folder of the table, or to
            the table itself if it has the images.
    """

    tree: Tree
    archive: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)


@contextmanager
def unpacked_images(images: Path, out: Path) -> Iterator[Unpacked]:
    """Unpacks a file, or the archives and tables of a folder.

    Args:
        images: The user's folder, archive or table.
        out: The folder for the result. The content of archives is in a folder below it until the context ends.

    Yields:
        The files. A member that cannot be used is refused by its name, and so is the rest of a broken archive.

    Raises:
        DataError: A folder cannot be read.
    """
    tree = Tree(images)
    if images.is_dir():
        archives = sorted(name for name, _ in tree.walk() if is_archive(name) or is_table(name))
        if not archives:
            yield Unpacked(tree)
            return
        sources = {name: tree.locate(name) for name in archives}
    else:
        sources = {"": (images, images.parent)}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unpacked-") as work:
        yield _unpack_all(tree, sources, Path(work))


def _unpack_all(tree: Tree, sources: Mapping[str, tuple[Path, Path]], work: Path) -> Unpacked:
    result = Unpacked(tree, sources[""][0].name if "" in sources else "")
    folders: dict[str, Path] = {}
    for number, (name, (path, root)) in enumerate(sources.items()):
        folder = work / str(number)
        folder.mkdir()
        write = _write_members if is_archive(path.name) else _write_rows
        try:
            for refused, reason in write(path, root, folder, name, result):
                result.refused[f"{name}/{refused}" if name else refused] = reason
        except DataError as error:
            result.refused[name or path.name] = error.reason
        if is_archive(path.name) or any(folder.iterdir()):
            folders[name] = folder
    result.tree = Tree(folders.get("", work)) if "" in sources else Tree(tree.locate("")[0], folders)
    return result


def _write_members(path: Path, root: Path, folder: Path, _: str, __: Unpacked) -> Iterator[tuple[str, str]]:
    for facts, content in shared_decoders().request("archive", path, root):
        if "problem" in facts:
            yield facts["name"], facts["problem"]
            continue
        try:
            name = clean_member_name(facts["name"])
            if not any(map(is_hidden, PurePosixPath(name).parts)):
                _write_new(folder / name, content)
        except DataError as error:
            yield facts["name"], error.reason


def _write_rows(path: Path, root: Path, folder: Path, name: str, result: Unpacked) -> Iterator[tuple[str, str]]:
    rows = result.rows.setdefault(name or path.name, [])
    for facts, content in shared_decoders().request("table", path, root):
        stated = facts["path"] or ""
        if content:
            suffix = PurePosixPath(stated).suffix.lower()
            stated = f"{facts['row']:07}{suffix if suffix in _SUFFIXES else '.image'}"
            _write_new(folder / stated, content)
        elif "problem" in facts:
            yield f"row {facts['row']}", facts["problem"]
            continue
        rows.append((stated, tuple(facts["captions"])))


def _write_new(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise DataError("has the name of another file or folder of the archive") from None
    except NotADirectoryError:
        raise DataError("is below a file of the archive") from None
