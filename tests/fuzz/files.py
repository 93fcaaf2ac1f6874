"""The form of all inputs: files by their path inside a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Files = dict[str, bytes]
"""Path inside the folder -> bytes."""
TEXT = "text"
"""Name of the only file of an input that is a text, such as a prompt or a name on the command line."""


def read_files(folder: Path) -> Files:
    """Returns the files of a folder and its subfolders; of a file, the file itself."""
    if folder.is_file():
        return {folder.name: folder.read_bytes()}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files into a folder, which is created; a path whose parent is a file is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    return folder


def text_of(files: Mapping[str, bytes]) -> str:
    """Returns the text of an input as Python decodes an argument of the command line."""
    return files[TEXT].decode("utf-8", "surrogateescape")


def as_text(text: str) -> Files:
    """Returns the input that is a text."""
    return {TEXT: text.encode("utf-8", "surrogateescape")}
