"""The way of a large file to the disk: gathered in two buffers, and written past the page cache where that is possible.

A file of gigabytes that is written through the page cache is copied once more by the kernel, and pushes everything else
out of the cache. One buffer is filled while the disk takes the other. What is only copied goes to the disk straight
from the pages of its file, a fifth of the work, where it lies in both files at the same place of a page. Knows bytes
alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lora_engine.errors import BaseModelError

# Of each of the two buffers.
_SIZE = 2 << 20
_DIRECT: int = getattr(os, "O_DIRECT", 0)
# Through the page cache: larger pieces make the kernel look for large pages, which often takes longer than filling.
_PIECE = 128 << 10
# Fewer bytes are sooner read than mapped.
_WORTH_MAPPING = 1 << 20
# Of a mapped file at once, since its pages count as memory of the process.
_WINDOW = 4 << 20
PAGE = 4096
"""What the memory, the place and the length of a direct write must be multiples of, on every common disk."""


class DirectWriter:
    """Appends to an open, empty file, within a `with` block; at its end, all is written, and no error was passed over.

    Args:
        output: Its descriptor; nothing was written to it yet.
    """

    def __init__(self, output: int) -> None:
        self._output = output
        self._buffers = (_Buffer(), _Buffer())
        self._used = 0
        self._before = 0  # bytes that were handed to the disk already
        self._disk = ThreadPoolExecutor(1)
        self._sent: list[Future[None]] = []
        self._set_direct(wanted=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whatever happens, nothing writes to the descriptor after the block, when it may be another file's.
        with self._disk:
            if error is None:
                self._finish()

    def write(self, content: bytes | memoryview) -> None:
        """Appends bytes."""
        view = memoryview(content)
        done = 0
        while done < len(view):
            count = min(len(view) - done, self._room(1))
            self._buffers[0].view[self._used : self._used + count] = view[done : done + count]
            self._used += count
            done += count

    def copy(self, source: int, first: int, last: int) -> None:
        """Appends the bytes from `first` up to and without `last` of an open file, which may be closed afterwards.

        Raises:
            BaseModelError: The file ends before. Where it is cut meanwhile, a later call may tell, or the block's end.
        """
        if self._is_direct and last - first >= _WORTH_MAPPING and (self._before + self._used - first) % PAGE == 0:
            edge, end = first + -first % PAGE, last - last % PAGE
            self._read(source, first, edge)
            first = end if self._copy_pages(source, edge, end) else edge
        self._read(source, first, last)

    def _copy_pages(self, source: int, first: int, last: int) -> bool:
        try:
            mapping = mmap.mmap(source, last - first, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError):  # a file system that maps nothing, larger pages, or a file that ends before
            return False
        self._flush()
        self._sent.append(self._disk.submit(self._send_pages, mapping, first))
        self._before += last - first
        return True

    def _read(self, source: int, first: int, last: int) -> None:
        while first < last:
            count = min(last - first, self._room(PAGE))
            read_bytes(source, self._buffers[0].view[self._used : self._used + count], first)
            self._used += count
            first += count

    @contextlib.contextmanager
    def block(self, size: int) -> Iterator[Tensor]:
        """The next bytes of the file as a uint8 tensor to be filled within the block; at most `LARGEST`."""
        self._room(size)
        yield self._buffers[0].tensor[self._used : self._used + size]
        self._used += size

    def is_aligned(self, size: int, itemsize: int) -> bool:
        """Whether the next `size` bytes can be had as numbers of so many bytes each."""
        self._room(min(size, LARGEST))
        return size <= LARGEST and self._used % itemsize == 0

    def _finish(self) -> None:
        self._flush()
        self._wait()
        self._set_direct(wanted=False)
        self._send(self._buffers[0].view[: self._used])

    def _room(self, size: int) -> int:
        if _SIZE - self._used < size:
            self._flush()
        return _SIZE - self._used

    def _flush(self) -> None:
        """Hands the whole pages of the filled buffer to the disk; the rest begins the other one."""
        self._wait()
        filled, free = self._buffers
        whole = self._used // PAGE * PAGE
        rest = self._used - whole
        free.view[:rest] = filled.view[whole : self._used]
        self._sent.append(self._disk.submit(self._send, filled.view[:whole]))
        self._before += whole
        self._buffers, self._used = (free, filled), rest

    def _wait(self) -> None:
        while self._sent:
            self._sent.pop(0).result()

    def _send_pages(self, mapping: mmap.mmap, first: int) -> None:
        # The mapping is left to be closed with its last view, which the frames of an error may still hold.
        view = memoryview(mapping)
        for begin in range(0, len(view), _WINDOW):
            window = view[begin : begin + _WINDOW]
            try:
                self._send(window)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                raise shorter_than(first + begin) from error  # where a mapped file was cut, there is no memory
            mapping.madvise(mmap.MADV_DONTNEED, begin, len(window))

    def _send(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            piece = len(view) if self._is_direct else done + _PIECE
            try:
                done += os.write(self._output, view[done:piece])
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(wanted=False)
            if done % PAGE:
                self._set_direct(wanted=False)

    def _set_direct(self, *, wanted: bool) -> None:
        self._is_direct = False
        if not _DIRECT:
            return
        flags = fcntl.fcntl(self._output, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # file systems in memory, and some over the network, cannot
            fcntl.fcntl(self._output, fcntl.F_SETFL, flags | _DIRECT if wanted else flags & ~_DIRECT)
            self._is_direct = wanted


class _Buffer:
    """Memory in large pages, seen as bytes and as numbers."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, _SIZE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


def read_bytes(source: int, view: memoryview, offset: int) -> None:
    """Fills a view with the bytes of an open file from an offset on.

    Raises:
        BaseModelError: The file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], offset + done)
        if count == 0:
            raise shorter_than(offset + done)
        done += count


def shorter_than(place: int) -> BaseModelError:
    """The error for a file that ends at a place where it should go on."""
    return BaseModelError(f"a file ended at byte {place} while it was read", remedy="see who changes it, and try again")


LARGEST = _SIZE - PAGE
"""Bytes of the largest block."""
