"""Where a rewritten model goes: one file, or a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write, sync_folder
from lora_engine.streaming.blocks import copy_file
from lora_engine.streaming.model import StoredModel

WriteFile = Callable[[Path, Path], None]
"""Writes the new form of a file of weights (source, target); the target is there, whole, when it returns."""


def check_output(model: StoredModel, output: Path) -> None:
    """Does nothing for a place that a new form of this model can go to.

    Raises:
        SettingsError: It is the model's own place, a folder that holds something, or not of the kind that the model is.
    """
    check_apart(model, output)
    if model.path.is_file():
        if output.suffix != ".safetensors" or output.is_dir():
            raise SettingsError(
                f"{str(output)!r} is not the name of a .safetensors file",
                allowed="a name that ends in .safetensors, since the model is one file",
                remedy="choose another output",
            )
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SettingsError(
            f"{str(output)!r} is there and is not an empty folder",
            allowed="a path where nothing is yet, since the model is a folder",
            remedy="choose another output, or remove what is there",
        )
    elif model.path.resolve() in output.resolve().parents:
        raise SettingsError(f"{str(output)!r} lies within the model", remedy="choose another output")


def check_apart(model: StoredModel, output: Path) -> None:
    """Does nothing for a place that is not the model's own.

    Raises:
        SettingsError: It is.
    """
    if output.exists() and output.resolve() == model.path.resolve():
        raise SettingsError(
            f"{str(output)!r} is the model itself", allowed="another path", remedy="choose another output"
        )


def write_model(model: StoredModel, output: Path, write_file: WriteFile) -> list[Path]:
    """Writes the new form of a model: its weights by `write_file`, all else as it is.

    Returns:
        The files that were written.

    Raises:
        OSError: The disk is full or read-only; nothing is left behind.
    """
    if model.path.is_file():
        write_file(model.path, output)
        return [output]
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name[:100]}.", suffix=".partial"))
    try:
        names = []
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
    atomic_write(target, lambda file: copy_file(source, file.fileno()))
