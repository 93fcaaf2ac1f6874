"""Returns the names and shapes of a base's layers without loading weights, for the adapter formats."""

from __future__ import annotations

import os
from pathlib import Path

from lora_engine.adapters.published import empty_module, published_module_shapes
from lora_engine.bases.source import resolve_base, split_hub_id
from lora_engine.checkpoints.folder import read_json
from lora_engine.errors import BaseModelError
from lora_engine.families import ComponentConfig, published
from lora_engine.families.layout import read_pipeline
from lora_engine.files import FilePath

_PREFIXES = ("unet", "transformer", "text_encoder")


def base_module_shapes(base: FilePath) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape by canonical name for every adaptable layer of a base.

    Args:
        base: A published architecture (`sd15`, `sdxl`, ...), or a name for `resolve_base`. Of a hub id that is not
            cached, only the configurations are downloaded.

    Raises:
        BaseModelError: No such base, or its configuration cannot be read.
    """
    base = os.fspath(base)
    if base in published:
        return published_module_shapes(base)
    try:
        folder = _find_folder(base)
        family, _, index = read_pipeline(folder)
    except BaseModelError as error:
        names = ", ".join(sorted(published))
        raise BaseModelError(
            error.problem, where=error.where, allowed=f"{names}; {error.allowed}", remedy=error.remedy
        ) from error
    from lora_engine.adapters.tree import DictTree, module_shapes  # imports torch

    modules = {}
    for name, entry in sorted(index.items()):
        if name.startswith(_PREFIXES) and isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
            config = read_json(folder / name / "config.json")
            modules[name] = empty_module(ComponentConfig(entry[0], entry[1], config))
    return module_shapes(DictTree(modules, family.name))


def _find_folder(base: str) -> Path:
    hub_id = split_hub_id(base)
    if hub_id is None:
        return resolve_base(base).folder
    from lora_engine.bases.hub import fetch_configuration

    return fetch_configuration(*hub_id)
