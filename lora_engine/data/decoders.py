"""Decodes untrusted files in child processes that are reused: a crash or a hang costs one file, not the run.

Pillow's codecs are C code, and a small file may ask for gigabytes or hours. A child has limits on memory and processor
time and cannot write files (`decoder_child`). Several threads may decode at a time, each in a child of its own.
"""

from __future__ import annotations

import atexit
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
from typing import Any, cast

from lora_engine.data.duplicates import Print
from lora_engine.data.rights import GenerationSign
from lora_engine.data.text_files import printable
from lora_engine.errors import DataError, EngineError

_log = logging.getLogger(__name__)
_ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG"),
    "PYTHONDONTWRITEBYTECODE",
)
_START_SECONDS = 300.0
_ATTEMPTS = 2


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


@dataclass(frozen=True)
class DecodedImage:
    """A usable image.

    Attributes:
        sha256: Digest of the file's bytes.
        size: (width, height) in pixels, upright.
        print: See `take_print`.
        evidence: See `read_evidence`.
        png: Its pixels; see `encode_png`.
        opacity: Gray PNG; None for an image that is opaque everywhere.
    """

    sha256: str
    size: tuple[int, int]
    print: Print
    evidence: tuple[GenerationSign, ...]
    png: bytes
    opacity: bytes | None = None


class Decoders:
    """A pool of children; they start when they are needed, and end when they are idle for a minute.

    Args:
        limits: See `DecodeLimits`.

    Attributes:
        owner: Id of the process that may use it.
    """

    def __init__(self, limits: DecodeLimits | None = None) -> None:
        self.owner = os.getpid()
        self._limits = limits or DecodeLimits()
        self._idle: list[_Child] = []

    def image(
        self, path: Path, root: Path, max_pixels: int, background: tuple[int, int, int] = (255, 255, 255)
    ) -> DecodedImage:
        """Returns an image; see `open_with_alpha`.

        Raises:
            DataError: It cannot be used, takes more than the limits, or ends the child twice.
            EngineError: No child can be started.
        """
        (facts, png), *further = self.request("image", path, root, max_pixels=max_pixels, background=background)
        width, height = facts["size"]
        evidence = cast("tuple[GenerationSign, ...]", tuple(facts["evidence"]))
        opacity = further[0][1] if further else None
        return DecodedImage(facts["sha256"], (width, height), Print.from_json(facts["print"]), evidence, png, opacity)

    def mask(self, path: Path, root: Path, max_pixels: int) -> tuple[tuple[int, int], bytes]:
        """Returns (width, height) and the gray PNG of a mask; see `image` for the errors."""
        ((facts, png),) = self.request("mask", path, root, max_pixels=max_pixels)
        width, height = facts["size"]
        return (width, height), png

    def request(self, operation: str, path: Path, root: Path, **options: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the frames of an operation of `decoder_child.OPERATIONS`.

        A crash before the first frame is tried once more: the system may have ended the child.

        Raises:
            DataError: As of `image`; after some frames if the rest of the file cannot be read.
        """
        request = {"operation": operation, "path": os.fspath(path.absolute()), "root": os.fspath(root.absolute())}
        for attempt in range(1, _ATTEMPTS + 1):
            child = self._take()
            is_begun = False
            try:
                for frame in child.ask(request | options, self._limits):
                    is_begun = True
                    yield frame
            except _CrashError as crash:
                if crash.is_final or is_begun or attempt == _ATTEMPTS:
                    raise DataError(str(crash), where=printable(path.name), remedy="save it anew") from None
                continue
            except DataError as error:
                self._give_back(child)
                raise error.at(printable(path.name)) from None
            except BaseException:
                child.stop()  # the rest of its answer is of no use
                raise
            self._give_back(child)
            return

    def close(self) -> None:
        """Ends all idle children, unless they belong to the process that forked this one."""
        while self._idle and self.owner == os.getpid():
            self._idle.pop().stop()

    def _take(self) -> _Child:
        with contextlib.suppress(IndexError):
            while True:
                child = self._idle.pop()
                if child.is_alive():
                    return child
        return _Child(self._limits)

    def _give_back(self, child: _Child) -> None:
        if child.is_alive():
            self._idle.append(child)


class _CrashError(Exception):
    """The end of a child before its answer; final if a second attempt would take as long."""

    def __init__(self, problem: str, *, is_final: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final


class _Child:
    def __init__(self, limits: DecodeLimits) -> None:
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

    def ask(self, request: dict[str, Any], limits: DecodeLimits) -> Iterator[tuple[dict[str, Any], bytes]]:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        while True:
            with self._deadline(limits.wall_seconds) as expired:
                facts, content = self._read()
            if facts is None:
                self.stop()
                raise self._explain(limits, is_expired=expired.is_set())
            if problem := facts.get("problem_of_file"):
                raise DataError(problem, allowed=facts["allowed"], remedy=facts["remedy"])
            if facts.get("end"):
                for message in facts["log"]:
                    _log.warning("%s", message)
                return
            yield facts, content

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            return None, b""
        facts: dict[str, Any] = json.loads(line)
        content = self._stdout.read(facts["bytes"])
        return (facts, content) if len(content) == facts["bytes"] else (None, b"")

    def is_alive(self) -> bool:
        if self._process.poll() is not None:
            self.stop()
            return False
        return True

    def stop(self) -> None:
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

    def _explain(self, limits: DecodeLimits, *, is_expired: bool) -> _CrashError:
        code = self._process.returncode
        if is_expired:
            return _CrashError(f"is not decoded within {limits.wall_seconds:g} seconds", is_final=True)
        if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
            return _CrashError(f"takes more than {limits.seconds} seconds of processor time", is_final=True)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _CrashError(f"ends the process that decodes it ({cause})")


_pools: list[Decoders] = []


def shared_decoders() -> Decoders:
    """Returns the pool of this process; a forked process gets its own."""
    if not _pools or _pools[-1].owner != os.getpid():
        _pools.append(Decoders())
        atexit.register(_pools[-1].close)
    return _pools[-1]


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
