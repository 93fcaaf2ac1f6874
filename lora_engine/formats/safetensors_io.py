"""Reads and writes safetensors files: one canonical byte form, and a header that is checked before any tensor.

It handles tensors and strings, not adapters. It never runs code from a file and refuses pickles unread.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from safetensors import SafetensorError, safe_open

from lora_engine.documents import parse_json, place_of_key
from lora_engine.errors import AdapterError, EngineError
from lora_engine.files import FilePath, append_chunks, atomic_write, canonical_json, sha256_chunks
from lora_engine.finite import check_finite
from lora_engine.formats.dtypes import STORED_DTYPES, WRITTEN_DTYPES
from lora_engine.formats.mapped_tensor import MappedTensor, name_of_dtype
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# The safetensors library orders tensors by dtype in this order, then by name. The same order here gives the same body,
# so hashes over bodies (`sshs_model_hash`) agree.
_ORDER = {dtype: name for name, dtype in STORED_DTYPES.items()}
_RANK = {dtype: index for index, dtype in enumerate(_ORDER)}
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
BODY_SHA256 = "[the SHA-256 of the body]".center(64, "-")
"""Placeholder in a header for the digest of the body; has the digest's length, and the writer replaces it."""
_AGAIN = "save or download the file again"


@dataclass(frozen=True)
class Limits:
    """Limits on what a file may claim, against hostile files.

    Attributes:
        file: Bytes of the whole file.
        header: Bytes of the header.
        tensors: Number of tensors.
        name: Characters in a tensor's name.
    """

    file: int = 16 << 30
    header: int = 100_000_000
    tensors: int = 100_000
    name: int = 512


LIMITS = Limits()
Reader: TypeAlias = "Callable[[Path, Limits], tuple[dict[str, Tensor], dict[str, str]]]"
"""`read_safetensors` or `map_safetensors`."""


