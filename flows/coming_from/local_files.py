"""Finds the files that another trainer's settings name on this machine: an autoencoder, an adapter, prompts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.coming_from.carry_samples import set_prompts
from flows.coming_from.read import Setting, read_bytes
from flows.coming_from.translation import Translation
from lora_engine.bases.source import split_hub_id
from lora_engine.documents import decode, parse_json
from lora_engine.files import expand_home, is_present_file, is_present_folder
from tasks.errors import SpecError


def set_local_files(translation: Translation, folder: Path) -> None:
    """Replaces the paths of files by absolute ones, and a file of prompts by its prompts; drops what is not here.

    Args:
        translation: The settings.
        folder: The folder that paths are relative to.

    Raises:
        SpecError: The file of prompts cannot be read.
    """
    for path, kind, remedy in (
        ("file.vae", "folder", "save the autoencoder as a folder, and name it as vae"),
        ("train.init", "file", "no such file on this machine; name one as init"),
    ):
        written = translation.get(path)
        if written is None:
            continue
        step, key = path.split(".")
        found = _find_path(folder, str(written), kind)
        if found is not None:
            translation.steps[step][key] = str(found)
        elif kind == "file" or split_hub_id(written) is None:
            translation.remove(path, remedy)
    if (named := translation.texts.get("sample file")) is not None:
        origin, file = translation.origins["sample file"], _find_path(folder, named, "file")
        if file is not None:
            set_prompts(translation, _read_prompts(file), origin)
        elif translation.get("train.samples.prompts") is None:
            translation.drop(Setting(origin, named, ""), "copy the prompts of the file into samples.prompts")


def _find_path(folder: Path, written: str, kind: str) -> Path | None:
    with suppress(OSError, RuntimeError, ValueError):  # a name that is too long, of an unknown user, or with a null
        path = (folder / expand_home(written)).resolve()
        if is_present_folder(path) if kind == "folder" else is_present_file(path):
            return path
    return None


def _read_prompts(path: Path) -> list[Any]:
    """Returns the list of a JSON file of OneTrainer, or the lines of a text file of sd-scripts.

    Raises:
        SpecError: It cannot be read, or is too large.
    """
    content = read_bytes(path)
    if path.suffix.lower() == ".json":
        data = parse_json(content, str(path), SpecError)
        return data if isinstance(data, list) else []
    lines = decode(content, str(path), SpecError).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
