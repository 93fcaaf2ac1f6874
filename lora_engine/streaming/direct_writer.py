"""Writes large files with two buffers, and with direct I/O if the file system supports it.

The page cache would copy a file of gigabytes once more, and evict everything else. One buffer is filled while the other
is written. Copied bytes are written from a mapping of their file, for a fifth of the CPU time, if their offset within a
page is the same in both files. Knows only bytes.
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

# Bytes of each of the two buffers.
_SIZE = 2 << 20
_DIRECT: int = getattr(os, "O_DIRECT", 0)
# For writes through the page cache. With larger pieces the kernel searches for huge pages, which often takes longer.
_PIECE = 128 << 10
# Reading fewer bytes is faster than mapping them.
_WORTH_MAPPING = 1 << 20
# Bytes of a mapped file at a time, because its pages count as memory of the process.
_WINDOW = 4 << 20
PAGE = 4096
"""Alignment of memory address, offset and length of a direct write, sufficient for every common disk."""


class DirectWriter:
    """Appends to an open, empty file within a `with` block, whose end writes all bytes and raises pending errors.

    Args:
        output: File descriptor, with nothing written yet.
    """

    def __init__(self, output: int) -> None:
        self._output = output
        self._buffers = (_Buffer(), _Buffer())
        self._used = 0
        self._submitted = 0  # bytes
        self._disk = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []
        self._set_direct(enabled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing may write to the descriptor after the block: it may then belong to another file.
        with self._disk:
            if error is None:
                self._finish()

    def write(self, content: bytes | memoryview) -> None:
        """Appends bytes to the file."""
        view = memoryview(content)
        done = 0
        while done < len(view):
            count = min(len(view) - done, self._free_bytes(1))
            self._buffers[0].view[self._used : self._used + count] = view[done : done + count]
            self._used += count
            done += count

    def copy(self, source: int, first: int, last: int) -> None:
        """Appends the bytes from `first` to `last` (exclusive) of an open file, which may be closed afterwards.

        Raises:
            BaseModelError: The file is too short. If it is truncated during the write, a later call or the end of the
                block raises.
        """
        if self._is_direct and last - first >= _WORTH_MAPPING and (self._submitted + self._used - first) % PAGE == 0:
            start, end = first + -first % PAGE, last - last % PAGE
            self._read(source, first, start)
            first = end if self._copy_pages(source, start, end) else start
        self._read(source, first, last)

    def _copy_pages(self, source: int, first: int, last: int) -> bool:
        try:
            mapping = mmap.mmap(source, last - first, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError):  # no support for mappings, larger pages, or a file that is too short
            return False
        self._flush()
        self._pending.append(self._disk.submit(self._send_pages, mapping, first))
        self._submitted += last - first
        return True

    def _read(self, source: int, first: int, last: int) -> None:
        while first < last:
            count = min(last - first, self._free_bytes(PAGE))
            read_bytes(source, self._buffers[0].view[self._used : self._used + count], first)
            self._used += count
            first += count

    @contextlib.contextmanager
    def block(self, size: int) -> Iterator[Tensor]:
        """Yields the next bytes of the file as a uint8 tensor to fill; `size` is at most `LARGEST`."""
        self._free_bytes(size)
        yield self._buffers[0].tensor[self._used : self._used + size]
        self._used += size

    def is_aligned(self, size: int, itemsize: int) -> bool:
        """Returns True if `block(size)` can be viewed as numbers of `itemsize` bytes."""
        self._free_bytes(min(size, LARGEST))
        return size <= LARGEST and self._used % itemsize == 0

    def _finish(self) -> None:
        self._flush()
        self._wait()
        self._set_direct(enabled=False)
        self._send(self._buffers[0].view[: self._used])

    def _free_bytes(self, size: int) -> int:
        """Returns the free bytes of the buffer; flushes it first if fewer than `size` are free."""
        if _SIZE - self._used < size:
            self._flush()
        return _SIZE - self._used

    def _flush(self) -> None:
        """Submits the full pages of the filled buffer, and moves the rest to the other buffer."""
        self._wait()
        filled, free = self._buffers
        size = self._used // PAGE * PAGE
        rest = self._used - size
        free.view[:rest] = filled.view[size : self._used]
        self._pending.append(self._disk.submit(self._send, filled.view[:size]))
        self._submitted += size
        self._buffers, self._used = (free, filled), rest

    def _wait(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def _send_pages(self, mapping: mmap.mmap, first: int) -> None:
        # Not closed explicitly: the frames of an error may still hold a view. The last view closes it.
        view = memoryview(mapping)
        for start in range(0, len(view), _WINDOW):
            window = view[start : start + _WINDOW]
            try:
                self._send(window)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                raise shorter_than(first + start) from error  # the mapped file was truncated
            mapping.madvise(mmap.MADV_DONTNEED, start, len(window))

    def _send(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            piece = len(view) if self._is_direct else done + _PIECE
            try:
                done += os.write(self._output, view[done:piece])
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._set_direct(enabled=False)
            if done % PAGE:
                self._set_direct(enabled=False)

    def _set_direct(self, *, enabled: bool) -> None:
        self._is_direct = False
        if not _DIRECT:
            return
        flags = fcntl.fcntl(self._output, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # not supported by tmpfs and some network file systems
            fcntl.fcntl(self._output, fcntl.F_SETFL, flags | _DIRECT if enabled else flags & ~_DIRECT)
            self._is_direct = enabled


class _Buffer:
    """Memory in huge pages, with views as bytes and as a tensor."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, _SIZE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


def read_bytes(source: int, view: memoryview, offset: int) -> None:
    """Fills a view with the bytes of an open file, starting at an offset.

    Raises:
        BaseModelError: The file is too short.
    """
    done = 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], offset + done)
        if count == 0:
            raise shorter_than(offset + done)
        done += count


def shorter_than(offset: int) -> BaseModelError:
    """Returns the error for a file that ends before the expected end."""
    return BaseModelError(
        f"a file ended at byte {offset} while it was read", remedy="check which process changes it, and try again"
    )


LARGEST = _SIZE - PAGE
"""Maximum size of a block in bytes."""
