"""Opening an original single file, safetensors or pickled, as byte ranges. Decides nothing about what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.checkpoints.tensor_files import StoredTensor, stored_tensors
from lora_engine.errors import BaseModelError
from lora_engine.formats.pickles import is_pickled, unpickled


@dataclass(frozen=True)
class OriginalFile:
    """An original single file while it is open.

    Attributes:
        path: As the caller gave it.
        tensors: By name, without the level `state_dict` of a `.ckpt`.
        metadata: Of a safetensors file.
        steps: `global_step` of a `.ckpt`.
        dropped: What a `.ckpt` held that was neither tensor nor plain value.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    steps: int | None = None
    dropped: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of its tensors."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@contextlib.contextmanager
def open_original(path: Path) -> Iterator[OriginalFile]:
    """An original file; a pickled one is read by a process of its own, and lies unpacked beside until the context ends.

    Raises:
        AdapterError: It cannot be read, or is refused.
        BaseModelError: No such file, or a pickle without a table of tensors.
    """
    if not path.is_file():
        raise BaseModelError("no such file", where=str(path), allowed="a .safetensors or .ckpt file", remedy="check it")
    if not is_pickled(path):
        tensors, metadata = stored_tensors(path)
        yield OriginalFile(path, tensors, metadata)
        return
    with unpickled(path) as found:
        stored = stored_tensors(found.tensors)[0]
        entries = _entries(found.content, path)
        inner = entries.get("state_dict")
        table = _entries(inner, path) if inner and "dict" in inner else entries
        named = {name: stored[node["tensor"]] for name, node in table.items() if "tensor" in node}
        steps = (entries.get("global_step") or {}).get("value")
        yield OriginalFile(path, named, {}, steps if isinstance(steps, int) else None, found.dropped)


def _entries(node: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    if "dict" not in node:
        raise BaseModelError("the file holds no table of tensors by name", where=str(path), allowed="a state dict")
    return {str(key): value for key, value in node["dict"]}
