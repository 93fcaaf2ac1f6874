"""Describes and checks files of adapters and models, and opens adapters.

Without norms and without a base, it imports no torch: the answer is in the header, and numpy checks the values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.files import is_present

if TYPE_CHECKING:
    from lora_engine.formats import Bundle


def inspect_adapter(file: Path, *, norms: bool = False, health: bool = False) -> dict[str, Any]:
    """Returns what `formats.inspect` does, with the norms and the health of the deltas by module if requested.

    Neither needs the base or its family. Both are None for a kind whose delta depends on the base's weight or shape.
    """
    from lora_engine.formats import inspect

    facts = inspect(file)
    if not (norms or health):
        return facts
    from lora_engine.formats.verbatim import read_deltas

    deltas = read_deltas(file)
    if norms:
        from lora_engine.merging.deltas import norm_of

        by_module = {name: norm_of(delta) for name, delta in deltas.items()}
        facts |= {"norms": by_module, "norm": math.hypot(*(norm for norm in by_module.values() if norm is not None))}
    if health:
        from lora_engine.evaluation.health import examine_adapter

        facts["health"] = {name: module.as_dict() for name, module in examine_adapter(deltas).items()}
    return facts


def check_file(file: Path, base: str | None) -> dict[str, Any]:
    """Validates an adapter, an embedding or a whole model.

    Returns:
        Counts of its modules, embeddings or tensors, and `assumed` if the file leaves something open.

    Raises:
        EngineError: The file is invalid, or does not match the base.
    """
    from lora_engine.checkpoints import inspect_checkpoint, is_checkpoint
    from lora_engine.formats.files import check

    if is_checkpoint(file):
        facts = inspect_checkpoint(file)
        if facts.get("problem"):
            raise BaseModelError(facts["problem"], where=str(file), remedy="download or save the model again")
        return {"tensors": sum(part["tensors"] for part in facts["components"].values())}
    bundle = check(file, module_shapes_of(base))
    if not bundle.adapter.modules:
        return {"embeddings": len(bundle.embeddings)}
    embeddings = {"embeddings": len(bundle.embeddings)} if bundle.embeddings else {}
    assumed = {"assumed": bundle.assumptions} if bundle.assumptions else {}
    return {"modules": len(bundle.adapter.modules)} | embeddings | assumed


def open_bundle(file: Path, base: str | None) -> Bundle:
    """Reads and validates an adapter file and its embeddings.

    Args:
        file: The file, or a PEFT folder.
        base: Base whose module names and shapes the file must match; None skips this check.

    Raises:
        AdapterError: The file is no valid adapter, or not for that base.
        BaseModelError: The base does not exist.
    """
    from lora_engine.formats import read_bundle

    return read_bundle(existing_file(file), module_shapes_of(base))


def existing_file(file: Path) -> Path:
    """Returns the path; raises `AdapterError` if nothing is there."""
    if not is_present(file):
        raise AdapterError("the file does not exist", where=str(file), remedy="check the path")
    return file


def module_shapes_of(base: str | None) -> dict[str, tuple[int, ...]] | None:
    """Returns the names and shapes of a base's layers, without reading weights; None if `base` is None."""
    if base is None:
        return None
    from lora_engine.bases.structure import base_module_shapes

    return base_module_shapes(base)
