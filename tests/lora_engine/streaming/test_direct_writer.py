"""The direct writer writes all bytes in order, for pieces of any size."""

import mmap
import os
import random
from pathlib import Path

import pytest
import torch

from lora_engine.errors import BaseModelError
from lora_engine.streaming import direct_writer
from lora_engine.streaming.direct_writer import LARGEST, DirectWriter
from lora_engine.streaming.output import copy_whole

MEMORY = Path("/dev/shm")  # a file system without direct I/O


def outputs(tmp_path):
    return [tmp_path / "out", *([MEMORY / f"writer-{os.getpid()}"] if MEMORY.is_dir() else [])]


@pytest.mark.parametrize("direct", [True, False])
def test_pieces_of_any_size_arrive_in_order(direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr(direct_writer, "_DIRECT", 0)
    draw = random.Random(0)
    content = draw.randbytes(1 << 20)
    source = tmp_path / "source"
    source.write_bytes(content)
    for output in outputs(tmp_path):
        expected = bytearray()
        with output.open("wb") as file, source.open("rb") as read, DirectWriter(file.fileno()) as writer:
            for _ in range(150):
                first = draw.randrange(len(content))
                piece = content[first : first + draw.choice([0, 1, 7, 4096, 100_000, 1 << 20])]
                how = draw.randrange(3)
                if how == 0:
                    writer.write(piece)
                elif how == 1:
                    writer.copy(read.fileno(), first, first + len(piece))
                elif piece:
                    with writer.block(len(piece)) as block:
                        block.copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
                expected += piece
        assert output.read_bytes() == bytes(expected)
        output.unlink()


@pytest.mark.parametrize("before", [0, 8, 4095])
def test_bytes_with_the_same_page_offset_are_written_from_the_mapped_source(before, tmp_path, monkeypatch):
    content = random.Random(3).randbytes(9_000_001)
    source = tmp_path / "source"
    source.write_bytes(content)
    mapped = []
    copy_pages = DirectWriter._copy_pages
    monkeypatch.setattr(DirectWriter, "_copy_pages", lambda *args: mapped.append(copy_pages(*args)) or mapped[-1])
    with (tmp_path / "out").open("wb") as file, DirectWriter(file.fileno()) as writer:
        is_direct = writer._is_direct
        writer.write(content[:before])
        with source.open("rb") as read:
            writer.copy(read.fileno(), before, 5_000_000)
        with writer.block(1_000_000) as block:
            block.copy_(torch.frombuffer(bytearray(content[5_000_000:6_000_000]), dtype=torch.uint8))
        with source.open("rb") as read:
            writer.copy(read.fileno(), 6_000_000, len(content))
            writer.copy(read.fileno(), 5, len(content))
    assert (tmp_path / "out").read_bytes() == content + content[5:]
    assert mapped == ([True, True] if is_direct else [])


def test_a_source_that_is_truncated_during_the_write_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(bytes(8 << 20))
    real = mmap.mmap

    def map_and_truncate(descriptor, *args, **options):
        mapping = real(descriptor, *args, **options)
        if descriptor != -1:
            os.truncate(source, 4096)
        return mapping

    with (tmp_path / "out").open("wb") as file:
        writer = DirectWriter(file.fileno())
        if not writer._is_direct:
            pytest.skip("this file system has no direct I/O")
        monkeypatch.setattr(mmap, "mmap", map_and_truncate)
        with source.open("rb") as read, pytest.raises(BaseModelError, match="ended at byte"), writer:
            writer.copy(read.fileno(), 0, 8 << 20)


def test_more_bytes_than_the_buffer_are_written_and_not_offered_as_a_block(tmp_path):
    content = random.Random(1).randbytes(LARGEST + 12345)
    with (tmp_path / "out").open("wb") as file, DirectWriter(file.fileno()) as writer:
        writer.write(b"123")
        assert not writer.is_aligned(8, 2)
        writer.write(b"4")
        assert writer.is_aligned(8, 2)
        assert not writer.is_aligned(LARGEST + 2, 2)
        writer.write(content)
    assert (tmp_path / "out").read_bytes() == b"1234" + content


def test_a_source_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(b"1234")
    with (
        (tmp_path / "out").open("wb") as file,
        (tmp_path / "source").open("rb") as source,
        pytest.raises(BaseModelError, match="ended at byte 4"),
        DirectWriter(file.fileno()) as writer,
    ):
        writer.copy(source.fileno(), 0, 5)


def test_a_full_disk_raises_and_nothing_is_written_after_the_block():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("wb", buffering=0) as file:
        for size in (1, 3 * LARGEST):
            with pytest.raises(OSError, match="No space left"), DirectWriter(file.fileno()) as writer:
                writer.write(bytes(size))


@pytest.mark.parametrize("size", [0, 3, 300_001, 5 << 20])
def test_whole_files_are_copied(size, tmp_path):
    content = random.Random(2).randbytes(size)
    (tmp_path / "source").write_bytes(content)
    copy_whole(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
