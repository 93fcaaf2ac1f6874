"""Decodes untrusted files in child processes that are reused: a crash or a hang costs one file, not the run.

Pillow's codecs are C code, and a small file may ask for gigabytes or hours. A child has limits on memory and processor
time and cannot write files (`decoder_child`). Several threads may decode at a time, each in a child of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_engine.data.decoder_process import CrashError, DecodeLimits, DecoderProcess
from lora_engine.data.duplicates import Print
from lora_engine.data.rights import GenerationSign
from lora_engine.data.text_files import printable
from lora_engine.errors import DataError

_ATTEMPTS = 2


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
        self._idle: list[DecoderProcess] = []

    def image(
        self,
        path: Path,
        root: Path,
        max_pixels: int,
        background: tuple[int, int, int] = (255, 255, 255),
        *,
        verifies: bool = False,
        roots: Path | None = None,
    ) -> DecodedImage:
        """Returns an image; see `open_with_alpha` and, for `verifies` and `roots`, `read_evidence`.

        Raises:
            DataError: It cannot be used, takes more than the limits, or ends the child twice.
            EngineError: No child can be started.
        """
        options = {"verifies": verifies, "roots": None if roots is None else os.fspath(roots.absolute())}
        frames = self.request("image", path, root, max_pixels=max_pixels, background=background, **options)
        (facts, png), *further = frames
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
                for frame in child.ask(request | options):
                    is_begun = True
                    yield frame
            except CrashError as crash:
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

    def _take(self) -> DecoderProcess:
        with contextlib.suppress(IndexError):
            while True:
                child = self._idle.pop()
                if child.is_alive():
                    return child
        return DecoderProcess(self._limits)

    def _give_back(self, child: DecoderProcess) -> None:
        if child.is_alive():
            self._idle.append(child)


_pools: list[Decoders] = []


def shared_decoders() -> Decoders:
    """Returns the pool of this process; a forked process gets its own."""
    if not _pools or _pools[-1].owner != os.getpid():
        _pools.append(Decoders())
        atexit.register(_pools[-1].close)
    return _pools[-1]
