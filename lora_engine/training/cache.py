"""Tensors that are costly to make, kept by content in a folder, and in memory as far as a budget goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats.safetensors_io import write_safetensors

_log = logging.getLogger(__name__)


class TensorCache:
    """Named tensors under a key that says everything they depend on.

    Args:
        folder: Where they lie; made when the first is written.
        budget: Bytes that are also held in memory; the rest is read again when it is needed.
    """

    def __init__(self, folder: Path, *, budget: int = 1 << 30) -> None:
        self._folder, self._budget = folder, budget
        self._held: dict[str, Mapping[str, Tensor]] = {}

    def get(self, key: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of a key, on the CPU; made, and written, where they are not there.

        Args:
            key: JSON values: digests, texts, sizes.
            make: Gives the tensors; a pure function of the key.
        """
        name = sha256_bytes(canonical_json(key))
        held = self._held.get(name)
        if held is None:
            held = self._read(name) or self._write(name, make())
            size = sum(value.nbytes for value in held.values())
            if size <= self._budget:
                self._budget -= size
                self._held[name] = held
        return held

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Mapping[str, Tensor] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            found: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            _log.warning("%s cannot be read (%s) and is made again", path, error)
            return None
        return found

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        write_safetensors(self._path(name), plain, {})
        return plain
