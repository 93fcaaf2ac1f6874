"""Starts, asks and ends a process that decodes untrusted files; see `decoders`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_engine.errors import DataError, EngineError

_log = logging.getLogger(__name__)
_ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG"),
    "PYTHONDONTWRITEBYTECODE",
)
_START_SECONDS = 300.0


@dataclass(frozen=True)
class DecodeLimits:
    """The resources for one file.

    Attributes:
        memory: Bytes. An image of 64 million pixels with transparency, a profile and an orientation takes 1.5 GiB.
        seconds: Seconds of processor time, of each member for an archive; the same image takes 5.
        wall_seconds: Seconds until a child that waits for something is stopped, as `seconds`.
    """

    memory: int = 4 << 30
    seconds: int = 120
    wall_seconds: float = 1200.0


class CrashError(Exception):
    """The end of a child before its answer; final if a second attempt would take as long."""

    def __init__(self, problem: str, *, is_final: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final


class DecoderProcess:
    """A child that runs `decoder_child`.

    Args:
        limits: See `DecodeLimits`.

    Raises:
        EngineError: It does not start.
    """

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = limits
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_engine.data.decoder_child", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        try:
            with self._deadline(_START_SECONDS):
                is_ready = bool(self._stdout.readline())
        except BaseException:
            self.stop()
            raise
        if not is_ready:
            self.stop()
            raise EngineError(
                f"the process that decodes images does not start (exit code {self._process.returncode})",
                remedy="see its last lines above; run `loraline doctor`",
            )

    def ask(self, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the frames of the answer to a request.

        Raises:
            DataError: The file cannot be used.
            CrashError: The child ended.
        """
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        while True:
            with self._deadline(self._limits.wall_seconds) as expired:
                facts, content = self._read()
            if facts is None:
                self.stop()
                raise self._explain(is_expired=expired.is_set())
            if problem := facts.get("problem_of_file"):
                raise DataError(problem, allowed=facts["allowed"], remedy=facts["remedy"])
            is_last = facts.pop("end", False)
            for message in facts.pop("log", ()):
                _log.warning("%s", message)
            if facts:
                yield facts, content
            if is_last:
                return

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            return None, b""
        facts: dict[str, Any] = json.loads(line)
        size = facts.pop("bytes")
        content = self._stdout.read(size)
        return (facts, content) if len(content) == size else (None, b"")

    def is_alive(self) -> bool:
        """Returns True if it can be asked; it ends itself when it is idle."""
        if self._process.poll() is not None:
            self.stop()
            return False
        return True

    def stop(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[threading.Event]:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield expired
        finally:
            timer.cancel()

    def _explain(self, *, is_expired: bool) -> CrashError:
        code = self._process.returncode
        if is_expired:
            return CrashError(f"is not decoded within {self._limits.wall_seconds:g} seconds", is_final=True)
        if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
            return CrashError(f"takes more than {self._limits.seconds} seconds of processor time", is_final=True)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CrashError(f"ends the process that decodes it ({cause})")


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    paths = [
        str(Path(__file__).resolve().parents[2]),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
