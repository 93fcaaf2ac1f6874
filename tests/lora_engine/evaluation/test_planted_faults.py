"""Faults that are planted by training on the embedded base are caught, and an adapter without one raises no alarm.

docs/evaluation.md has the rates. The limits were set on the seeds 1 to 5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora_engine.evaluation.planted import RECIPES, evaluate_planted, train_planted

torch.set_num_threads(1)

ALARMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "overfit": lambda metrics: metrics["memorized_share"]["adapter"] > 0.75,
    "leak": lambda metrics: metrics["trigger_effect"]["difference"] < 0.095,
    "drift": lambda metrics: metrics["drift"]["adapter"] > 0.08,
}
"""Planted fault -> whether the metrics of a report show it."""


def alarms_of(report: dict[str, Any]) -> set[str]:
    return {fault for fault, raises in ALARMS.items() if raises(report["metrics"])}


def test_a_drifting_adapter_raises_an_alarm_and_one_without_a_fault_none(tmp_path: Path) -> None:
    few = {"max_pictures": 2, "steps": 4, "extra": (), "embedder": "tiny"}
    reports = {}
    for fault in ("good", "drift"):
        adapter, dataset, prompts = train_planted(tmp_path / fault, 1, fault, steps=30)
        reports[fault] = evaluate_planted(tmp_path / fault, adapter, dataset, prompts[:4], 1, **few)
    assert alarms_of(reports["good"]) & {"drift", "leak"} == set()
    assert "drift" in alarms_of(reports["drift"])


@pytest.mark.nightly
def test_planted_faults_are_caught_and_there_are_few_false_alarms(tmp_path: Path) -> None:
    caught: Counter[str] = Counter()
    false: Counter[str] = Counter()
    seeds = range(1, 6)
    for seed in seeds:
        for fault in RECIPES:
            folder = tmp_path / f"{fault}-{seed}"
            alarms = alarms_of(evaluate_planted(folder, *train_planted(folder, seed, fault), seed))
            caught[fault] += fault in alarms
            false.update(alarms if fault == "good" else ())
    assert all(caught[fault] >= 4 for fault in ALARMS), caught
    assert all(false[fault] <= 1 for fault in ALARMS), false
