"""Reads and writes checkpoints: the whole state of a run in one file, written atomically, without pickle.

A file holds the tensors (safetensors) and, in its header, the other values (JSON). Its name has the step and the digest
of its bytes, which detects corruption.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lora_engine.errors import AdapterError, NonFiniteError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.finite import check_finite

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.safetensors")
_KEY = "loraline.checkpoint"
_KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        tensors: Tensors by name; owned by the caller of `load`.
        facts: JSON values.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one job in one folder; the newest two are kept.

    Args:
        folder: Folder of the files; created by the first write.
        job: Digest of everything that the job depends on; checkpoints of other jobs are ignored.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._job = folder, job

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, then deletes all but the newest two.

        Raises:
            NonFiniteError: A value is NaN or infinite; older checkpoints are untouched.
            OSError: The file cannot be written; older checkpoints are untouched.
        """
        try:
            check_finite(checkpoint.tensors, f"{self._folder}: step {step}")
        except AdapterError as error:
            raise NonFiniteError(error.problem, where=error.where, remedy="lower the learning rate") from error
        facts = canonical_json({"job": self._job, **checkpoint.facts}).decode()
        plain = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
        content = safetensors.torch.save(plain, metadata={_KEY: facts})
        name = f"step-{step:08d}-{sha256_bytes(content)[:16]}.safetensors"
        atomic_write(self._folder / name, content)
        for path in self._newest_first()[_KEEP:]:
            path.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """Returns the newest intact checkpoint of this job, or None."""
        for path in self._newest_first():
            checkpoint = self._read(path)
            if checkpoint is not None:
                return checkpoint
        return None

    def _newest_first(self) -> list[Path]:
        steps = [(int(match[1]), path) for path, match in self._files()]
        return [path for _, path in sorted(steps, reverse=True)]

    def _files(self) -> list[tuple[Path, re.Match[str]]]:
        if not self._folder.is_dir():
            return []
        pairs = ((path, _NAME.fullmatch(path.name)) for path in self._folder.iterdir())
        return [(path, match) for path, match in pairs if match]

    def _read(self, path: Path) -> Checkpoint | None:
        match = _NAME.fullmatch(path.name)
        try:
            content = path.read_bytes()
        except OSError as error:
            _log.warning("skipped checkpoint %s: cannot be read (%s)", path, error)
            return None
        if match is None or sha256_bytes(content)[:16] != match[2]:
            _log.warning("skipped checkpoint %s: its content does not match its digest", path)
            return None
        length = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
        if facts.pop("job") != self._job:
            _log.info("skipped checkpoint %s: it belongs to another job", path)
            return None
        return Checkpoint(safetensors.torch.load(content), facts)
