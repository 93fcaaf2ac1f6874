"""Tests what a scheduled training starts from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flows.plan import plan_pipeline
from flows.spec import PipelineSpec, load_spec
from flows.warm_start import warm_started
from registry.home import Home
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tests.flows.conftest import PREPARE, draw_noise
from tests.flows.made import run_spec

WARM = (
    "retraining: {start: warm, alias: live}\n"
    + PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 1, batch: 1}
  release:  {uses: register, adapter: adapter, alias: trial}
"""
)


def init_of(spec: PipelineSpec) -> str | None:
    init: str | None = spec.steps["adapter"].init  # type: ignore[attr-defined]
    return init


@pytest.mark.usefixtures("trained_here")
def test_a_training_starts_from_production_only_when_something_else_changed(
    pipeline: Callable[..., Path], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened, path = Home.open(home), pipeline(WARM, 1)

    def warm(text: str = WARM) -> PipelineSpec:
        path.write_text(text)
        return warm_started(load_spec(path), opened)

    def promoted(number: int) -> None:
        with closing(Versions(opened)) as versions:
            promote(versions, "try", number, "live", reason="sharp", actor="anna")

    def is_cached(spec: PipelineSpec) -> bool:
        return all(step.cached for step in plan_pipeline(spec, opened).steps)

    assert init_of(warm()) is None, "there is no version yet"
    assert run_spec(warm(), opened).ref == "try@1"
    promoted(1)
    unchanged = warm()
    assert init_of(unchanged) is None
    assert is_cached(unchanged), "a promotion alone is no reason to train"

    draw_noise(path.parent / "images" / "new.png", 99)
    changed = warm()
    assert init_of(changed) == "try@1"
    assert changed.source["steps"]["adapter"]["init"] == "try@1"
    assert "init" not in load_spec(path).source["steps"]["adapter"]
    assert run_spec(changed, opened).ref == "try@2"
    promoted(2)
    assert init_of(warm()) == "try@1", "as in the last run"
    assert is_cached(warm())

    caplog.set_level(logging.INFO)
    assert init_of(warm(WARM.replace("rank: 2", "rank: 1"))) is None
    assert "starts from scratch: try@2 has rank 2, more than 1" in caplog.text
    assert init_of(warm(WARM.replace("rank: 2", "rank: 2, targets: linear"))) is None
    assert "try@2 has targets 'attention', not 'linear'" in caplog.text
    assert init_of(warm(WARM.replace("rank: 2", "rank: 4"))) == "try@2"
    assert init_of(warm(WARM.replace("rank: 2", "rank: 4, init: try@1"))) == "try@1", "its own init wins"
    assert init_of(warm(WARM.replace("start: warm", "start: scratch").replace("rank: 2", "rank: 4"))) is None
