"""Limits how many steps use one device at the same time, over all processes of a home and of a user on this machine.

A slot is a lock on a file of the home and on one of the machine. Child processes that compute inherit the lock, and the system releases it when
the last of them ends. A killed run therefore occupies its device until its children have ended.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lora_engine.compute import measure_free
from lora_engine.errors import InterruptedRun
from registry.errors import HomeError, disk_errors
from registry.home import Home
from tasks.errors import SpecError
from tasks.progress import StepEvent, publish, stop_requested
from tasks.resources import NO_RESOURCES, Resources, device_type, gpu_number

if TYPE_CHECKING:
    from tasks.job import Job
    from tasks.step import Context

POLL = 0.2
"""Seconds between two attempts to take a slot."""
LOCKS = "LORALINE_DEVICE_LOCKS"
"""Environment variable with the folder of this machine's device locks."""
_MEMORY_POLL = 2.0
_MANY = 1024
_GIB = 1 << 30
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9.]+")


@contextmanager
def device_slots(
    home: Home, limits: Mapping[str, int], step: str, resources: Resources = NO_RESOURCES
) -> Iterator[tuple[int, ...]]:
    """Holds one slot of each device inside a `with` block; waits for devices without a free slot, then for memory.

    Publishes the wait as an event of the step. Takes devices in the order of their names, which prevents deadlocks of
    steps that need several.

    Args:
        home: The home whose processes share the slots.
        limits: Device name -> maximum number of holders, this one included.
        step: Name of the step that waits.
        resources: What the step declares; `exclusive` takes the whole device, whatever the limits are.

    Yields:
        The file descriptors of the locks, for `subprocess.Popen(pass_fds=...)`.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        SpecError: The device has less memory than the step needs.
    """
    with ExitStack() as stack:
        descriptors: list[int] = []
        for device in sorted(limits):
            on_wait = partial(_publish_wait, step, device)
            slot = device_slot(home, device, limits[device], exclusive=resources.exclusive, on_wait=on_wait, where=step)
            descriptors += stack.enter_context(slot)
        if resources.memory is not None:
            _await_memory(resources, sorted(limits), step)
        yield tuple(descriptors)


@contextmanager
def gpu_slot(
    home: Home, device: str, limit: int | None, step: str, resources: Resources = NO_RESOURCES
) -> Iterator[None]:
    """Holds a slot of the GPU on which a step of this process runs a model; waits for one as a training does.

    Nothing waits for a CPU, where such steps and trainings slow each other down but do not exhaust the memory; but a
    step that declares `resources` shares it with trainings, and waits for one that has it alone.

    Args:
        home: The home whose processes share the slots.
        device: `auto` for the fastest device, or the type of a device.
        limit: Maximum number of holders; None means 1, as for trainings.
        step: Name of the step that waits.
        resources: What the step declares; its device, if not `auto`, is the default device of this thread meanwhile.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        SpecError: The device has less memory than the step needs.
    """
    name = _slot_name(device if resources.device == "auto" else resources.device)
    names = () if name == "cpu" and resources == NO_RESOURCES else (name,)
    limits = dict.fromkeys(names, limit or (_MANY if name == "cpu" else 1))
    with device_slots(home, limits, step, resources), _default_device(resources.device):
        yield


def work_on_device(job: Job, context: Context) -> None:
    """Does a step's work; takes the device for a step that declares `resources` and does not take it by itself."""
    if context.resources == NO_RESOURCES or job.kind.takes_device:
        job.kind.work(job.spec, context)
        return
    with gpu_slot(context.home, "cpu", context.concurrency, context.name, context.resources):
        job.kind.work(job.spec, context)


@contextmanager
def device_slot(
    home: Home,
    device: str,
    limit: int,
    *,
    exclusive: bool = False,
    on_wait: Callable[[], None] = lambda: None,
    where: str = "",
) -> Iterator[tuple[int, ...]]:
    """Holds one slot of a device inside a `with` block, in the home and on this machine.

    Args:
        home: The home whose processes share the slots.
        device: Any name; equal names mean the same device.
        limit: Maximum number of holders, this one included; at least 1.
        exclusive: True waits until nothing else holds the device, and lets nothing else take it.
        on_wait: Called once if it must wait.
        where: Name of the step that waits, for the error.

    Yields:
        The file descriptors of the locks; a process that inherits all of them holds the slot too.

    Raises:
        InterruptedRun: A stop was requested while it waited.
        HomeError: The folder of this machine's locks cannot be used.
    """
    held: list[int] = []
    has_waited = False
    try:
        for folder in (home.locks, machine_locks()):  # always in this order, which prevents deadlocks
            while (taken := _take_slot(folder, device, limit, exclusive=exclusive)) is None:
                if not has_waited:
                    has_waited = True
                    on_wait()
                _refuse_if_stopped(f"device {device!r}", where)
                time.sleep(POLL)
            held += taken
        yield tuple(held)
    finally:
        # Close, do not unlock: a running process that inherited the descriptors keeps the slot.
        _close(held)


