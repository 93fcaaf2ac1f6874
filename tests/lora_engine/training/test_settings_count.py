"""Every setting has an effect: changing one changes the artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.formats import read_bundle
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import OBJECTIVE, Runs, curves_of, factors_of

Plain = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def plain_runs() -> dict[str, Path]:
    return {}


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture
def plain(runs: Runs, plain_runs: dict[str, Path], plain_folder: Path) -> Plain:
    """Runs settings without the change; once for all tests that share them."""

    def run(settings: dict[str, Any]) -> Path:
        key = str({name: value for name, value in settings.items() if name != "dataset"})
        if key not in plain_runs:
            plain_runs[key] = replace(runs, folder=plain_folder)(str(len(plain_runs)), **settings)
        return plain_runs[key]

    return run


def flattened(out: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in factors_of(out).items() if name.endswith("up")])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"learning_rate": 2e-3},
        {"rank": 3},
        {"caption_dropout": 1.0},
        {"dropout": 0.5},
        {"rank_dropout": 0.5},
        {"module_dropout": 0.5},
        {"norm_limit": 1e-4},
        {"overrides": {"unet.*.to_q": {"rank": 1}}},
        {"weight_decay": 10.0},
        {"clip": 1e-3},
        {"accumulate": 2},
        {"batch": 3},
        {"warmup": 1},
        {"alpha": 1.0},
    ],
    ids=str,
)
def test_each_setting_of_a_run_has_an_effect(runs: Runs, plain: Plain, change: dict[str, Any]) -> None:
    before, after = plain({"steps": 3}), runs("changed", **{"steps": 3, **change})
    adapters = [(out / "adapter.safetensors").read_bytes() for out in (before, after)]
    assert adapters[0] != adapters[1]
    first, second = factors_of(before), factors_of(after)
    assert first.keys() == second.keys()
    # The card holds the settings, so the tensors must differ too.
    assert any(value.shape != second[name].shape or not value.equal(second[name]) for name, value in first.items())


def test_a_recommended_weight_is_in_the_card_and_changes_no_factor(runs: Runs, plain: Plain) -> None:
    out = runs("recommended", steps=3, recommended="0.9@0,0.3@1:curve=cosine")
    assert read_bundle(out / "adapter.safetensors").card.recommended == "0.9@0,0.3@1:curve=cosine"
    before = factors_of(plain({"steps": 3}))
    assert all(torch.equal(value, before[name]) for name, value in factors_of(out).items())
    for wrong in ("heavy", "0.5:lbw=1,2", ""):
        with pytest.raises(ValidationError, match="recommended"):
            TrainSettings(steps=3, recommended=wrong)


STRENGTHS: dict[str, dict[str, Any]] = {
    "random_offset": {"noise_offset": 0.1},
    "random_perturbation": {"input_perturbation": 0.1},
}
RATES: dict[str, Any] = {"text": 1e-4, "up_ratio": 4.0, "ema": {"decay": 0.8}, "optimiser": "adafactor"}


@pytest.mark.parametrize(
    "change",
    [{"objective": {key: value, **STRENGTHS.get(key, {})}} for key, value in OBJECTIVE.items()]
    + [{"rates": {key: value}} for key, value in RATES.items()]
    + [{"schedule": {"name": "polynomial", "power": 3.0}}],
    ids=lambda change: str(change)[:60],
)
def test_each_setting_of_objective_rates_and_schedule_has_an_effect(
    runs: Runs, plain: Plain, change: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"method": "dreambooth", "targets": ["attention", "text"], "steps": 3}
    (switch,) = {*change.get("objective", {})} & {*STRENGTHS} or {""}
    if switch:
        usual |= {"objective": STRENGTHS[switch]}
    assert not torch.equal(flattened(plain(usual)), flattened(runs("changed", **usual | change)))


@pytest.mark.parametrize(
    "captions",
    [
        {"shuffle": True},
        {"tag_dropout": 0.5},
        {"keep_separator": "on"},
        {"secondary_separator": "on"},
        {"tag_warmup": 3},
        {"tag_warmup": 3, "first_tags": 0},
        {"dropout_every": 1},
        {"templates": "object"},
        {"prefix": "x "},
        {"wildcards": True},
        {"weights": True},
        {"chunks": 2},
        {"flip": True},
        {"colours": {"variants": 2}},
    ],
    ids=str,
)
def test_each_setting_of_captions_has_an_effect(
    runs: Runs, plain: Plain, varied: Path, captions: dict[str, Any]
) -> None:
    usual = {"dataset": varied, "steps": 3}
    before, after = plain(usual), runs("changed", captions=captions, **usual)
    assert curves_of(before)["loss"] != curves_of(after)["loss"]