def write_safetensors(
    path: FilePath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, finite: bool = True
) -> None:
    """Writes a file atomically; equal tensors and metadata give equal bytes, in every process.

    Args:
        path: Output file.
        tensors: Tensors by name, on any device, of torch's plain dtypes (no complex numbers, no float8).
        metadata: Strings for the header; `BODY_SHA256` in them becomes the digest of the tensors' bytes.
        finite: False writes NaN and infinite values, too.

    Raises:
        AdapterError: A tensor has another dtype, or a value is NaN or infinite; nothing is written.
    """
    for name, tensor in tensors.items():
        if name_of_dtype(tensor) not in WRITTEN_DTYPES.values():
            allowed = ", ".join(f"torch.{dtype}" for dtype in WRITTEN_DTYPES.values())
            problem, where = f"the dtype is {tensor.dtype}", f"{path}: tensor {name!r}"
            raise AdapterError(problem, where=where, allowed=allowed, remedy="cast the tensor to one of these")
    if finite:
        check_finite(tensors, str(path))
    atomic_write(Path(path), lambda file: _write(file, tensors, metadata))


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    head, *body = serialize(tensors, metadata)
    if BODY_SHA256.encode() not in head:
        append_chunks(file, [head, *body])
        return
    # The header holds the digest of the body. Hash in a thread while the body is written, then patch the header.
    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(sha256_chunks, body)
        append_chunks(file, [head, *body])
    file.seek(0)
    file.write(bytes(head).replace(BODY_SHA256.encode(), digest.result().encode()))


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of the canonical file: length and header first, then each tensor's body."""
    names = sorted(tensors, key=lambda name: (_RANK[name_of_dtype(tensors[name])], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _ORDER[name_of_dtype(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        tensor = tensors[name]
        # Skips `detach` and `to` where possible, because a file has thousands of tensors.
        plain = tensor.detach() if tensor.requires_grad else tensor
        flat = (plain if plain.device.type == "cpu" else plain.to("cpu")).reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def short_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns the old digest of kohya and A1111: eight hex digits of 64 KiB of the file after the first MiB."""
    window, position, start, end = hashlib.sha256(), 0, 0x100000, 0x110000
    for chunk in serialize(tensors, metadata):
        window.update(chunk[max(0, start - position) : max(0, end - position)])
        position += len(chunk)
        if position >= end:
            break
    return window.hexdigest()[:8]


def read_safetensors(path: FilePath, limits: Limits = LIMITS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a file, after checking its header.

    Args:
        path: A regular file, or a link to one.
        limits: Limits on what it may claim.

    Raises:
        AdapterError: The file does not exist, is a pickle, not safetensors, truncated, or over a limit; names it.
    """
    return _read(path, limits, mmap.ACCESS_COPY, _torch_tensor)


def map_safetensors(path: FilePath, limits: Limits = LIMITS) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns what `read_safetensors` does, for recognition: with mapped tensors, and without importing torch.

    Raises:
        AdapterError: As `read_safetensors`.
    """
    return _read(path, limits, mmap.ACCESS_READ, MappedTensor.in_buffer)


def _read(
    path: FilePath, limits: Limits, access: int, view: Callable[[mmap.mmap, str, Sequence[int], int], Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    header, metadata = read_header(path, limits)
    try:
        with safe_open(path, framework="np"):  # checks that the tensors fill the file without gaps or overlaps
            pass
        with path.open("rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            mapped = mmap.mmap(file.fileno(), 0, access=access)
        tensors = {
            name: view(mapped, STORED_DTYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(f"the file cannot be read: {error}", where=str(path), remedy=_AGAIN) from error
    return tensors, metadata


def _torch_tensor(mapped: mmap.mmap, dtype_name: str, shape: Sequence[int], offset: int) -> Tensor:
    """Returns a tensor as a copy-on-write view of the mapped file; writes never reach the file or other readers."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def read_header(path: Path, limits: Limits = LIMITS) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the header entry of each tensor, and the metadata, without reading a tensor.

    Raises:
        AdapterError: As `read_safetensors`.
    """
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        raise AdapterError(problem, where=str(path), allowed="a .safetensors file", remedy="check the path")
    size = path.stat().st_size
    if size > limits.file:
        problem = f"the file has {size} bytes"
        raise AdapterError(problem, where=str(path), allowed=f"at most {limits.file}", remedy="check the file")
    with path.open("rb") as file:
        start = file.read(9)
        _refuse_pickle(path, start)
        refuse_gguf(path, start)
        file.seek(8)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else size
        if length > min(limits.header, size - 8):
            raise AdapterError(
                f"the header claims {length} bytes of the file's {size}: truncated, or no safetensors file",
                where=str(path),
                allowed=f"a safetensors file whose header has at most {limits.header} bytes",
                remedy=_AGAIN,
            )
        text = file.read(length)
    return _parse(path, text, limits)


def _refuse_pickle(path: Path, start: bytes) -> None:
    # The length of a safetensors header may begin with the same bytes, but a brace follows it.
    if path.suffix.lower() in _PICKLES or (start.startswith(_PICKLE_STARTS) and not start.endswith(b"{")):
        raise AdapterError(
            "a pickle file (.pt, .ckpt, .bin) can run code when it is read, so it is refused",
            where=str(path),
            allowed="a .safetensors file",
            remedy="ask its author for a .safetensors file",
        )


def refuse_gguf(path: Path, start: bytes, error: type[EngineError] = AdapterError) -> None:
    """Raises `error` if the first bytes of a file are those of GGUF.

    Raises:
        EngineError: An `error` with the file and the fix.
    """
    if start.startswith(b"GGUF"):
        raise error(
            "the file is GGUF, whose blocks of quantized weights are not read",
            where=str(path),
            allowed="a .safetensors file",
            remedy="use the bf16, fp16 or fp8 safetensors file of the same model",
        )


def _parse(path: Path, text: bytes, limits: Limits) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    try:
        header = parse_json(text, f"{path}: header", AdapterError, depth=None)
    except AdapterError as error:
        raise AdapterError(f"the header is broken: {error.problem}", where=error.where, remedy=_AGAIN) from error
    if not isinstance(header, dict):
        raise AdapterError("the header is not a JSON object", where=str(path), remedy=_AGAIN)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("the metadata are not strings by name", where=str(path), remedy=_AGAIN)
    if len(header) > limits.tensors:
        problem = f"the file holds {len(header)} tensors"
        raise AdapterError(problem, where=str(path), allowed=f"at most {limits.tensors}", remedy="check the file")
    for name, entry in header.items():
        check_tensor_name(path, name, limits)
        if not _is_valid(entry):
            raise AdapterError(
                f"the file cannot be read: the header has a broken entry for the tensor {name!r}",
                where=place_of_key(text.decode("utf-8-sig"), f"{path}: header", name),
                allowed="dtype, shape and two offsets of non-negative integers",
                remedy=_AGAIN,
            )
    return header, metadata


def _is_valid(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))


def check_tensor_name(path: Path, name: str, limits: Limits = LIMITS) -> None:
    """Raises an error for an invalid tensor name.

    Raises:
        AdapterError: It is empty or too long, has control or unprintable characters, or looks like a path.
    """
    if not 0 < len(name) <= limits.name or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise AdapterError(
            f"invalid tensor name {shown!r}",
            where=str(path),
            allowed=f"1 to {limits.name} printable characters, with no slash, backslash or double dot",
            remedy="do not use this file unless you know where it comes from",
        )
