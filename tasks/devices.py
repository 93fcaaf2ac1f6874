"""Slots: how many trainings may use one device at the same time, counted over all processes of a home.

A slot is a lock on a file of the home. The system releases it when the last process that holds it ends, in whatever
way: the process that took it hands it down to the processes that compute, so a killed run leaves a device occupied for
exactly as long as something of it still computes.
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
    """Holds one slot of each device while the block lasts, and waits for those that are not free.

    Waiting is published as an event of the step, and ends when a stop is requested. Devices are taken in the order of
    their names, so two steps that need several never wait for each other.

    Args:
        home: Whose processes share the slots.
        limits: Device name -> how many holders it may have, this one included.
        step: Name of the step that waits.

    Yields:
        The descriptors of the locks, for `subprocess.Popen(pass_fds=...)`.

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
def device_slot(
    home: Home, device: str, limit: int, *, on_wait: Callable[[], None] = lambda: None, where: str = ""
) -> Iterator[int]:
    """Holds one slot of a device while the block lasts.

    Args:
        home: Whose processes share the slots.
        device: Any name; what has the same name is the same device.
        limit: How many holders the device may have, this one included; at least 1.
        on_wait: Called once, if no slot is free at first.
        where: Name of the step that waits, for the error.

    Yields:
        The descriptor of the lock; a process that inherits it holds the slot too.

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
        # Closed, not unlocked: a process that inherited the descriptor and still computes keeps the slot.
        os.close(descriptor)


def count_holders(home: Home, device: str) -> int:
    """Returns how many slots of a device are held now."""
    with home.lock(f"device-{_file_name(device)}"):
        descriptors, held = _lock_free_slots(home, device)
        _close(descriptors)
    return held


def _take_slot(home: Home, device: str, limit: int) -> int | None:
    # One process at a time counts: the locks that it takes for that would look like holders to another.
    with home.lock(f"device-{_file_name(device)}"):
        descriptors, held = _lock_free_slots(home, device)
        mine = descriptors[0] if held < limit else None
        _close(descriptors[1:] if held < limit else descriptors)
    return mine


def _lock_free_slots(home: Home, device: str) -> tuple[list[int], int]:
    """Locks every free slot file of a device and makes one more if none is free; gives their descriptors and the rest.

    All files are looked at, whatever the limit: holders that were started with a higher one count too.
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
