"""Bounds on one input: processor time, memory and the places that it writes."""

from __future__ import annotations

import getpass
import os
import resource
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.support.listener import shared_listener

SECONDS = 10.0
"""Processor time of one input; that of other processes does not count."""
MEMORY = 4 << 30
"""Bytes of address space that one input may add."""


class TooSlow(BaseException):
    """An input took longer than `SECONDS`. Not an `Exception`, so that no reader catches it."""


@contextmanager
def bounded_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raises `TooSlow` after that much processor time of this process; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"an input took more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def bounded_memory(size: int = MEMORY) -> Iterator[None]:
    """Lets allocations fail that add more than that to this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def reset_peak() -> None:
    """Starts a new measurement of `peak_memory`."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the most resident memory of this process in bytes since `reset_peak`; children are left out."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@contextmanager
def bounded(place: Path) -> Iterator[Path]:
    """Bounds time, memory and writes of what runs in the block; yields a new folder, the only one to write to.

    Warnings are errors, as in all tests.

    Raises:
        TooSlow: The block took too long.
        AssertionError: It wrote elsewhere.
    """
    output = place / "out"
    output.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(output)
    try:
        with (
            warnings.catch_warnings(),
            shared_listener().listen() as paths,
            bounded_memory(),
            bounded_time(),
        ):
            warnings.simplefilter("error")
            yield output
    finally:
        tempfile.tempdir = before
    # The import of model classes, which follows from some inputs, makes the folder of torch's compiler.
    compiled = Path(tempfile.gettempdir()).resolve() / f"torchinductor_{getpass.getuser()}"
    allowed = (output.resolve(), compiled, Path("/proc"))
    outside = sorted(
        {str(path) for path in paths if not _is_device(path) and not any(map(path.is_relative_to, allowed))}
    )
    assert not outside, f"wrote outside of its output: {outside[:3]}"


def _is_device(path: Path) -> bool:
    """Returns True below /dev, but not in its memory, where folders of tests may be."""
    return path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")


def clear(place: Path) -> None:
    """Deletes what an input left, so that the next one starts with nothing."""
    shutil.rmtree(place, ignore_errors=True)
