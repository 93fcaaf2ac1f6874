"""Training runs for tests: starts them, ends them early and compares their files."""

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
from lora_engine.training import prepare
from lora_engine.training.batches import Batch, BatchBuilder
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.running import Running

OBJECTIVE: dict[str, Any] = {
    "weighting": "min_snr",
    "loss": {"name": "huber", "delta": 0.3, "schedule": "exponential"},
    "timesteps": {"distribution": "logit_normal", "low": 0.2},
    "noise_offset": 0.1,
    "pyramid": {},
    "input_perturbation": 0.1,
    "random_offset": True,
    "random_perturbation": True,
}
"""Every setting of an objective, none at its default."""


class CrashedRun(Exception):
    """Ends a run like a killed process: nothing more is written."""


@dataclass
class Ending:
    """Ends a run early, by a stop request or a crash.

    Attributes:
        poll: number of the poll for a stop, from 1, that requests it; None requests none
        batch: number of the batch, over all phases from 0, at which the run ends
        step: number of the step after whose checkpoint the run ends
        crashes: raises `CrashedRun` at that moment; otherwise requests a stop
    """

    poll: int | None = None
    batch: int | None = None
    step: int | None = None
    crashes: bool = False
    is_stopping: bool = field(default=False, init=False)
    polls: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)
    steps: list[int] = field(default_factory=list, init=False)

    def stop(self) -> bool:
        self.polls += 1
        return self.is_stopping or self.polls == self.poll

    def progress(self, done: int, total: int, values: Mapping[str, float]) -> None:
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
        self.is_stopping = True


def load_once() -> Callable[..., BaseModel]:
    """Returns `load_base` with a cache.

    Runs may share a base: two tests with fresh loads check that a run does not change it.
    """
    loaded: dict[tuple[str, str], BaseModel] = {}

    def load(source: Any, **options: Any) -> BaseModel:
        key = str(source), str(options)
        if key not in loaded:
            loaded[key] = load_base(source, **options)
        return loaded[key]

    return load


@dataclass
class Runs:
    """Runs of `train`, each in its own folder; they share loaded bases and encoded images and texts.

    Attributes:
        bases: folders of the narrow bases by shape
        dataset: default dataset
        folder: folder of the outputs
        cache: encoded images and texts
        load: loads a base for runs with default `running`; others change the network permanently and load their own
        settings: returns the settings of a run with some of them changed
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
        arguments: Mapping[str, Any] | None = None,
        **change: Any,
    ) -> Path:
        """Trains and returns the folder of the artifact.

        Args:
            name: name of that folder
            shape: shape of the base
            base: name of another base for `resolve_base`
            dataset: another dataset
            work: folder of checkpoints; None names it after the artifact
            ending: ends the run early
            arguments: further arguments of `train`
            **change: settings
        """
        settings, out = self.settings(**change), self.folder / name
        ending = ending or Ending()
        all_arguments = {"cache": self.cache, "progress": ending.progress, "stop": ending.stop, **(arguments or {})}
        with pytest.MonkeyPatch.context() as patch:
            if settings.running == Running():
                patch.setattr(prepare, "load_base", self.load)
            patch.setattr(BatchBuilder, "__call__", _counted(ending))
            train(
                settings,
                base or str(self.bases[shape]),
                dataset or self.dataset,
                out,
                self.folder / (work or f"work of {name}"),
                **all_arguments,
            )
        return out

    def resume(self, name: str, endings: list[Ending], **change: Any) -> tuple[Path, list[int]]:
        """Trains with an interruption at each ending and then to the end.

        Returns:
            The folder of the artifact, and the steps of the last run.
        """
        for ending in endings:
            with pytest.raises(CrashedRun if ending.crashes else InterruptedRun):
                self(name, ending=ending, **change)
            assert not (self.folder / name).exists()
        last = Ending()
        return self(name, ending=last, **change), last.steps


def _counted(ending: Ending) -> Callable[[BatchBuilder, int], Batch]:
    make = BatchBuilder.__call__

    def count(builder: BatchBuilder, number: int) -> Batch:
        ending.count_batch()
        return make(builder, number)

    return count


def digests(out: Path) -> dict[str, str]:
    """Returns the digest of every file of an artifact."""
    by_name = {str(path.relative_to(out)): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()}
    assert {"adapter.safetensors", "training.json"} <= by_name.keys()
    return by_name


def factors_of(out: Path) -> dict[str, torch.Tensor]:
    """Returns all factors of the adapter of an artifact."""
    adapter, _ = read_adapter(out / "adapter.safetensors")
    return {f"{name}.{key}": value for name, delta in adapter.modules.items() for key, value in delta.factors().items()}


def curves_of(out: Path) -> dict[str, Any]:
    """Returns the content of `training.json` of an artifact."""
    curves: dict[str, Any] = json.loads((out / "training.json").read_bytes())
    return curves
