"""Limits how many trainings use one device at the same time, over all processes of a home.

A slot is a lock on a file of the home. Child processes that compute inherit the lock, and the system releases it when
the last of them ends. A killed run therefore occupies its device until its children have ended.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from lora_engine.errors import InterruptedRun
from registry.home import Home
from tasks.progress import StepEvent, publish, stop_requested

POLL = 0.2
"""Seconds between two attempts to take a slot."""
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9.]+")


@contextmanager
def device_slots(home: Home, limits: Mapping[str, int], step: str) -> Iterator[tuple[int, ...]]:
    """Holds one slot of each device inside a `with` block; waits for devices without a free slot.

    Publishes the wait as an event of the step. Takes devices in the order of their names, which prevents deadlocks of
    steps that need several.

    Args:
        home: The home whose processes share the slots.
        limits: Device name -> maximum number of holders, this one included.
        step: Name of the step that waits.

    Yields:
        The file descriptors of the locks, for `subprocess.Popen(pass_fds=...)`.

    Raises:
        InterruptedRun: A stop was requested while it waited.
    """
    with ExitStack() as stack:
        slots = [
            device_slot(home, device, limits[device], on_wait=partial(_publish_wait, step, device), where=step)
            for device in sorted(limits)
        ]
        yield tuple(stack.enter_context(slot) for slot in slots)


@contextmanager
def gpu_slot(home: Home, device: str, limit: int | None, step: str) -> Iterator[None]:
    """Holds a slot of the GPU on which a step of this process runs a model; waits for one as a training does.

    Nothing waits for a CPU, where such steps and trainings slow each other down but do not exhaust the memory.

    Args:
        home: The home whose processes share the slots.
        device: `auto` for the fastest device, or the type of a device.
        limit: Maximum number of holders; None means 1, as for trainings.
        step: Name of the step that waits.

    Raises:
        InterruptedRun: A stop was requested while it waited.
    """
    from lora_engine.bases.base import default_device, visible_gpus

    chosen = default_device() if device == "auto" else device
    names = visible_gpus(1) if chosen == "cuda" else (chosen,) if chosen == "mps" else ()
    with device_slots(home, dict.fromkeys(names, limit or 1), step):
        yield


@contextmanager
def device_slot(
    home: Home, device: str, limit: int, *, on_wait: Callable[[], None] = lambda: None, where: str = ""
) -> Iterator[int]:
    """Holds one slot of a device inside a `with` block.

    Args:
        home: The home whose processes share the slots.
        device: Any name; equal names mean the same device.
        limit: Maximum number of holders, this one included; at least 1.
        on_wait: Called once if it must wait.
        where: Name of the step that waits, for the error.

    Yields:
        The file descriptor of the lock; a process that inherits it holds the slot too.

    Raises:
        InterruptedRun: A stop was requested while it waited.
    """
    descriptor = _take_slot(home, device, limit)
    if descriptor is None:
        on_wait()
    while descriptor is None:
        if stop_requested():
            raise InterruptedRun(
                f"stopped while waiting for device {device!r}",
                where=f"step {where!r}" if where else "",
                remedy="run the same command to continue",
            )
        time.sleep(POLL)
        descriptor = _take_slot(home, device, limit)
    try:
        yield descriptor
    finally:
        # Close, do not unlock: a running process that inherited the descriptor keeps the slot.
        os.close(descriptor)


def count_holders(home: Home, device: str) -> int:
    """Returns the number of slots of a device that are held now."""
    with home.lock(f"device-{_file_name(device)}"):
        descriptors, held = _lock_free_slots(home, device)
        _close(descriptors)
    return held


def _take_slot(home: Home, device: str, limit: int) -> int | None:
    # Serialized, because the locks that are taken for counting look like holders to other processes.
    with home.lock(f"device-{_file_name(device)}"):
        descriptors, held = _lock_free_slots(home, device)
        slot = descriptors[0] if held < limit else None
        _close(descriptors[1:] if held < limit else descriptors)
    return slot


def _lock_free_slots(home: Home, device: str) -> tuple[list[int], int]:
    """Locks every free slot file of a device, and creates one if none is free.

    Checks all files whatever the limit is, because holders with a higher limit count too.

    Returns:
        Descriptors of the locked files, and the number of held files.
    """
    descriptors: list[int] = []
    held = 0
    while True:
        path = _slot_file(home, device, len(descriptors) + held)
        if descriptors and not path.exists():
            return descriptors, held
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            held += 1
        else:
            descriptors.append(descriptor)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _slot_file(home: Home, device: str, number: int) -> Path:
    return home.locks / f"device-{_file_name(device)}.{number}.lock"


def _file_name(device: str) -> str:
    return _NO_FILE_NAME.sub("-", device)


def _publish_wait(step: str, device: str) -> None:
    publish(StepEvent(step, "waiting", text=f"waiting for device {device}"))
