"""Keeps the states of trainings after their end, and finds the one of an adapter.

A state folder has the folders `checkpoints`, `saved` and `samples`, and after the end of the run `result.json` with the
digest of its adapter. It can be deleted: then longer runs begin at step 0.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.training.checkpoint import Checkpoint, read_checkpoint
from lora_engine.training.checkpoint_files import list_checkpoints
from lora_engine.training.optimizer_state import import_state
from lora_engine.training.spec import TrainSettings

_log = logging.getLogger(__name__)
_RESULT = "result.json"


@dataclass(frozen=True)
class StateFolder:
    """The state of one run, beside those of other runs.

    Attributes:
        folder: Folder of the run.
        shared: True if the sibling folders are states of other runs.
        origin: Digest of what the run was made from.
        fresh: True continues no other run, and none that finished; an interrupted one resumes.
    """

    folder: Path
    shared: bool = False
    origin: str = ""
    fresh: bool = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def siblings(self) -> list[Path]:
        """State folders of other runs."""
        parent = self.folder.parent
        if not self.shared or not parent.is_dir():
            return []
        return sorted(path for path in parent.iterdir() if path.is_dir() and path != self.folder)

    @property
    def others(self) -> list[Path]:
        """Folders of the checkpoints of other runs that this one may continue."""
        return [] if self.fresh else [path / "checkpoints" for path in self.siblings]

    def prepare(self) -> None:
        """Deletes the state of the same run if it finished and is to be repeated."""
        if self.fresh and (self.folder / _RESULT).exists():
            shutil.rmtree(self.folder)

    def mark_finished(self, adapter: Path) -> None:
        """Records the digest of the run's adapter, so that a training that starts from it finds this state."""
        if self.shared:
            atomic_write(self.folder / _RESULT, canonical_json({"adapter": sha256_file(adapter)}))


@dataclass(frozen=True)
class WarmStart:
    """The last checkpoint of the training of an initial adapter."""

    checkpoint: Checkpoint

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Restores the optimizer's state.

        Raises:
            SettingsError: The optimizer has other parameters.
        """
        shapes = [[list(value.shape) for value in group["params"]] for group in optimizer.param_groups]
        if shapes != self.checkpoint.facts.get("shapes"):
            raise SettingsError(
                "the optimizer state of init is for other factors",
                where="optimizer_state",
                remedy="train the same kind, rank, targets and rates as init, or leave optimizer_state out",
            )
        import_state(optimizer, self.checkpoint)


def find_optimizer_state(settings: TrainSettings, sha256: str | None, state: StateFolder) -> WarmStart | None:
    """Returns the optimizer state that a training starts with; None if the settings ask for none.

    Args:
        settings: The settings.
        sha256: Digest of the file of `init`.
        state: State folder of the run.

    Raises:
        SettingsError: There is no `init`, its state is not at hand, or it is that of another optimizer.
    """
    if not settings.optimizer_state:
        return None
    if sha256 is None:
        raise SettingsError("there is no init", where="optimizer_state", remedy="set init, or leave it out")
    checkpoint = next((read for folder in _made(sha256, state) for read in _last(folder)), None)
    if checkpoint is None:
        raise SettingsError(
            f"the optimizer state of init ({sha256[:16]}) is not in {state.folder.parent}",
            where="optimizer_state",
            remedy="leave it out, or train init again on this machine",
        )
    name = settings.rates.optimiser.name
    if checkpoint.facts.get("optimizer") != name:
        raise SettingsError(
            f"init was trained by optimizer {checkpoint.facts.get('optimizer')!r}, but rates.optimiser is {name!r}",
            where="optimizer_state",
            remedy="choose the same optimizer, or leave optimizer_state out",
        )
    return WarmStart(checkpoint)


def _made(sha256: str, state: StateFolder) -> Iterator[Path]:
    for folder in (state.folder, *state.siblings):
        try:
            if json.loads((folder / _RESULT).read_bytes())["adapter"] == sha256:
                yield folder
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("skipped the state in %s: cannot be read (%s)", folder, error)


def _last(folder: Path) -> Iterator[Checkpoint]:
    for file in list_checkpoints([folder / "checkpoints"]):
        checkpoint = read_checkpoint(file.path)
        if checkpoint is not None:
            yield checkpoint
