"""Checks the output path of a rewritten model, and writes the file or folder atomically."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write, sync_folder, write_within
from lora_engine.streaming.direct_writer import DirectWriter
from lora_engine.streaming.model import StoredModel

WriteFile = Callable[[Path, Path], None]
"""Writes the new form of a weights file (source, target); the target is complete when it returns."""


def check_output(model: StoredModel, output: Path) -> None:
    """Raises `SettingsError` if the rewritten model cannot be written to a path.

    Raises:
        SettingsError: The path is that of the model or inside it, a folder that is not empty, or of the wrong type.
    """
    check_apart(model, output)
    if model.path.is_file():
        if output.suffix != ".safetensors" or output.is_dir():
            raise SettingsError(
                f"{str(output)!r} is not the name of a .safetensors file",
                allowed="a name that ends in .safetensors, because the model is one file",
                remedy="choose another output",
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(
            f"{str(output)!r} exists and is not an empty folder",
            allowed="a path that does not exist, because the model is a folder",
            remedy="choose another output, or remove it",
        )
    elif model.path.resolve() in output.resolve().parents:
        raise SettingsError(f"{str(output)!r} is inside the model", remedy="choose another output")


def check_apart(model: StoredModel, output: Path) -> None:
    """Raises `SettingsError` if the output is the model itself.

    Raises:
        SettingsError: The paths are equal.
    """
    if output.exists() and output.resolve() == model.path.resolve():
        raise SettingsError(
            f"{str(output)!r} is the model itself", allowed="another path", remedy="choose another output"
        )


def write_model(model: StoredModel, output: Path, write_file: WriteFile) -> list[Path]:
    """Writes the new form of a model: weights files with `write_file`, copies of all others.

    Returns:
        The written files.

    Raises:
        OSError: The disk is full or read-only; partial files are removed.
    """
    if model.path.is_file():
        write_file(model.path, output)
        return [output]
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name[:50]}.", suffix=".partial"))
    try:
        names = []
        with write_within(staged):
            for source in sorted([*model.files, *model.others]):
                name = source.relative_to(model.path)
                names.append(name)
                if source in model.files:
                    write_file(source, staged / name)
                else:
                    copy_whole(source, staged / name)
        for folder in {staged, *((staged / name).parent for name in names)}:
            sync_folder(folder)
        staged.chmod(model.path.stat().st_mode & 0o777)
        staged.replace(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync_folder(output.parent)
    return [output / name for name in names]


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file atomically."""

    def copy(file: BinaryIO) -> None:
        with source.open("rb", buffering=0) as opened, DirectWriter(file.fileno()) as writer:
            writer.copy(opened.fileno(), 0, source.stat().st_size)

    atomic_write(target, copy)