def machine_locks() -> Path:
    """Returns the folder with the locks of this machine's devices, shared by all homes of this user; creates it.

    Its place does not depend on the session, which a scheduled run does not have: `LORALINE_DEVICE_LOCKS` overrides it.

    Raises:
        HomeError: It is a link, or not a folder that only this user can write.
    """
    given = os.environ.get(LOCKS)
    path = Path(given) if given else Path("/tmp") / f"loraline-{os.getuid()}"  # noqa: S108  # checked below
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=bool(given), exist_ok=True)
        state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise HomeError(
            "the locks of devices need a folder that only this user can write",
            where=str(path),
            remedy=f"remove it, or set {LOCKS} to such a folder",
        )
    return path


def gpu_name(number: int) -> str:
    """Returns the name of a GPU for `CUDA_VISIBLE_DEVICES`, by its number among the visible ones."""
    from lora_engine.bases.base import visible_gpus

    return visible_gpus(number + 1)[number].removeprefix("cuda-")


def count_holders(home: Home, device: str) -> int:
    """Returns the number of slots of a device that are held now by processes of a home."""
    with _serialized(home.locks, device):
        descriptors, held = _lock_free_slots(home.locks, device)
        _close(descriptors)
    return held


def _take_slot(folder: Path, device: str, limit: int, *, exclusive: bool) -> list[int] | None:
    # Serialized, because the locks that are taken for counting look like holders to other processes.
    with _serialized(folder, device):
        # Every holder shares the lock of the whole device, so an exclusive one is alone.
        whole = _lock(folder / f"device-{_file_name(device)}.whole.lock", fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        if whole is None:
            return None
        descriptors, held = _lock_free_slots(folder, device)
        if held >= limit:
            _close([whole, *descriptors])
            return None
        _close(descriptors[1:])
    return [whole, descriptors[0]]


def _lock_free_slots(folder: Path, device: str) -> tuple[list[int], int]:
    """Locks every free slot file of a device, and creates one if none is free.

    Checks all files whatever the limit is, because holders with a higher limit count too.

    Returns:
        Descriptors of the locked files, and the number of held files.
    """
    descriptors: list[int] = []
    held = 0
    while True:
        path = folder / f"device-{_file_name(device)}.{len(descriptors) + held}.lock"
        if descriptors and not path.exists():
            return descriptors, held
        descriptor = _lock(path, fcntl.LOCK_EX)
        if descriptor is None:
            held += 1
        else:
            descriptors.append(descriptor)


def _lock(path: Path, kind: int) -> int | None:
    """Returns the descriptor of a locked file, or None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _serialized(folder: Path, device: str) -> FileLock:
    return FileLock(folder / f"device-{_file_name(device)}.lock")


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _slot_name(device: str) -> str:
    """Returns the name that processes share for a device: `cpu`, `mps` or `cuda-N`."""
    if device == "auto":
        from lora_engine.bases.base import default_device

        device = default_device()
    return f"cuda-{gpu_name(gpu_number(device) or 0)}" if device_type(device) == "cuda" else device


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    if device == "auto":
        yield
        return
    from lora_engine.bases.base import device_chosen

    with device_chosen(device):
        yield


def _await_memory(resources: Resources, names: Iterable[str], step: str) -> None:
    """Waits until the device has the free memory that a step needs."""
    needed, name = resources.memory or 0.0, next(iter(names))
    device = "cuda" if resources.device == "auto" and name.startswith("cuda") else resources.device
    device = name if device == "auto" else device
    free, whole = measure_free(device)
    if needed * _GIB > whole:
        raise SpecError(
            f"resources.memory is {needed:g} GiB, but {device} has {whole / _GIB:.1f} GiB in all",
            where=f"step {step!r}",
            remedy="lower it, or run the step on another machine",
        )
    while needed * _GIB > free:
        text = f"waiting for {needed:g} GiB of free memory on {device}, which has {free / _GIB:.1f} GiB"
        publish(StepEvent(step, "waiting", text=text))
        _refuse_if_stopped(f"{needed:g} GiB of {device}", step)
        time.sleep(_MEMORY_POLL)
        free, _ = measure_free(device)


def _refuse_if_stopped(awaited: str, where: str) -> None:
    if stop_requested():
        raise InterruptedRun(
            f"stopped while waiting for {awaited}",
            where=f"step {where!r}" if where else "",
            remedy="run the same command to continue",
        )


def _file_name(device: str) -> str:
    return _NO_FILE_NAME.sub("-", device)


def _publish_wait(step: str, device: str) -> None:
    publish(StepEvent(step, "waiting", text=f"waiting for device {device}"))
