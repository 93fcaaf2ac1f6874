"""Logs what a version's run in MLflow shows: metrics, curves, parameters, datasets. Repeated calls change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_engine.files import sha256_bytes
from registry.documents.facts import Dataset
from registry.entities import AdapterVersion
from registry.policy.alias_policy import numbers

_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DATASET_DIGEST = 36
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


def log_values(client: Any, run_id: str, version: AdapterVersion, record: Mapping[str, Any]) -> None:
    """Logs metrics, curves and parameters; long parameters are tags, too, and points that a live run has stay."""
    from mlflow.entities import Metric, Param, RunTag

    timestamp = millis(version)
    metrics = [Metric(name, value, timestamp, 0) for name, value in numbers(version.metrics)]
    for name, curve in record["curves"].items():
        # A run that was live has most points, with the times of their steps.
        logged = {(point.step, point.value) for point in client.get_metric_history(run_id, name)}
        metrics += [Metric(name, value, timestamp, step) for step, value in curve if (step, value) not in logged]
    for batch in _batches(metrics, _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=batch)
    params = {_param_name(str(key)): _text(value) for key, value in record["params"].items()}
    long = {key: value for key, value in params.items() if len(value) > _PARAM_LENGTH}
    for batch in _batches([Param(key, value[:_PARAM_LENGTH]) for key, value in params.items()], _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=batch)
    tags = [RunTag(f"loraline.param.{key}"[:250], value[:_TAG_LENGTH]) for key, value in long.items()]
    for batch in _batches(tags, _PARAMS_AT_ONCE):
        client.log_batch(run_id, tags=batch)


def log_datasets(client: Any, run_id: str, datasets: Sequence[Dataset]) -> None:
    """Logs the datasets; MLflow's digest column is too short for a SHA-256, so a tag holds the full digest."""
    from mlflow.entities import Dataset as LoggedDataset
    from mlflow.entities import DatasetInput, InputTag

    inputs = []
    for entry in datasets:
        digest = entry.artifact.sha256
        profile = {"pictures": entry.count, "trained on": entry.train, "held out": entry.heldout}
        profile |= {"with a caption": entry.captioned, "covered by a consent": sum(entry.consents.values())}
        tags = {"mlflow.data.context": "training", "loraline.role": entry.role, "loraline.sha256": digest}
        inputs.append(
            DatasetInput(
                LoggedDataset(
                    name=entry.role,
                    digest=digest[:_DATASET_DIGEST],
                    source_type="loraline",
                    source=json.dumps({"artifact": digest}),
                    profile=json.dumps(profile),
                ),
                [InputTag(key, value) for key, value in tags.items()],
            )
        )
    if inputs:
        client.log_inputs(run_id, inputs)


def millis(version: AdapterVersion) -> int:
    """Returns the time of registration, not of the sync: MLflow then recognizes a repeated metric as the same one."""
    return int(version.created_at.timestamp() * 1000)


def _param_name(key: str) -> str:
    # A recipe may have layer patterns as keys (`unet.*.to_q`), which MLflow does not accept as names.
    plain = _NOT_IN_NAMES.sub("_", key)
    return key if plain == key else f"{plain[:200]}-{sha256_bytes(key.encode())[:8]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
