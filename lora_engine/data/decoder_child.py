"""Decodes untrusted files in a process with limited memory: `python -m lora_engine.data.decoder_child LIMITS`.

Reads requests from standard input and writes frames to standard output; see `decoders`, which starts it. It ends when
its input ends, after a request that needs too much memory, and when it is idle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lora_engine.data.archives import read_archive
from lora_engine.data.duplicates import take_print
from lora_engine.data.evidence import read_evidence
from lora_engine.data.folder import open_inside
from lora_engine.data.images import encode_mask, encode_png, open_image, open_with_alpha
from lora_engine.errors import DataError

IDLE_SECONDS = 60.0
Frame = tuple[dict[str, Any], bytes]
"""What is known, and the content that belongs to it."""


def decode_image(
    path: Path, root: Path, max_pixels: int, background: list[int], verifies: bool, roots: str | None
) -> Frame | Iterator[Frame]:
    """Returns the digest, size, print and evidence of an image, with its clean PNG; then its opacity unless full."""
    red, green, blue = background
    sha256, image, opacity = open_with_alpha(path, max_pixels, root, (red, green, blue))
    facts = {
        "sha256": sha256,
        "size": image.size,
        "print": take_print(image).to_json(),
        "evidence": read_evidence(path, root, verifies=verifies, roots=None if roots is None else Path(roots)),
    }
    frame: Frame = (facts, encode_png(image))
    return frame if opacity is None else iter((frame, ({"part": "opacity"}, encode_mask(opacity))))


def decode_mask(path: Path, root: Path, max_pixels: int) -> Frame:
    """Returns the size of a mask, with its clean PNG."""
    mask = open_image(path, max_pixels, root).convert("L")
    return {"size": mask.size}, encode_mask(mask)


def stream_archive(path: Path, root: Path) -> Iterator[Frame]:
    """Yields the members of an archive; see `read_archive`."""
    with open_inside(path, root) as file:
        yield from read_archive(file, path.name, os.fstat(file.fileno()).st_size)


def stream_table(path: Path, root: Path) -> Iterator[Frame]:
    """Yields the rows of a table; see `read_image_table`."""
    from lora_engine.data.parquet import read_image_table  # loads pyarrow

    with open_inside(path, root) as file:
        yield from read_image_table(file, path.name)


OPERATIONS: dict[str, Callable[..., Frame | Iterator[Frame]]] = {
    "image": decode_image,
    "mask": decode_mask,
    "archive": stream_archive,
    "table": stream_table,
}


class _Log(logging.Handler):
    """Keeps messages for the answer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(limits: dict[str, int]) -> None:
    """Answers requests."""
    answers = os.fdopen(os.dup(1), "wb")
    _silence()
    _limit(limits["memory"])
    log = _Log()
    logging.getLogger().addHandler(log)
    _write(answers, {"ready": True})
    while _is_asked() and (line := sys.stdin.buffer.readline()):
        log.messages.clear()
        try:
            _answer(answers, json.loads(line), log, limits["seconds"])
        except MemoryError:
            _write_problem(answers, DataError(f"needs more than {limits['memory']:,} bytes of memory"))
            return


def _is_asked() -> bool:
    """Waits for a request; returns False if it is idle for too long."""
    # Windows waits for no pipe, so there a child ends with its parent.
    return os.name == "nt" or bool(select.select([0], [], [], IDLE_SECONDS)[0])


def _answer(answers: BinaryIO, request: dict[str, Any], log: _Log, seconds: int) -> None:
    operation = OPERATIONS[request.pop("operation")]
    paths = {name: Path(request.pop(name)) for name in ("path", "root")}
    _limit_time(seconds)
    try:
        answer = operation(**paths, **request)
        if isinstance(answer, tuple):
            facts, content = answer
            _write(answers, facts | {"end": True, "log": log.messages}, content)
            return
        for facts, content in answer:
            _write(answers, facts, content)
            _limit_time(seconds)
        _write(answers, {"end": True, "log": log.messages})
    except DataError as error:
        _write_problem(answers, error)


def _write_problem(answers: BinaryIO, error: DataError) -> None:
    _write(answers, {"problem_of_file": error.problem, "allowed": error.allowed, "remedy": error.remedy})


def _write(answers: BinaryIO, facts: dict[str, Any], content: bytes = b"") -> None:
    answers.write(json.dumps(facts | {"bytes": len(content)}).encode() + b"\n")
    answers.write(content)
    answers.flush()


def _silence() -> None:
    # The C libraries of image formats write to both streams. An interrupt reaches the parent, which ends this process.
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit(memory: int) -> None:
    try:
        import resource
    except ImportError:
        return  # Windows has no such limits
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bounds = {resource.RLIMIT_AS: used + memory, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        least = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        # Some systems define a limit but do not support it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (least, least))


def _limit_time(seconds: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
