"""Finds which steps of earlier trainings a run would continue, or lose. Must not import torch.

`training.loop` decides by the phases themselves; plans know only the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.settings import without_later
from lora_engine.training.automatic import limit_steps
from lora_engine.training.checkpoint_files import CheckpointFile, list_checkpoints
from lora_engine.training.choosing import make_chooser, read_checks
from lora_engine.training.schedules import PhaseRates, RateStage, common_steps
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.continuing import SettingChange, restarting

EPOCH = "epoch"
"""Fact of a checkpoint: steps of an epoch."""
ORIGIN = "origin"
"""Fact of a checkpoint: digest of what the run was made from beside its settings."""


AUTOMATIC = "automatic"
"""Fact of a checkpoint: names of the settings that the training chose."""
SCORE = "score"
"""Fact of a checkpoint: by what the training chooses its best step, and how often."""


def later_stages(settings: TrainSettings) -> tuple[RateStage, ...]:
    """Returns the stages after the steps of the last phase; all lengths are in steps."""
    return tuple(
        RateStage(
            stage.steps,
            stage.schedule.name,
            stage.schedule.options(),
            stage.warmup,
            (stage.learning_rate or settings.learning_rate) / settings.learning_rate,
        )
        for stage in settings.then
    )


def planned_rates(settings: TrainSettings) -> tuple[PhaseRates, ...]:
    """Returns the rates of every phase without an early stop; all lengths are in steps."""
    schedule, phases = settings.schedule, settings.method.phase_steps(settings.steps)
    return tuple(
        PhaseRates(
            name,
            (
                RateStage(steps, schedule.name, schedule.options(), settings.warmup),
                *(later_stages(settings) if number == len(phases) else ()),
            ),
        )
        for number, (name, steps) in enumerate(phases.items(), start=1)
    )


def find_state(settings: TrainSettings, origin: str, folders: Sequence[Path]) -> CheckpointFile | None:
    """Returns the checkpoint that a run would continue from; None if it would begin at step 0.

    Args:
        settings: Its settings.
        origin: Digest of everything else that it depends on.
        folders: Folders of checkpoints.
    """
    for file in list_checkpoints(folders):
        if file.facts.get(ORIGIN) == origin and _usable_steps(settings, file) >= file.step:
            return file
    return None


def find_loss(
    settings: TrainSettings, origin: str, folder: Path
) -> tuple[CheckpointFile, dict[str, SettingChange]] | None:
    """Returns the newest checkpoint of an earlier run that a new one cannot continue, and the changes that forbid it.

    The changes are those of settings; without any, the rates changed, or something beside the settings did.
    """
    file = next(list_checkpoints([folder]), None)
    if file is None or (file.facts.get(ORIGIN) == origin and _usable_steps(settings, file) >= file.step):
        return None
    before, after = _settings_of(file), _in_json(_resolved(settings, file))
    return file, dict(restarting(before, after))


def _usable_steps(settings: TrainSettings, file: CheckpointFile) -> int:
    resolved = _resolved(settings, file)
    if any(restarting(_settings_of(file), _in_json(resolved))):
        return 0
    if ("rank" in settings.automatic) != ("rank" in file.facts.get(AUTOMATIC, ())):
        return 0
    before, planned = [PhaseRates.from_json(values) for values in file.facts["rates"]], planned_rates(resolved)
    score: Mapping[str, Any] = file.facts.get(SCORE, {})
    chooser = make_chooser(resolved, score["by"]) if score else None
    if chooser is not None and chooser.every != score["every"]:
        return 0
    if chooser is None:
        return common_steps(before, planned)
    checks = read_checks(file.facts)
    after = chooser.rates(planned, checks)
    return common_steps(before, after) if chooser.would_make(checks, sum(phase.steps for phase in after)) else 0


def _settings_of(file: CheckpointFile) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = file.facts["settings"]
    return settings


def _resolved(settings: TrainSettings, file: CheckpointFile) -> TrainSettings:
    # `auto` was resolved to what the device computes in.
    precision = _settings_of(file).get("precision", settings.precision)
    changes = {"precision": precision} if settings.precision == "auto" else {}
    chosen = [name for name in settings.automatic if name != "steps" and name in file.facts.get(AUTOMATIC, ())]
    changes |= {name: _settings_of(file)[name] for name in chosen}
    epoch = int(file.facts[EPOCH])
    return limit_steps(settings, epoch).in_steps(epoch).model_copy(update=changes)


def _in_json(settings: TrainSettings) -> dict[str, Any]:
    return without_later(settings, settings.model_dump(mode="json"))
