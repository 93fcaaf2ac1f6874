"""Reads and writes checkpoints: the whole state of a run in one file, written atomically, without pickle.

A file holds the tensors (safetensors) and, in its header, the other values (JSON). Its name has the step and the digest
of its bytes, which detects corruption.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lora_engine.errors import AdapterError, NonFiniteError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.finite import check_finite
from lora_engine.training.checkpoint_files import (
    CHECKPOINT_NAME,
    KEY,
    CheckpointFile,
    list_checkpoints,
    newest_first,
    step_of,
)

_log = logging.getLogger(__name__)
_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        tensors: Tensors by name; owned by the caller of `load`.
        facts: JSON values.
        folder: Folder that it was read from; None for one that was not.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    folder: Path | None = None


class Checkpoints:
    """The checkpoints of one job in one folder; the newest two are kept.

    Args:
        folder: Folder of the files; created by the first write.
        job: Digest of everything that the steps depend on except their rates; checkpoints of other jobs are ignored.
        others: Folders of other runs, whose checkpoints are read and never written.
        about: Facts to add to every checkpoint.
    """

    def __init__(
        self, folder: Path, job: str, others: Sequence[Path] = (), about: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._job, self._others, self._about = folder, job, tuple(others), dict(about or {})

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, then deletes all but the newest two of this job, and those of other jobs.

        Raises:
            NonFiniteError: A value is NaN or infinite; older checkpoints are untouched.
            OSError: The file cannot be written; older checkpoints are untouched.
        """
        try:
            check_finite(checkpoint.tensors, f"{self._folder}: step {step}")
        except AdapterError as error:
            raise NonFiniteError(error.problem, where=error.where, remedy="lower the learning rate") from error
        facts = canonical_json({"job": self._job, **self._about, **checkpoint.facts}).decode()
        plain = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
        content = safetensors.torch.save(plain, metadata={KEY: facts})
        name = f"step-{step:08d}-{sha256_bytes(content)[:16]}.safetensors"
        atomic_write(self._folder / name, content)
        # Steps beyond this one are of other settings: a run that continues starts from the newest one it can use.
        older = [path for path in newest_first([self._folder]) if path.name != name and step_of(path) <= step]
        beyond = [path for path in newest_first([self._folder]) if step_of(path) > step]
        for path in (*beyond, *older[_KEEP - 1 :]):
            path.unlink(missing_ok=True)

    def load(self, usable: Callable[[CheckpointFile], bool] = lambda file: True) -> Checkpoint | None:
        """Returns the newest intact checkpoint of this job, or None.

        Args:
            usable: Takes a checkpoint of this job; returns True if the run can continue from it.
        """
        for file in list_checkpoints([self._folder, *self._others]):
            if file.facts.get("job") != self._job:
                _log.info("skipped checkpoint %s: it belongs to another job", file.path)
            elif usable(file):
                checkpoint = read_checkpoint(file.path)
                if checkpoint is not None:
                    return checkpoint
        return None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Reads a checkpoint; returns None, with a warning, if it is damaged."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    try:
        content = path.read_bytes()
    except OSError as error:
        _log.warning("skipped checkpoint %s: cannot be read (%s)", path, error)
        return None
    if match is None or sha256_bytes(content)[:16] != match[2]:
        _log.warning("skipped checkpoint %s: its content does not match its digest", path)
        return None
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    return Checkpoint(safetensors.torch.load(content), facts, path.parent)
