"""Opens an original single file, safetensors or pickled, as byte ranges, without recognizing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.checkpoints.quantization import weights_of
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.tensor_files import stored_tensors
from lora_engine.errors import BaseModelError
from lora_engine.formats.pickles import is_pickled, unpickled


@dataclass(frozen=True)
class OriginalFile:
    """An original single file while it is open.

    Attributes:
        path: Path of the file.
        tensors: Tensors by name, scaled weights with their scale; without the level `state_dict` of a `.ckpt`.
        metadata: Metadata of a safetensors file.
        steps: `global_step` of a `.ckpt`; None if absent.
        dropped: Objects in a `.ckpt` that were neither tensors nor plain values.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    steps: int | None = None
    dropped: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@contextlib.contextmanager
def open_original(path: Path) -> Iterator[OriginalFile]:
    """Yields an original file; a sandboxed process unpacks a pickle into a temporary file until the context ends.

    Raises:
        AdapterError: The file cannot be read, or is refused.
        BaseModelError: The file does not exist, is a pickle without a state dict, or has packed weights.
    """
    if not path.is_file():
        raise BaseModelError(
            "no such file", where=str(path), allowed="a .safetensors or .ckpt file", remedy="check the path"
        )
    if not is_pickled(path):
        tensors, metadata = stored_tensors(path)
        yield OriginalFile(path, weights_of(tensors), metadata)
        return
    with unpickled(path) as pickled:
        stored = stored_tensors(pickled.tensors)[0]
        entries = _entries(pickled.content, path)
        inner = entries.get("state_dict")
        table = _entries(inner, path) if inner and "dict" in inner else entries
        named = {name: stored[node["tensor"]] for name, node in table.items() if "tensor" in node}
        steps = (entries.get("global_step") or {}).get("value")
        yield OriginalFile(path, named, {}, steps if isinstance(steps, int) else None, pickled.dropped)


def _entries(node: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    if "dict" not in node:
        raise BaseModelError("the file holds no tensors by name", where=str(path), allowed="a state dict")
    return {str(key): value for key, value in node["dict"]}
