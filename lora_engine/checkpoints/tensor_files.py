"""Reads safetensors headers as byte ranges, and writes files from byte ranges of other files.

Most of a checkpoint conversion is copying bytes: some rows are a byte range, and a 1x1 convolution has the bytes of the
linear layer. This module handles safetensors, not checkpoints.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.stored_tensor import SIZES, PlannedTensor, StoredTensor
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.finite import are_finite
from lora_engine.formats.safetensors_io import Limits, read_header

_RANK = {dtype: index for index, dtype in enumerate(SIZES)}
# Bytes per copy; small enough to stay in the CPU cache between reading and writing.
_BLOCK = 1 << 20
CHECKPOINT_LIMITS = Limits(file=128 << 30)


def stored_tensors(path: Path, limits: Limits = CHECKPOINT_LIMITS) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Returns the tensors of a safetensors file as byte ranges, and its metadata; reads no tensor.

    Args:
        path: The file.
        limits: What it may claim.

    Raises:
        AdapterError: No such file, a pickle, or over a limit.
        BaseModelError: A damaged file or a dtype that is not known.
    """
    header, metadata = read_header(path, limits)
    try:
        # The library checks that the tensors fill the file without gaps or overlaps.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseModelError(
            f"the file cannot be read: {error}", where=str(path), remedy="save or download the file again"
        ) from error
    unknown = sorted({str(entry["dtype"]) for entry in header.values()} - SIZES.keys())
    if unknown:
        raise BaseModelError(f"tensors of the dtype {unknown[0]!r}", where=str(path), allowed=", ".join(SIZES))
    start = 8 + _header_length(path)
    return {name: _stored(path, start, entry) for name, entry in header.items()}, metadata


def write_tensors(path: Path, planned: Mapping[str, PlannedTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically by copying from other files; holds at most a few `BLOCK`s in memory.

    Args:
        path: Output file.
        planned: Tensors by name. Equal plans over equal files give equal bytes.
        metadata: Strings for the header.

    Raises:
        BaseModelError: A value is NaN or infinite, except in tensors that no component needs; nothing is written.
    """
    names = sorted(planned, key=lambda name: (_RANK[planned[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = planned[name]
        end = offset + math.prod(tensor.shape) * SIZES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        with _Sources() as sources:
            for name in names:
                tensor = planned[name]
                for chunk in sources.read(tensor):
                    if not are_finite(chunk, tensor.dtype) and reason_unused(name) is None:
                        raise _not_finite(name, tensor)
                    file.write(chunk)

    atomic_write(path, write)


class _Sources:
    """The source files, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, FileIO] = {}
        self._buffer = memoryview(bytearray(_BLOCK))

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def read(self, tensor: PlannedTensor) -> Iterator[bytes | memoryview]:
        """Yields the bytes of a tensor in blocks; a block is valid only until the next one."""
        if tensor.source is not None:
            yield from tensor.source()
            return
        if not tensor.transposed:
            for piece in tensor.pieces:
                yield from self._values(piece, tensor.dtype)
            return
        (piece,) = tensor.pieces
        size = SIZES[tensor.dtype]
        whole = np.frombuffer(b"".join(map(bytes, self._values(piece, tensor.dtype))), dtype=np.dtype(f"V{size}"))
        transposed = whole.reshape(piece.shape).T
        step = max(1, _BLOCK // max(1, piece.shape[0] * size))
        for first in range(0, len(transposed), step):
            yield np.ascontiguousarray(transposed[first : first + step]).tobytes()

    def _values(self, piece: StoredTensor, dtype: str) -> Iterator[bytes | memoryview]:
        if piece.dtype == dtype and piece.scale is None:
            yield from self._blocks(piece)
            return
        from lora_engine.checkpoints.scales import Decoder  # needs torch, which copying bytes does not

        decoder = Decoder(piece, dtype)
        for first, end in decoder.row_blocks(_BLOCK):
            part = piece.rows(first, end) if piece.shape else piece
            yield decoder.decode(b"".join(map(bytes, self._blocks(part))), first)

    def _blocks(self, piece: StoredTensor) -> Iterator[memoryview]:
        file = self._open.get(piece.path)
        if file is None:
            file = self._open[piece.path] = FileIO(piece.path)
        file.seek(piece.offset)
        left = piece.size
        while left:
            block = self._buffer[: min(left, _BLOCK)]
            done = 0
            while done < len(block):
                count = file.readinto(block[done:])
                if not count:
                    raise BaseModelError("the file was truncated while it was read", where=str(piece.path))
                done += count
            yield block
            left -= done


def _not_finite(name: str, tensor: PlannedTensor) -> BaseModelError:
    return BaseModelError(
        f"values are NaN or infinite in {tensor.dtype}",
        where=", ".join([*sorted({str(piece.path) for piece in tensor.pieces}), f"tensor {name!r}"]),
        allowed="finite values",
        remedy="download or save the model again",
    )


def merge_stored(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Returns the tensors of several files (shards).

    Raises:
        BaseModelError: A tensor occurs in two of them.
    """
    merged: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in stored_tensors(path)[0].items():
            if name in merged:
                raise BaseModelError(f"the tensor {name!r} is in two files", where=f"{merged[name].path}, {path}")
            merged[name] = tensor
    return merged


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> StoredTensor:
    return StoredTensor(path, start + int(entry["data_offsets"][0]), str(entry["dtype"]), tuple(entry["shape"]))


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(8))[0])
