"""Keeps the trials of a sweep in the home, measures their adapters, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_engine.documents import parse_json, read_json_object
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import atomic_write, canonical_json
from registry.entities import ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.sweep.spec import MOST_TRIALS, SweepSettings, SweepWinner, TrialRecord

_ADAPTER = "adapter.safetensors"


def trial_folder(home: Home, key: str) -> Path:
    """Returns the folder with the trials of a sweep; it may be deleted while none runs."""
    return home.cache / "sweeps" / key


def read_trials(folder: Path) -> dict[int, TrialRecord]:
    """Returns the trials that ended, by number; a damaged record is left out."""
    records = {}
    for number in range(MOST_TRIALS):
        with suppress(OSError, DataError, ValidationError):
            record = TrialRecord.model_validate(read_json_object(folder / f"{number:04}.json", DataError))
            records[number] = record
    return records


def write_trial(folder: Path, record: TrialRecord) -> None:
    """Writes a trial that ended."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{record.number:04}.json", canonical_json(record.model_dump(mode="json")))


def read_training(home: Home, adapter: ArtifactRef) -> dict[str, Any]:
    """Returns the record of a training; an empty one for an adapter that was not trained here."""
    store = open_store(home)
    if "training.json" not in store.files(adapter):
        return {}
    training: dict[str, Any] = parse_json(store.read(adapter, "training.json").decode(), adapter.sha256[:12], DataError)
    return training


def read_value(home: Home, settings: SweepSettings, output: ArtifactRef) -> float:
    """Returns the value of the sweep's metric.

    Args:
        home: The home.
        settings: The sweep.
        output: The output of the step that measures: a report, or an adapter.

    Raises:
        SettingsError: It was not measured.
    """
    if output.kind == "report":
        report = parse_json(open_store(home).read(output, "report.json").decode(), output.sha256[:12], DataError)
        values = {name: metric.get("adapter") for name, metric in report["metrics"].items()}
    else:
        training = read_training(home, output)
        curve = training.get("validation_loss") or [(0, None)]
        values = {"choice_loss": training.get("chosen", {}).get("score"), "validation_loss": curve[-1][1]}
    measured = sorted(name for name, value in values.items() if value is not None)
    if settings.measure not in measured:
        raise SettingsError(
            f"metric is {settings.metric!r}, which was not measured",
            where="sweep.metric",
            allowed=", ".join(f"{settings.step}.{name}" for name in measured) or "none",
        )
    return float(values[settings.measure])


def measure_adapter(home: Home, adapter: ArtifactRef) -> dict[str, Any]:
    """Returns size in bytes, number of values and seconds of the making of an adapter."""
    from lora_engine.formats.safetensors_io import read_header

    store = open_store(home)
    with home.temporary_folder() as folder:
        store.checkout_file(adapter, _ADAPTER, folder / _ADAPTER)
        tensors, _ = read_header(folder / _ADAPTER)
    with closing(Lineage(home.lineage_url)) as lineage:
        made = [entry for entry in lineage.executions(output=adapter.sha256) if entry.status == "COMPLETED"]
    ended = [(entry.ended_at - entry.started_at).total_seconds() for entry in made if entry.ended_at is not None]
    return {
        "adapter": adapter.sha256,
        "size": store.files(adapter)[_ADAPTER].size,
        "parameters": sum(prod(tensor["shape"]) for tensor in tensors.values()),
        "seconds": round(ended[-1], 3) if ended else 0.0,
    }


def best_trial(settings: SweepSettings, records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Returns the completed trial with the best value, the first among equals; None without one."""
    sign = -1.0 if settings.direction == "maximize" else 1.0
    completed = [record for record in records if record.state == "completed" and record.value is not None]
    return min(completed, key=lambda record: sign * (record.value or 0.0), default=None)


def describe_winner(settings: SweepSettings, records: Sequence[TrialRecord], best: TrialRecord) -> SweepWinner:
    """Returns what the version of the best trial says about the sweep."""
    trials = tuple(record.to_swept() for record in records)
    return SweepWinner(metric=settings.metric, direction=settings.direction, value=best.value or 0.0, trials=trials)


def pareto_front(
    settings: SweepSettings, records: Iterable[TrialRecord], cost: Callable[[TrialRecord], float]
) -> list[TrialRecord]:
    """Returns the completed trials of which no other is at most as costly and better, by rising cost."""
    sign = -1.0 if settings.direction == "maximize" else 1.0
    completed = [record for record in records if record.state == "completed" and record.value is not None]
    front: list[TrialRecord] = []
    for record in sorted(completed, key=lambda record: (cost(record), sign * (record.value or 0.0), record.number)):
        if not front or sign * (record.value or 0.0) < sign * (front[-1].value or 0.0):
            front.append(record)
    return front
