"""`Service`: a process of `flows.up` with its log file; it is stopped with all of its descendants."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flows.guard import guarded_command
from tasks.errors import PipelineFailed

_LINES = 12
"""Lines of a log that an error shows."""


class Service:
    """A command that runs under a guard, in a session of its own, so Ctrl-C does not reach it.

    Args:
        name: Name for messages.
        command: The command line.
        environment: All of its variables.
        log: File to which its output is appended; the first start empties it.
        grace: Seconds until its descendants are asked to stop after it was.
        descriptors: File descriptors that it inherits.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        grace: float,
        descriptors: Sequence[int] = (),
    ) -> None:
        self.name, self.log, self.starts = name, log, 0
        self._command, self._environment = guarded_command(command, grace), environment
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def remedy(self) -> str:
        """What a user does if the service fails."""
        return "correct what the log names, then run `loraline up` again"

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs."""
        return None if self._process is None else self._process.poll()

    def is_running(self) -> bool:
        """Returns False after its end, and before its start."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the command."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab" if self.starts else "wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=self._descriptors,
                start_new_session=True,
            )
        self.starts += 1

    def ask_to_stop(self) -> None:
        """Asks the command to stop; `stop` waits for its end."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def stop(self) -> None:
        """Stops the command and returns when no descendant is left. The guard kills those that do not react."""
        self.ask_to_stop()
        if self._process is not None:
            self._process.wait()


def start_when_free(host: str, port: int, option: str) -> socket.socket:
    """Returns a socket that listens on a port.

    Args:
        host: Address of this machine.
        port: The port; 0 chooses a free one.
        option: Option of the command that sets the port.

    Raises:
        PipelineFailed: Another program has the port, or the port needs rights of the administrator.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise PipelineFailed(
            f"port {port} is taken by another program" if taken else f"port {port} cannot be used: {error.strerror}",
            where=host,
            remedy=f"stop that program, or choose another port: `{option} 0` takes a free one",
        ) from error


def last_lines(log: Path) -> str:
    """Returns the end of a log file, indented; an empty string if there is none."""
    with suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()[-_LINES:]
        return "\n".join(f"  {line}" for line in lines)
    return ""
