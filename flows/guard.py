"""Runs a command that never outlives this process's parent; `flows.up` starts its services by it.

The command stops on SIGTERM and, if standard input is a pipe, when that ends, as it does if the parent is killed.
Processes that it started stop with it, also those in sessions of their own, such as trainings.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psutil import Process

_PR_SET_CHILD_SUBREAPER = 36
_POLL = 0.2  # seconds
_LAST_GRACE = 15.0
"""Seconds between SIGTERM to every process, upon which trainings write a checkpoint, and SIGKILL."""


def guarded_command(command: Sequence[str], grace: float) -> list[str]:
    """Returns the command line that runs a command under a guard.

    Args:
        command: The command.
        grace: Seconds between SIGTERM to the command and SIGTERM to all of its descendants.
    """
    return [sys.executable, "-P", "-m", "flows.guard", str(grace), *command]


def _guard(command: Sequence[str], grace: float) -> int:
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    _adopt_orphans()
    # Sockets that the parent passes stay open in the command. Its standard input ends when it has to stop.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, close_fds=False)

    def wait_for_parent() -> None:
        read_to_end(sys.stdin.fileno())
        stopping.set()

    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        threading.Thread(target=wait_for_parent, daemon=True).start()
    # A killed worker's flow runs finish, unless the guard has to stop.
    while not stopping.wait(_POLL):
        if child.poll() is not None and not _descendants(child):
            return _exit_code(child.returncode)
    _stop(child, grace)
    return _exit_code(child.wait())


def _exit_code(returncode: int) -> int:
    """Returns 128 + N for signal N, as shells do."""
    return returncode if returncode >= 0 else 128 - returncode


def read_to_end(descriptor: int) -> None:
    """Returns when a pipe ends. At exit, a thread may still be in here, but not in `sys.stdin`, which has a lock."""
    while os.read(descriptor, 1 << 12):
        pass


def _adopt_orphans() -> None:
    """Makes this process the parent of descendants whose parent ended, so that they are found; on Linux only."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _stop(child: subprocess.Popen[bytes], grace: float) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    if child.poll() is None:
        child.terminate()
    if not _ends(child, grace):
        _signal_all(child, lambda process: process.terminate())
        if not _ends(child, _LAST_GRACE):
            while not _ends(child, _POLL):
                _signal_all(child, lambda process: process.kill())


def _ends(child: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while child.poll() is None or _descendants(child):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _descendants(child: subprocess.Popen[bytes]) -> list[Process]:
    import psutil

    processes = psutil.Process().children(recursive=True)
    for process in processes:
        if process.pid != child.pid:  # `child` needs its exit code itself
            with suppress(ChildProcessError):  # not adopted: its parent waits for it
                os.waitpid(process.pid, os.WNOHANG)
    return [process for process in processes if _is_alive(process)]


def _is_alive(process: Process) -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _signal_all(child: subprocess.Popen[bytes], send: Callable[[Process], None]) -> None:
    import psutil

    for process in _descendants(child):
        with suppress(psutil.NoSuchProcess):
            send(process)


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[2:], float(sys.argv[1])))
