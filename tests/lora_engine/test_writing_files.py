"""Appending chunks to files and writing them atomically."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from lora_engine.errors import EngineError
from lora_engine.files import append_chunks, atomic_write, is_file_name, write_within


def test_chunks_of_every_size_are_appended_in_order(tmp_path: Path) -> None:
    draw = random.Random(0)
    pieces = [draw.randbytes(size) for size in (0, 1, 7, 4095, 1 << 20, (9 << 20) + 5, 3)]
    chunks = [piece if index % 2 else memoryview(piece) for index, piece in enumerate(pieces)]
    atomic_write(tmp_path / "out", lambda file: append_chunks(file, chunks))
    assert (tmp_path / "out").read_bytes() == b"".join(pieces)


def test_earlier_and_later_writes_keep_their_positions(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        file.write(b"first ")
        append_chunks(file, [b"second "])
        file.write(b"third")
        file.seek(0)
        file.write(b"FIRST")
    assert (tmp_path / "out").read_bytes() == b"FIRST second third"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: plain(descriptor, view[:1000]))
    content = random.Random(1).randbytes(12345)
    with (tmp_path / "out").open("wb") as file:
        append_chunks(file, [content])
    assert (tmp_path / "out").read_bytes() == content


def test_without_posix_fadvise_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    content = random.Random(2).randbytes(9 << 20)
    with (tmp_path / "out").open("wb") as file:
        append_chunks(file, [content])
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_raises_an_error() -> None:
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb") as file:
        append_chunks(file, [bytes(10)])


def test_a_write_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.mkdir()
    (out / "link").symlink_to(victim)
    (victim / "mine").write_bytes(b"mine")
    (out / "file").symlink_to(victim / "mine")
    with write_within(out):
        for path in (victim / "x", out / ".." / "victim" / "x", out / "link" / "x", out / "new" / ".." / ".." / "x"):
            with pytest.raises(EngineError, match="outside of the output"):
                atomic_write(path, b"x")
        with write_within(out / "new"), pytest.raises(EngineError, match="outside of the output"):
            atomic_write(out / "x", b"x")
        atomic_write(out / "new" / "x", b"x")
        atomic_write(out / "file", b"a link to a file is replaced")
    assert (victim / "mine").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "mine", "new", "out", "victim", "x"]
    atomic_write(victim / "x", b"x")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "\u202ea", "é" * 128])
def test_paths_and_unprintable_names_are_no_names_of_files(name: str) -> None:
    assert not is_file_name(name)
    assert is_file_name("..a b-é.safetensors")


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    name = "\U0001f300" * 63
    assert is_file_name(name)
    atomic_write(tmp_path / name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
