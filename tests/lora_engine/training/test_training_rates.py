"""Which factors learn at which rate, on small problems and through a whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import read_adapter
from lora_engine.training.rates import groups_for
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.rates import Rates

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]
MODULES = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
]


def parameters(factors: tuple[str, ...] = ("down", "up")) -> dict[str, nn.Parameter]:
    return {f"{module}.{factor}": nn.Parameter(torch.zeros(1)) for module in MODULES for factor in factors}


def rates_of(settings: dict[str, Any], factors: tuple[str, ...] = ("down", "up")) -> dict[str, float]:
    groups = groups_for(parameters(factors), Rates.model_validate(settings), 1e-3)
    named = [(name, group.learning_rate) for group in groups for name in group.parameters]
    assert len(named) == len(dict(named))
    return dict(named)


def test_by_default_all_factors_are_one_group_in_their_order() -> None:
    given = parameters()
    (group,) = groups_for(given, Rates(), 1e-3)
    assert list(group.parameters.items()) == list(given.items())
    assert group.learning_rate == 1e-3
    assert group.weight_decay is None


def test_text_encoders_have_a_rate_of_their_own() -> None:
    found = rates_of({"text": 1e-5})
    assert {name: rate for name, rate in found.items() if rate != 1e-3} == {
        f"{MODULES[2]}.{factor}": 1e-5 for factor in ("down", "up")
    }


def test_patterns_set_the_rates_of_layers_and_the_last_one_counts() -> None:
    found = rates_of({"text": 1e-5, "layers": {"attention": 2e-3, "unet.mid_block.*": 5e-4, "re:text.*q_proj": 1e-6}})
    assert [found[f"{module}.down"] for module in MODULES] == [2e-3, 5e-4, 1e-6]


def test_the_up_factor_learns_faster_by_the_ratio_on_top_of_all_else() -> None:
    found = rates_of({"up_ratio": 16.0, "text": 1e-5})
    for module, rate in zip(MODULES, (1e-3, 1e-3, 1e-5), strict=True):
        assert found[f"{module}.down"] == rate
        assert found[f"{module}.up"] == pytest.approx(16 * rate)


def test_the_plain_rate_comes_first_for_the_curves() -> None:
    backwards = dict(reversed(parameters().items()))
    groups = groups_for(backwards, Rates(text=1e-5, layers={"unet.mid*": 1e-2}), 1e-3)
    assert [group.learning_rate for group in groups] == [1e-3, 1e-5, 1e-2]


def test_a_rate_of_zero_lets_layers_stand_still() -> None:
    assert set(rates_of({"text": 0.0})) == {f"{module}.{factor}" for module in MODULES[:2] for factor in ("down", "up")}


@pytest.mark.parametrize(
    ("settings", "factors", "problem"),
    [
        ({"layers": {"unet.up_blocks.*": 1e-3}}, ("down", "up"), r"unet\.up_blocks"),
        ({"layers": {"linear": 1e-3}}, ("down", "up"), "shapes of layers"),
        ({"up_ratio": 2.0}, ("w1", "down2"), "no factor 'up'"),
        ({"layers": {"*": 0.0}}, ("down", "up"), "all 6 factors have a learning rate of 0"),
    ],
)
def test_rates_that_mean_nothing_are_refused(settings: dict[str, Any], factors: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        rates_of(settings, factors)


def test_a_rate_for_text_without_text_is_refused() -> None:
    only = {name: value for name, value in parameters().items() if name.startswith("unet")}
    with pytest.raises(SettingsError, match="no layer of a text encoder is adapted"):
        groups_for(only, Rates(text=1e-5), 1e-3)


def test_layers_that_shall_stand_still_do_through_a_run(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    chosen = settings(targets=["attention", "text"], steps=2, rates={"text": 0.0, "layers": {"unet.*attn1*": 0.0}})
    train(chosen, str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
    adapter, _ = read_adapter(tmp_path / "out" / "adapter.safetensors")
    moved = {name for name, delta in adapter.modules.items() if delta.factors()["up"].any()}
    assert moved == {name for name in adapter.modules if "attn2" in name}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rates": {"text": 1e-5}}, "no layer of a text encoder"),
        ({"rates": {"layers": {"unet.nowhere.*": 1e-5}}}, "nowhere"),
        ({"rates": {"up_ratio": 4.0}, "kind": "ia3"}, "no factor 'up'"),
        ({"objective": {"timesteps": {"shift": 3.0}}}, "shift 3.0"),
    ],
)
def test_rates_and_objectives_that_do_not_suit_are_refused_before_any_work(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, change: dict[str, Any], problem: str
) -> None:
    told: list[int] = []
    with pytest.raises(SettingsError, match=problem):
        train(
            settings(method="dreambooth", **change),
            str(bases["small-sd"]),
            dataset,
            tmp_path / "out",
            tmp_path / "work",
            progress=lambda done, total, values: told.append(done),
        )
    assert told == []
    assert not (tmp_path / "out").exists()


OBJECTIVE: dict[str, Any] = {
    "weighting": "min_snr",
    "loss": {"name": "huber", "delta": 0.3},
    "timesteps": {"distribution": "logit_normal", "low": 0.2},
    "noise_offset": 0.1,
    "pyramid": {},
    "input_perturbation": 0.1,
}
RATES: dict[str, Any] = {"text": 1e-4, "up_ratio": 4.0, "ema": {"decay": 0.8}}


class StopAtStep:
    """Says stop when so many steps are done."""

    def __init__(self, step: int) -> None:
        self.step, self.ready = step, False

    def __call__(self) -> bool:
        return self.ready

    def tell(self, done: int, total: int, values: Any) -> None:
        self.ready = "loss" in values and done >= self.step


def resumes(base: str, dataset: Path, tmp_path: Path, chosen: TrainSettings, stops: tuple[int, ...]) -> bool:
    train(chosen, base, dataset, tmp_path / "straight", tmp_path / "fresh")
    for stop in map(StopAtStep, stops):
        with pytest.raises(InterruptedRun):
            train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work", stop=stop, progress=stop.tell)
    train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work")
    files = sorted(path.name for path in (tmp_path / "straight").iterdir())
    return all(sha256_file(tmp_path / "straight" / name) == sha256_file(tmp_path / "resumed" / name) for name in files)


def test_a_run_with_every_objective_and_rate_resumes_to_the_same_bytes(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    chosen = settings(
        method="dreambooth",
        targets=["attention", "text"],
        objective=OBJECTIVE,
        rates=RATES,
        validate_every=2,
        accumulate=2,
        schedule={"name": "cosine-restarts", "cycles": 2},
    )
    assert resumes(str(bases["small-sd-v"]), dataset, tmp_path, chosen, (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw-8bit", "lion", "adafactor", "prodigy", "d-adaptation", "schedule-free"])
def test_a_run_with_any_optimiser_resumes_to_the_same_bytes(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, name: str
) -> None:
    if name != "adafactor":
        pytest.importorskip("bitsandbytes" if name == "adamw-8bit" else "pytorch_optimizer")
    chosen = settings(
        rates={"optimiser": name},
        learning_rate=1.0 if name in ("prodigy", "d-adaptation") else 1e-3,
        schedule="constant",
        validate_every=2,
        steps=5,
    )
    assert resumes(str(bases["small-sd"]), dataset, tmp_path, chosen, (1, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"objective": {key: value}} for key, value in OBJECTIVE.items()]
    + [{"rates": {key: value}} for key, value in RATES.items()]
    + [{"schedule": {"name": "polynomial", "power": 3.0}}, {"rates": {"optimiser": "adafactor"}}],
    ids=lambda change: str(change)[:60],
)
def test_each_setting_counts(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, change: dict[str, Any]
) -> None:
    found = []
    for name, more in (("plain", {}), ("changed", change)):
        chosen = settings(method="dreambooth", targets=["attention", "text"], **more)
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / name, tmp_path / "work")
        adapter, _ = read_adapter(tmp_path / name / "adapter.safetensors")
        found.append(torch.cat([delta.factors()["up"].flatten() for delta in adapter.modules.values()]))
    assert not torch.equal(*found)
