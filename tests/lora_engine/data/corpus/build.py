"""Builds the files of a case, and states what becomes of them."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.lora_engine.data.conftest import make_image

Content = str | bytes | None | Callable[[Path], None]
"""Text, bytes, None for an image that no other file has, or a function that makes the file."""
Files = Mapping[str, Content]


@dataclass(frozen=True)
class Used:
    """An image that is used, with its captions and what the layout says about it."""

    caption: str = ""
    origin: str | None = None
    split: str = "train"
    repeats: int = 1
    has_mask: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unused:
    """An image that is quarantined; the reason has these words."""

    reason: str


@dataclass(frozen=True)
class Skipped:
    """An image that a dataset file leaves out; the reason has these words."""

    reason: str


@dataclass(frozen=True)
class Case:
    """A folder, or an archive if there is one file and `is_file`.

    Attributes:
        files: The files.
        images: Every possible image -> what becomes of it.
        faults: Other files that are reported -> words of the reason.
        layout: What the report says about the layout; None for nothing.
        logged: Words of a warning.
        error: Pattern of the refusal of the whole folder.
        settings: Those of ingest.
        is_file: True if the only file is given, not its folder.
    """

    files: Files
    images: Mapping[str, Used | Unused | Skipped] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    layout: str | None = None
    logged: str = ""
    error: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_file: bool = False


def used(caption: str, origin: str | None = None, **facts: Any) -> dict[str, Used | Unused | Skipped]:
    """The outcome of a folder with the single image `a.png`."""
    return {"a.png": Used(caption, origin, **facts)}


def build(root: Path, files: Files) -> Path:
    """Writes the files below a folder; sources of links are beside it."""
    root.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif content is None:
            path.write_bytes(png(number))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def png(seed: int = 0, width: int = 20, height: int = 16) -> bytes:
    return encode(make_image(width, height, seed), "PNG")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def outside(name: str, content: bytes) -> Callable[[Path], None]:
    """A link to a file beside the folder."""

    def make(path: Path) -> None:
        secret = path.parent.parent / name
        secret.write_bytes(content)
        path.symlink_to(secret)

    return make


def pipe(path: Path) -> None:
    os.mkfifo(path)


def flat_png(width: int, height: int, rows: int = 2) -> bytes:
    """A 1-bit PNG that claims a size, with few rows of data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    data = zlib.compress(bytes(1 + (width + 7) // 8) * rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tar(members: Mapping[str, bytes | tarfile.TarInfo], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def special(kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo("x")
    member.type, member.linkname, member.size = kind, target, size
    return member


def zipped(members: Mapping[str, bytes], *, unix_mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type, member.external_attr = method, unix_mode << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def parquet(columns: Mapping[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), buffer)
    return buffer.getvalue()


def arrow(columns: Mapping[str, list[Any]]) -> bytes:
    buffer = io.BytesIO()
    table = pa.table(dict(columns))
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


def shard(count: int, first: int = 0, **columns: list[Any]) -> bytes:
    """A table as Hugging Face's `push_to_hub` writes it."""
    images = [{"bytes": png(first + number), "path": f"{number}.png"} for number in range(count)]
    return parquet({"image": images, **columns})
