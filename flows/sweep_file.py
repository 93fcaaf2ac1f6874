"""Reads the section `sweep` of a pipeline file, and checks that its trials can run, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flows.refusals import nearest
from flows.spec import PipelineDocument, PipelineSpec, check_document, read_pipeline_file, set_value
from lora_engine.evaluation.metrics import METRICS
from tasks.errors import SpecError
from tasks.steps.evaluate import Evaluate
from tasks.steps.register import Register
from tasks.steps.train import Train
from tasks.sweep.spec import SweepSettings, SweepWinner

_TRAINING_LOSSES = ("validation_loss", "choice_loss")


@dataclass(frozen=True)
class DeclaredSweep:
    """A pipeline file with a valid section `sweep`.

    Attributes:
        document: The file, with overrides.
        settings: The section.
        spec: The pipeline without changes of settings.
        adapter: Name of the step with the adapter that is compared.
        trial_steps: Names of the steps of a trial.
    """

    document: PipelineDocument
    settings: SweepSettings
    spec: PipelineSpec
    adapter: str
    trial_steps: frozenset[str]

    def with_values(self, values: Mapping[str, Any], winner: SweepWinner | None = None) -> PipelineSpec:
        """Returns the pipeline of a trial, or with a winner the whole pipeline, which says so where it registers.

        Args:
            values: Path of a setting to its value.
            winner: What its version says about the sweep.

        Raises:
            SpecError: The pipeline is not valid with these values.
        """
        document = replace(self.document, data=copy.deepcopy(self.document.data))
        for path, value in values.items():
            where = document.where(("sweep", "parameters", path))
            set_value(document, path, value, where)
        del document.data["sweep"]
        steps = document.data["steps"]
        if winner is None:
            document.data["steps"] = {name: step for name, step in steps.items() if name in self.trial_steps}
        else:
            for name in self.registering():
                steps[name]["sweep"] = winner.model_dump(mode="json")
        return check_document(document)

    def registering(self) -> list[str]:
        """Returns the names of the steps that register the adapter."""
        steps = self.spec.steps.items()
        return [name for name, step in steps if isinstance(step, Register) and step.adapter == self.adapter]


def load_sweep(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    parameters: Mapping[str, Any] = MappingProxyType({}),
    names: Collection[str] = (),
) -> DeclaredSweep:
    """Reads a pipeline file with a section `sweep`, and validates it with the ends of every range.

    `parameters` and `names` are those of `load_pipelines`; one pipeline must remain.

    Raises:
        SpecError: The file is not valid, has no such section, or a trial would not be.
    """
    document = read_pipeline_file(path, overrides, parameters=parameters, names=names)
    spec = check_document(document)
    settings = spec.sweep
    if settings is None:
        raise SpecError("the file declares no sweep", where=str(path), remedy="add sweep: with parameters and a metric")
    adapter = _find_adapter(settings, spec, document)
    sweep = DeclaredSweep(document, settings, spec, adapter, frozenset(_upstream(spec, settings.step)))
    if not sweep.registering():
        raise SpecError(
            f"no step registers {adapter!r}, so the winner would be lost",
            where=document.where(("steps",)),
            remedy=f"add a step {{uses: register, adapter: {adapter}}}",
        )
    for setting, parameter in settings.parameters.items():
        _check_path(sweep, setting)
        for value in parameter.ends():
            _check_value(sweep, setting, value)
    return sweep


def _upstream(spec: PipelineSpec, name: str) -> Iterator[str]:
    yield name
    for _, target, _ in spec.steps[name].references():
        if target in spec.steps:
            yield from _upstream(spec, target)


def _find_adapter(settings: SweepSettings, spec: PipelineSpec, document: PipelineDocument) -> str:
    """Returns the step with the adapter that the metric measures.

    Raises:
        SpecError: There is no such step or metric, or it would not be measured.
    """
    where, step = document.where(("sweep", "metric")), spec.steps.get(settings.step)
    if not isinstance(step, Evaluate | Train):
        measuring = [name for name, other in spec.steps.items() if isinstance(other, Evaluate | Train)]
        raise SpecError(
            f"metric is {settings.metric!r}, but {settings.step!r} is no step that measures",
            where=where,
            **nearest(settings.step, measuring),
        )
    known = list(METRICS) if isinstance(step, Evaluate) else list(_TRAINING_LOSSES)
    if settings.measure not in known:
        raise SpecError(f"metric is {settings.metric!r}", where=where, **nearest(settings.measure, known))
    if isinstance(step, Evaluate):
        if not step.measures(settings.measure):
            raise SpecError(
                f"metric is {settings.metric!r}, which is optional and not measured",
                where=where,
                remedy=f"add {settings.measure} to {settings.step}.extra",
            )
        if step.adapter not in spec.steps:
            raise SpecError(
                f"metric is {settings.metric!r}, but {settings.step!r} measures {step.adapter!r}, which no trial makes",
                where=where,
                allowed="an evaluation of a step of the file",
            )
        return step.adapter
    if settings.measure == "choice_loss" and step.best_checkpoint is None and not step.is_auto("steps"):
        raise SpecError(
            f"metric is {settings.metric!r}, but no step is chosen", where=where, remedy="set best_checkpoint"
        )
    if settings.measure == "validation_loss" and not step.validate_every:
        raise SpecError(
            f"metric is {settings.metric!r}, which is not measured", where=where, remedy="set validate_every"
        )
    return settings.step


def _check_path(sweep: DeclaredSweep, path: str) -> None:
    where = sweep.document.where(("sweep", "parameters", path))
    keys = path.removeprefix("steps.").split(".")
    if keys[0] in sweep.spec.steps:
        if keys[0] not in sweep.trial_steps:
            raise SpecError(
                f"{path!r} is a setting of a step that {sweep.settings.metric} does not depend on", where=where
            )
        known = type(sweep.spec.steps[keys[0]]).model_fields
        if len(keys) < 2 or keys[1] not in known or keys[1] == "uses":
            name = keys[1] if len(keys) > 1 else ""
            raise SpecError(f"{path!r} is no setting", where=where, **nearest(name, known))
        return
    if path not in ("seed", "base", "vae"):
        raise SpecError(f"{path!r} names no step", where=where, **nearest(keys[0], sweep.trial_steps))


def _check_value(sweep: DeclaredSweep, path: str, value: Any) -> None:
    try:
        sweep.with_values({path: value})
    except SpecError as error:
        where = sweep.document.where(("sweep", "parameters", path))
        raise SpecError(
            f"{path} cannot be {value!r}: {error.problem}", where=where, allowed=error.allowed, remedy=error.remedy
        ) from error
