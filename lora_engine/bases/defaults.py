"""Finds the training defaults of a base by its small configuration files. Torch-free; needs no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_engine.bases.source import TINY, resolve_base, split_hub_id
from lora_engine.bases.tiny import DEFAULTS
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.families import Family, families
from lora_engine.families.layout import read_pipeline
from lora_engine.families.training_defaults import TrainingDefaults
from lora_engine.files import FilePath


def training_defaults(name: FilePath) -> TrainingDefaults:
    """Returns the defaults of the base's family, with the resolution that the base's configuration states.

    Of a hub id, reads or downloads the configuration only. If the hub cannot be reached, a repository that a family
    names is known by its name.

    Args:
        name: A name for `resolve_base`.

    Raises:
        BaseModelError: No such base, or an unknown family.
    """
    if name == TINY:
        return DEFAULTS
    family, folder = _find_family(name)
    resolution = None if folder is None else _native_resolution(folder)
    return family.training if resolution is None else replace(family.training, resolution=resolution)


def family_of(name: FilePath) -> Family:
    """Returns the family of a base; see `training_defaults`.

    Raises:
        BaseModelError: No such base, or an unknown family.
    """
    return _find_family(name)[0]


def transformer_config(name: FilePath) -> Mapping[str, Any]:
    """Returns the configuration of a base's transformer; of a base that only its name identifies, that of its family.

    Returns:
        The content of `transformer/config.json`; empty for a base with a U-Net.

    Raises:
        BaseModelError: No such base, or an unknown family.
    """
    if name == TINY:
        return {}
    family, folder = _find_family(name)
    if folder is not None:
        file = folder / "transformer" / "config.json"
        return read_json_object(file, BaseModelError) if file.is_file() else {}
    part = next((base.components["transformer"] for base in family.published if "transformer" in base.components), None)
    return {} if part is None else part.config


def _find_family(name: FilePath) -> tuple[Family, Path | None]:
    """Returns the family of a base and, unless only its name is known, a folder with its configuration."""
    hub_id = split_hub_id(name)
    if hub_id is None:
        folder = resolve_base(name).folder
        return read_pipeline(folder)[0], folder
    from lora_engine.bases.hub import fetch_configuration

    repository, revision = hub_id
    try:
        folder = fetch_configuration(repository, revision)
    except BaseModelError:
        for family in families.values():
            if any(repository in names for names in family.licenses.values()) and family.is_supported:
                return family, None
        raise
    return read_pipeline(folder)[0], folder


def _native_resolution(folder: Path) -> int | None:
    """Returns the image size in pixels of a U-Net's latents; None if the files do not state it."""
    try:
        unet, vae = (read_json_object(folder / part / "config.json", BaseModelError) for part in ("unet", "vae"))
        factor = 1 << (len(vae["block_out_channels"]) - 1)
        return int(unet["sample_size"]) * factor
    except (FileNotFoundError, KeyError, TypeError):
        return None
