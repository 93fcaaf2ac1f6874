"""Caches expensive tensors by content: in a folder, and in memory up to a budget.

Concurrent runs may share a folder. A file is named by a digest of its key, written atomically, and used only if its
content matches its digest.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json, sha256_bytes, sha256_chunks
from lora_engine.formats.safetensors_io import read_safetensors, serialize, write_safetensors

_log = logging.getLogger(__name__)
# Age from which an unfinished file belongs to a killed writer; seconds.
_ABANDONED = 24 * 3600.0


class TensorCache:
    """Named tensors under a key of everything that they depend on.

    Args:
        folder: Folder of the files; created by the first write.
        budget: Bytes also held in memory; the least recently used tensors are evicted.
    """

    def __init__(self, folder: Path, *, budget: int = 1 << 30) -> None:
        self._folder, self._budget, self._size = folder, budget, 0
        self._memory: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def get(
        self, key: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]], *, keep: bool = True
    ) -> Mapping[str, Tensor]:
        """Returns the tensors of a key, on the CPU; computes missing ones.

        Args:
            key: JSON values: digests, texts, sizes.
            make: Computes the tensors; a pure function of the key.
            keep: Writes the tensors into the folder; False is for those that other runs hardly need.
        """
        name = sha256_bytes(canonical_json(key))
        cached = self._memory.get(name)
        if cached is not None:
            self._memory.move_to_end(name)
            return cached
        tensors = self._read(name) if keep else None
        if tensors is None:
            tensors = {part: value.detach().cpu().contiguous().clone() for part, value in make().items()}
            if keep:
                write_safetensors(self._path(name), tensors, {"key": name, "sha256": _digest(tensors)})
        self._keep_in_memory(name, tensors)
        return tensors

    def has(self, key: Mapping[str, object]) -> bool:
        """Returns True if the tensors of a key are in memory or in the folder; does not check the file."""
        name = sha256_bytes(canonical_json(key))
        return name in self._memory or self._path(name).is_file()

    def _keep_in_memory(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        size = _bytes(tensors)
        if size > self._budget:
            return
        self._memory[name] = tensors
        self._size += size
        while self._size > self._budget:
            self._size -= _bytes(self._memory.popitem(last=False)[1])

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Mapping[str, Tensor] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_safetensors(path)
            # `prune` removes files by the time of their last use.
            os.utime(path)
        except (OSError, AdapterError) as error:
            _log.warning("%s cannot be read (%s) and is computed again", path, error)
            return None
        if metadata.get("key") != name or metadata.get("sha256") != _digest(tensors):
            _log.warning("%s is damaged and is computed again", path)
            return None
        # Cloned, since CPU kernels round by alignment in memory, and a file guarantees none.
        return {part: value.clone() for part, value in tensors.items()}


def prune(cache: Path, size: int) -> int:
    """Deletes the least recently used files until at most `size` bytes remain; returns the bytes deleted.

    Concurrent runs recompute what they miss. Unfinished files of killed writers are deleted too.

    Args:
        cache: A folder with the folders of any number of `TensorCache`.
        size: Bytes that may remain.
    """
    files: list[tuple[float, int, Path]] = []
    removed, now = 0, time.time()
    for path in sorted(cache.rglob("*")):
        try:
            status = path.lstat()
        except FileNotFoundError:  # deleted by another run
            continue
        if not stat.S_ISREG(status.st_mode):
            continue
        if path.suffix == ".safetensors":
            files.append((status.st_mtime, status.st_size, path))
        elif path.suffix == ".partial" and now - status.st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
            removed += status.st_size
    left = sum(length for _, length, _ in files)
    for _, length, path in sorted(files):
        if left <= size:
            break
        path.unlink(missing_ok=True)
        left, removed = left - length, removed + length
    return removed


def _digest(tensors: Mapping[str, Tensor]) -> str:
    # Includes names, dtypes and shapes, but not the header that holds the digest.
    return sha256_chunks(serialize(tensors, {}))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
