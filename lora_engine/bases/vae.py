"""Resolves the name of an autoencoder that replaces that of a base. Torch-free; loads no weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lora_engine.bases.source import digest_of_file, split_hub_id
from lora_engine.errors import BaseModelError
from lora_engine.families.layout import find_component
from lora_engine.files import FilePath, canonical_json, expand_home, is_present_file, is_present_folder, sha256_bytes

_FOLDER = "vae"


@dataclass(frozen=True)
class VaeSource:
    """An autoencoder on this machine.

    Attributes:
        label: Its name without paths.
        folder: The folder of its files, in diffusers' layout.
        variant: Variant of the weights: None or `fp16`.
        files: Names of its files, sorted.
    """

    label: str
    folder: Path
    variant: str | None
    files: tuple[str, ...]

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the names and digests of its files."""
        return sha256_bytes(canonical_json({name: digest_of_file(self.folder / name) for name in self.files}))


def resolve_vae(name: FilePath) -> VaeSource:
    """Finds an autoencoder; downloads it if necessary.

    Args:
        name: A folder with `config.json` and weights as safetensors, a diffusers folder of a base with a subfolder
            `vae`, or the hub id of one, optionally with `@revision`.

    Raises:
        BaseModelError: There is none, or its weights are pickles.
    """
    path = expand_home(name)
    if is_present_folder(path):
        return _from_folder(path.name or str(path), path.resolve())
    hub_id = split_hub_id(name)
    if hub_id is None:
        raise BaseModelError(
            f"unknown autoencoder {os.fspath(name)!r}: neither a folder nor a hub id",
            where="vae",
            allowed="a folder in diffusers' layout, or a hub id (`owner/name` or `owner/name@revision`)",
            remedy="save a single file with diffusers' AutoencoderKL.from_single_file first"
            if is_present_file(path)
            else "check the path",
        )
    from lora_engine.bases.hub import fetch_vae

    folder = fetch_vae(*hub_id)
    return _from_folder(f"{hub_id[0]}@{folder.name}", folder)


def _from_folder(label: str, folder: Path) -> VaeSource:
    own = folder / _FOLDER
    folder = own if own.is_dir() else folder
    variant, files = find_component(folder, _FOLDER)
    return VaeSource(label, folder, variant, files)
