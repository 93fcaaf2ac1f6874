"""Learning rates of factors, on small problems and through a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_engine.errors import SettingsError
from lora_engine.training.rates import groups_for
from lora_engine.training.specs.rates import Rates
from tests.lora_engine.training.runs import Runs, factors_of

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
    factors = parameters()
    (group,) = groups_for(factors, Rates(), 1e-3)
    assert list(group.parameters.items()) == list(factors.items())
    assert group.learning_rate == 1e-3
    assert group.weight_decay is None


def test_text_encoders_have_a_rate_of_their_own() -> None:
    rates = rates_of({"text": 1e-5})
    assert {name: rate for name, rate in rates.items() if rate != 1e-3} == {
        f"{MODULES[2]}.{factor}": 1e-5 for factor in ("down", "up")
    }


def test_patterns_set_the_rates_of_layers_and_the_last_one_wins() -> None:
    rates = rates_of({"text": 1e-5, "layers": {"attention": 2e-3, "unet.mid_block.*": 5e-4, "re:text.*q_proj": 1e-6}})
    assert [rates[f"{module}.down"] for module in MODULES] == [2e-3, 5e-4, 1e-6]


def test_up_ratio_multiplies_the_rate_of_up_factors() -> None:
    rates = rates_of({"up_ratio": 16.0, "text": 1e-5})
    for module, rate in zip(MODULES, (1e-3, 1e-3, 1e-5), strict=True):
        assert rates[f"{module}.down"] == rate
        assert rates[f"{module}.up"] == pytest.approx(16 * rate)


def test_the_common_rate_comes_first_for_the_curves() -> None:
    backwards = dict(reversed(parameters().items()))
    groups = groups_for(backwards, Rates(text=1e-5, layers={"unet.mid*": 1e-2}), 1e-3)
    assert [group.learning_rate for group in groups] == [1e-3, 1e-5, 1e-2]


def test_a_rate_of_zero_freezes_layers() -> None:
    assert set(rates_of({"text": 0.0})) == {f"{module}.{factor}" for module in MODULES[:2] for factor in ("down", "up")}


@pytest.mark.parametrize(
    ("settings", "factors", "problem"),
    [
        ({"layers": {"unet.up_blocks.*": 1e-3}}, ("down", "up"), r"unet\.up_blocks"),
        ({"layers": {"linear": 1e-3}}, ("down", "up"), "by shape"),
        ({"up_ratio": 2.0}, ("w1", "down2"), "no factor 'up'"),
        ({"layers": {"*": 0.0}}, ("down", "up"), "all 6 factors have a learning rate of 0"),
    ],
)
def test_rates_without_effect_are_refused(settings: dict[str, Any], factors: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        rates_of(settings, factors)


def test_a_rate_for_text_without_text_is_refused() -> None:
    only = {name: value for name, value in parameters().items() if name.startswith("unet")}
    with pytest.raises(SettingsError, match="no layer of a text encoder is adapted"):
        groups_for(only, Rates(text=1e-5), 1e-3)


def test_layers_with_a_rate_of_zero_do_not_move_in_a_run(runs: Runs) -> None:
    chosen = {"targets": ["attention", "text"], "rates": {"text": 0.0, "layers": {"unet.*attn1*": 0.0}}}
    ups = {name: value for name, value in factors_of(runs(steps=2, **chosen)).items() if name.endswith("up")}
    moved = {name for name, value in ups.items() if value.any()}
    assert moved == {name for name in ups if "attn2" in name}
    assert len(moved) < len(ups)
