"""Tensors that are costly to make, kept by content in a folder, and in memory as far as a budget goes.

Several runs, at the same time too, may share a folder: a file is named after all that its tensors depend on, appears
whole or not at all, and is believed only where it proves to hold what was written.
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
# A writer that was killed leaves its unfinished file behind; none takes this long.
_ABANDONED = 24 * 3600.0


class TensorCache:
    """Named tensors under a key that says everything they depend on.

    Args:
        folder: Where they lie; made when the first is written.
        budget: Bytes that are also held in memory; what was not used for longest makes room.
    """

    def __init__(self, folder: Path, *, budget: int = 1 << 30) -> None:
        self._folder, self._budget, self._size = folder, budget, 0
        self._held: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def get(
        self, key: Mapping[str, object], make: Callable[[], Mapping[str, Tensor]], *, keep: bool = True
    ) -> Mapping[str, Tensor]:
        """The tensors of a key, on the CPU; made where they are not there.

        Args:
            key: JSON values: digests, texts, sizes.
            make: Gives the tensors; a pure function of the key.
            keep: Whether they are written into the folder; False is for what will hardly be asked for by another run.
        """
        name = sha256_bytes(canonical_json(key))
        held = self._held.get(name)
        if held is not None:
            self._held.move_to_end(name)
            return held
        found = self._read(name) if keep else None
        if found is None:
            found = {part: value.detach().cpu().contiguous().clone() for part, value in make().items()}
            if keep:
                write_safetensors(self._path(name), found, {"key": name, "sha256": _digest(found)})
        self._hold(name, found)
        return found

    def _hold(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        size = _bytes(tensors)
        if size > self._budget:
            return
        self._held[name] = tensors
        self._size += size
        while self._size > self._budget:
            self._size -= _bytes(self._held.popitem(last=False)[1])

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Mapping[str, Tensor] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            found, about = read_safetensors(path)
            # The time of its last use, by which `prune` goes.
            os.utime(path)
        except (OSError, AdapterError) as error:
            _log.warning("%s cannot be read (%s) and is made again", path, error)
            return None
        if about.get("key") != name or about.get("sha256") != _digest(found):
            _log.warning("%s is damaged and is made again", path)
            return None
        # Copied, since a CPU's kernels round by where numbers lie, and a file puts them anywhere.
        return {part: value.clone() for part, value in found.items()}


def prune(cache: Path, size: int) -> int:
    """Removes what was not used for longest until the rest is at most so large; gives the bytes that were removed.

    Runs that use the folder meanwhile make again what they miss. What killed writers left behind goes, too.

    Args:
        cache: A folder with the folders of any number of `TensorCache`.
        size: Bytes that may stay.
    """
    found: list[tuple[float, int, Path]] = []
    removed, now = 0, time.time()
    for path in sorted(cache.rglob("*")):
        try:
            about = path.lstat()
        except FileNotFoundError:  # another run was quicker
            continue
        if not stat.S_ISREG(about.st_mode):
            continue
        if path.suffix == ".safetensors":
            found.append((about.st_mtime, about.st_size, path))
        elif path.suffix == ".partial" and now - about.st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
            removed += about.st_size
    left = sum(length for _, length, _ in found)
    for _, length, path in sorted(found):
        if left <= size:
            break
        path.unlink(missing_ok=True)
        left, removed = left - length, removed + length
    return removed


def _digest(tensors: Mapping[str, Tensor]) -> str:
    # Over names, types and shapes as well: all that is in a file but for what the digest stands in.
    return sha256_chunks(serialize(tensors, {}))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
