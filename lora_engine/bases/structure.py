"""Returns the names and shapes of a base's layers without loading weights, for the adapter formats."""

from __future__ import annotations

import os

from lora_engine.adapters.published import empty_module, published_module_shapes
from lora_engine.bases.source import resolve_base
from lora_engine.checkpoints.folder import read_json
from lora_engine.errors import BaseModelError
from lora_engine.families import ComponentConfig, published
from lora_engine.files import FilePath

_PREFIXES = ("unet", "transformer", "text_encoder")


def base_module_shapes(base: FilePath) -> dict[str, tuple[int, ...]]:
    """Returns the weight shape by canonical name for every adaptable layer of a base.

    Args:
        base: A published architecture (`sd15`, `sdxl`, ...), or a name for `resolve_base`.

    Raises:
        BaseModelError: No such base, or its configuration cannot be read.
    """
    base = os.fspath(base)
    if base in published:
        return published_module_shapes(base)
    try:
        source = resolve_base(base)
    except BaseModelError as error:
        names = ", ".join(sorted(published))
        raise BaseModelError(
            error.problem, where=error.where, allowed=f"{names}; {error.allowed}", remedy=error.remedy
        ) from error
    from lora_engine.adapters.tree import DictTree, module_shapes  # imports torch

    modules = {}
    for name, entry in sorted(source.layout.index.items()):
        if name.startswith(_PREFIXES) and isinstance(entry, list) and entry[0] in ("diffusers", "transformers"):
            config = read_json(source.folder / name / "config.json")
            modules[name] = empty_module(ComponentConfig(entry[0], entry[1], config))
    return module_shapes(DictTree(modules, source.family))
