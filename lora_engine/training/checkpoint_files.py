"""Lists checkpoints by their names and headers. Must not import torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.safetensors")
"""Name of a checkpoint: the steps done, and the digest of its bytes."""
KEY = "loraline.checkpoint"
"""Header entry with its facts."""
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint on disk; only its header is read, which the digest in the name does not cover.

    Attributes:
        path: The file.
        step: Steps done.
        facts: JSON values, `job` included.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]


def list_checkpoints(folders: Sequence[Path]) -> Iterator[CheckpointFile]:
    """Yields the checkpoints in folders, those with the most steps first; skips unreadable ones with a warning."""
    for path in newest_first(folders):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _MAX_HEADER)))
            yield CheckpointFile(path, step_of(path), json.loads(header["__metadata__"][KEY]))
        except FileNotFoundError:  # deleted meanwhile by the run that it is of
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("skipped checkpoint %s: cannot be read (%s)", path, error)


def newest_first(folders: Sequence[Path]) -> list[Path]:
    """Returns the files of checkpoints in folders, those with the most steps first."""
    names = [
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if CHECKPOINT_NAME.fullmatch(path.name)
    ]
    # The sort is stable: of equal steps, those of the first folder come first.
    return sorted(names, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Returns the steps in the name of a checkpoint; -1 for another file."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
