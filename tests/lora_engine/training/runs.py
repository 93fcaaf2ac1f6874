"""Training runs for tests: one way to start them, to end them early and to compare what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import InterruptedRun
from lora_engine.files import sha256_file
from lora_engine.formats import read_adapter
from lora_engine.training import job
from lora_engine.training.batches import Batch, Mixer
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.running import Running

OBJECTIVE: dict[str, Any] = {
    "weighting": "min_snr",
    "loss": {"name": "huber", "delta": 0.3},
    "timesteps": {"distribution": "logit_normal", "low": 0.2},
    "noise_offset": 0.1,
    "pyramid": {},
    "input_perturbation": 0.1,
}
"""Every setting of an objective, each other than its default."""


class CrashedRun(Exception):
    """Ends a run as a killed process would: nothing more is written."""


@dataclass
class Ending:
    """Ends a run early, in order or by a crash.

    Attributes:
        poll: the run asks for the n-th time, from 1, whether to stop; None leaves this out
        batch: a batch is made, counted over all phases from 0
        step: a step is done, and with it its checkpoint
        crashes: raises `CrashedRun` at that moment; otherwise asks for a stop
    """

    poll: int | None = None
    batch: int | None = None
    step: int | None = None
    crashes: bool = False
    asked: bool = field(default=False, init=False)
    polls: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)
    steps: list[int] = field(default_factory=list, init=False)

    def stop(self) -> bool:
        self.polls += 1
        return self.asked or self.polls == self.poll

    def tell(self, done: int, total: int, values: Mapping[str, float]) -> None:
        if "loss" not in values:
            return
        self.steps.append(done)
        if done == self.step:
            self._end()

    def count_batch(self) -> None:
        if self.batches == self.batch:
            self._end()
        self.batches += 1

    def _end(self) -> None:
        if self.crashes:
            raise CrashedRun
        self.asked = True


def load_once() -> Callable[..., BaseModel]:
    """Returns `load_base` with a memory.

    Runs may share a base: two tests with fresh loads check that a run leaves it as it was.
    """
    loaded: dict[tuple[str, str], BaseModel] = {}

    def load(source: Any, **how: Any) -> BaseModel:
        key = str(source), str(how)
        if key not in loaded:
            loaded[key] = load_base(source, **how)
        return loaded[key]

    return load


@dataclass
class Runs:
    """Runs of `train`, each in a folder of its own; they share loaded bases and what they encode.

    Attributes:
        bases: folders of the narrow bases by shape
        dataset: what is trained on unless a run names another
        folder: where runs write
        cache: encoded images and texts
        load: loads a base for runs with default `running`; others change the network for good and load their own
        settings: gives the settings of a run with some of them changed
    """

    bases: Mapping[str, Path]
    dataset: Path
    folder: Path
    cache: Path
    load: Callable[..., BaseModel]
    settings: Callable[..., TrainSettings]

    def __call__(
        self,
        name: str = "out",
        *,
        shape: str = "small-sd",
        base: str | None = None,
        dataset: Path | None = None,
        work: str | None = None,
        ending: Ending | None = None,
        passed: Mapping[str, Any] | None = None,
        **change: Any,
    ) -> Path:
        """Trains and returns the folder of the artifact.

        Args:
            name: of that folder
            shape: of the base
            base: its name for `resolve_base`, in place of a shape
            dataset: in place of the usual one
            work: folder of checkpoints; None names it after the artifact
            ending: ends the run early
            passed: further arguments of `train`
            **change: settings
        """
        chosen, out = self.settings(**change), self.folder / name
        ending = ending or Ending()
        arguments = {"cache": self.cache, "progress": ending.tell, "stop": ending.stop, **(passed or {})}
        with pytest.MonkeyPatch.context() as patch:
            if chosen.running == Running():
                patch.setattr(job, "load_base", self.load)
            patch.setattr(Mixer, "__call__", _counted(ending))
            train(
                chosen,
                base or str(self.bases[shape]),
                dataset or self.dataset,
                out,
                self.folder / (work or f"work of {name}"),
                **arguments,
            )
        return out

    def resume(self, name: str, endings: list[Ending], **change: Any) -> tuple[Path, list[int]]:
        """Trains with an interruption at each ending and then to the end.

        Returns:
            The folder of the artifact, and the steps that the last run took.
        """
        for ending in endings:
            with pytest.raises(CrashedRun if ending.crashes else InterruptedRun):
                self(name, ending=ending, **change)
            assert not (self.folder / name).exists()
        last = Ending()
        return self(name, ending=last, **change), last.steps


def _counted(ending: Ending) -> Callable[[Mixer, int], Batch]:
    make = Mixer.__call__

    def count(mixer: Mixer, number: int) -> Batch:
        ending.count_batch()
        return make(mixer, number)

    return count


def digests(out: Path) -> dict[str, str]:
    """Returns the digest of every file of an artifact."""
    found = {str(path.relative_to(out)): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()}
    assert {"adapter.safetensors", "training.json"} <= found.keys()
    return found


def factors_of(out: Path) -> dict[str, torch.Tensor]:
    """Returns all factors of the adapter of an artifact."""
    adapter, _ = read_adapter(out / "adapter.safetensors")
    return {f"{name}.{key}": value for name, delta in adapter.modules.items() for key, value in delta.factors().items()}


def curves_of(out: Path) -> dict[str, Any]:
    """Returns what `training.json` of an artifact holds."""
    found: dict[str, Any] = json.loads((out / "training.json").read_bytes())
    return found
