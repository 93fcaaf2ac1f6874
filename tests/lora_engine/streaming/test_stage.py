"""What goes through the stage comes out on the disk, byte for byte, however it is cut."""

import mmap
import os
import random
from pathlib import Path

import pytest
import torch

from lora_engine.errors import BaseModelError
from lora_engine.streaming import direct_writer as stages
from lora_engine.streaming.blocks import copy_file
from lora_engine.streaming.direct_writer import LARGEST, DirectWriter

MEMORY = Path("/dev/shm")  # a file system that cannot write past the page cache


def places(tmp_path):
    return [tmp_path / "out", *([MEMORY / f"stage-{os.getpid()}"] if MEMORY.is_dir() else [])]


@pytest.mark.parametrize("direct", [True, False])
def test_pieces_of_any_size_arrive_in_order(direct, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr(stages, "_DIRECT", 0)
    draw = random.Random(0)
    content = draw.randbytes(1 << 20)
    source = tmp_path / "source"
    source.write_bytes(content)
    for place in places(tmp_path):
        expected = bytearray()
        with place.open("wb") as file, source.open("rb") as read, DirectWriter(file.fileno()) as stage:
            for _ in range(150):
                first = draw.randrange(len(content))
                piece = content[first : first + draw.choice([0, 1, 7, 4096, 100_000, 1 << 20])]
                how = draw.randrange(3)
                if how == 0:
                    stage.write(piece)
                elif how == 1:
                    stage.copy(read.fileno(), first, first + len(piece))
                elif piece:
                    with stage.block(len(piece)) as block:
                        block.copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
                expected += piece
        assert place.read_bytes() == bytes(expected)
        place.unlink()


@pytest.mark.parametrize("before", [0, 8, 4095])
def test_what_lies_at_the_same_place_of_a_page_goes_from_the_pages_of_its_file(before, tmp_path, monkeypatch):
    content = random.Random(3).randbytes(9_000_001)
    source = tmp_path / "source"
    source.write_bytes(content)
    went = []
    by_pages = DirectWriter._copy_pages
    monkeypatch.setattr(DirectWriter, "_copy_pages", lambda *given: went.append(by_pages(*given)) or went[-1])
    with (tmp_path / "out").open("wb") as file, DirectWriter(file.fileno()) as stage:
        is_direct = stage._is_direct
        stage.write(content[:before])
        with source.open("rb") as read:
            stage.copy(read.fileno(), before, 5_000_000)
        with stage.block(1_000_000) as block:
            block.copy_(torch.frombuffer(bytearray(content[5_000_000:6_000_000]), dtype=torch.uint8))
        with source.open("rb") as read:
            stage.copy(read.fileno(), 6_000_000, len(content))
            stage.copy(read.fileno(), 5, len(content))
    assert (tmp_path / "out").read_bytes() == content + content[5:]
    assert went == ([True, True] if is_direct else [])


def test_a_source_that_is_cut_while_its_pages_are_written_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(bytes(8 << 20))
    real = mmap.mmap

    def mapped_and_cut(descriptor, *given, **options):
        mapping = real(descriptor, *given, **options)
        if descriptor != -1:
            os.truncate(source, 4096)
        return mapping

    with (tmp_path / "out").open("wb") as file:
        stage = DirectWriter(file.fileno())
        if not stage._is_direct:
            pytest.skip("this file system cannot write past the page cache")
        monkeypatch.setattr(mmap, "mmap", mapped_and_cut)
        with source.open("rb") as read, pytest.raises(BaseModelError, match="ended at byte"), stage:
            stage.copy(read.fileno(), 0, 8 << 20)


def test_more_than_the_stage_holds_is_written_and_not_offered_as_a_block(tmp_path):
    content = random.Random(1).randbytes(LARGEST + 12345)
    with (tmp_path / "out").open("wb") as file, DirectWriter(file.fileno()) as stage:
        stage.write(b"123")
        assert not stage.is_aligned(8, 2)
        stage.write(b"4")
        assert stage.is_aligned(8, 2)
        assert not stage.is_aligned(LARGEST + 2, 2)
        stage.write(content)
    assert (tmp_path / "out").read_bytes() == b"1234" + content


def test_a_source_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(b"1234")
    with (
        (tmp_path / "out").open("wb") as file,
        (tmp_path / "source").open("rb") as source,
        pytest.raises(BaseModelError, match="ended at byte 4"),
        DirectWriter(file.fileno()) as stage,
    ):
        stage.copy(source.fileno(), 0, 5)


def test_a_disk_that_takes_no_more_is_told_of_and_nothing_is_written_after_the_block():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("wb", buffering=0) as file:
        for size in (1, 3 * LARGEST):
            with pytest.raises(OSError, match="No space left"), DirectWriter(file.fileno()) as stage:
                stage.write(bytes(size))


def test_whole_files_are_copied(tmp_path):
    content = random.Random(2).randbytes(300_001)
    (tmp_path / "source").write_bytes(content)
    with (tmp_path / "out").open("wb") as file:
        copy_file(tmp_path / "source", file.fileno())
    assert (tmp_path / "out").read_bytes() == content
