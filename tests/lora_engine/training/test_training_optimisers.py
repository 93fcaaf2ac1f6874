"""Optimizers, averages of the weights and schedules on a small problem: laws over the registries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import InterruptedRun, NonFiniteError, SettingsError
from lora_engine.seeds import generator
from lora_engine.training import optimizers as module
from lora_engine.training.batches import Batch
from lora_engine.training.checkpoint import Checkpoints
from lora_engine.training.ema import EmaWeights, decay_at
from lora_engine.training.loop import FitOptions, History, fit
from lora_engine.training.losses import DenoisingLoss
from lora_engine.training.measure import Measure
from lora_engine.training.optimizers import build_optimizer, optimizers, require_optimizer
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.schedules import rate_factor, schedules
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.objective import L1, L2, Huber, SmoothL1
from lora_engine.training.specs.rates import AnyOptimizer, Ema, Optimizer
from lora_engine.training.specs.schedules import AnySchedule

SPECS: dict[str, Optimizer] = {spec().name: spec() for spec in get_args(get_args(AnyOptimizer)[0])}
MODULES = {name: module._PACKAGES.get(name, ("torch", ""))[0] for name in SPECS}
EVERY = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(MODULES[name]) is None, reason=f"{MODULES[name]} is not installed"
        ),
    )
    for name in SPECS
]


class Problem(nn.Module):
    """Factors of several shapes, one of which is initialized with zero, like `up`."""

    def __init__(self) -> None:
        super().__init__()
        draw = generator(0, "problem")
        self.down = nn.Parameter(torch.randn(64, 72, generator=draw) / 8)
        self.up = nn.Parameter(torch.zeros(72, 64))
        self.gain = nn.Parameter(torch.ones(72))
        self.register_buffer("goal", torch.randn(72, 72, generator=draw) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x @ self.down.T @ self.up.T)


def batch(number: int) -> Batch:
    clean = torch.randn(16, 72, generator=generator(1, number))
    return Batch(clean, clean, torch.zeros(16, dtype=torch.int64), Conditioning({}), 16)


def phases(problem: Problem, rate: float | str, steps: int = 12, **change: Any) -> list[Phase]:
    """Returns two phases at a rate, or for an optimizer at its rate."""
    name, rate = (rate, rate_of(rate)) if isinstance(rate, str) else ("", rate)

    def predict(batch: Batch) -> tuple[Tensor, Tensor]:
        return problem(batch.latents), batch.latents @ problem.goal.T

    def phase(name: str, names: str) -> Phase:
        groups = tuple(ParameterGroup({key: getattr(problem, key)}, rate) for key in names.split())
        return Phase(
            **{"terms": (DenoisingLoss(),), "batch": batch, "predict": predict, **change}, **named(name, groups)
        )

    def named(name: str, groups: tuple[ParameterGroup, ...]) -> dict[str, Any]:
        return {"name": name, "groups": groups, "steps": steps // 2}

    # Muon trains matrices alone.
    return [phase("first", "down up"), phase("second", "up" if name == "muon" else "up gain")]


def options(name: str, **change: Any) -> FitOptions:
    return FitOptions(**{"optimizer": name, "optimizer_options": SPECS[name].options(), "weight_decay": 0.01, **change})


def rate_of(name: str) -> float:
    return 1.0 if SPECS[name].finds_rate else {"lion": 5e-3, "sgd": 0.3, "came": 1e-3, "muon": 5e-2}.get(name, 1e-2)


def same(first: Problem, second: Problem) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_settings_and_registries_have_the_same_optimizers_and_schedules() -> None:
    assert set(SPECS) == set(optimizers)
    assert {spec().name for spec in get_args(get_args(AnySchedule)[0])} == set(schedules)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_lowers_the_loss_from_a_zero_factor(name: str) -> None:
    problem = Problem()
    change = {"steps": 240 if SPECS[name].finds_rate else 60}
    history = fit(phases(problem, name, **change), [problem], options(name))
    assert sum(history.loss[-10:]) < 0.5 * sum(history.loss[:10])


def run_with_stops(
    tmp_path: Path, name: str, stops: list[int], validate_every: int = 3, ema: Ema | None = None, **change: Any
) -> tuple[Problem, History]:
    usual = {"checkpoint_every": 5, "accumulate": 2, "warmup": 2}
    fit_options = options(name, validate_every=validate_every, ema=ema, **{**usual, **change})
    for stop in [*stops, 99]:
        problem = Problem()
        steps: list[int] = []
        arguments: dict[str, Any] = {
            "checkpoints": Checkpoints(tmp_path, "job"),
            "validate": lambda problem=problem: problem(batch(99).latents).square().mean().item(),
            "progress": lambda done, total, values, steps=steps: steps.append(done),
            "stop": lambda steps=steps, stop=stop: (steps[-1] if steps else 0) >= stop,
        }
        if stop < 12:
            with pytest.raises(InterruptedRun):
                fit(phases(problem, name), [problem], fit_options, **arguments)
        else:
            history = fit(phases(problem, name), [problem], fit_options, **arguments)
    return problem, history


@pytest.mark.parametrize("ema", [None, Ema(decay=0.9)])
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_and_average_resumes_to_the_same_bytes(tmp_path: Path, name: str, ema: Ema | None) -> None:
    straight, expected = run_with_stops(tmp_path / "straight", name, [], ema=ema)
    assert not same(straight, Problem())
    for stops in ([0, 1], [6], [7, 11]):
        resumed, history = run_with_stops(tmp_path / "-".join(map(str, stops)), name, stops, ema=ema)
        assert same(resumed, straight)
        assert history == expected


@pytest.mark.parametrize("name", schedules)
def test_every_schedule_resumes_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    options_of = {"wsd": {"decay": 0.6}}  # else the last of the six steps of a phase alone
    change: dict[str, Any] = {"schedule": name, "schedule_options": options_of.get(name, {}), "warmup": "20%"}
    straight, expected = run_with_stops(tmp_path / "straight", "adamw", [], **change)
    resumed, history = run_with_stops(tmp_path / "resumed", "adamw", [1, 4, 8], **change)
    assert same(resumed, straight)
    assert history == expected
    constant, _ = run_with_stops(tmp_path / "constant", "adamw", [], warmup="20%")
    assert same(resumed, constant) == (name == "constant")


@pytest.mark.parametrize("ema", [None, Ema(decay=0.9)])
@pytest.mark.parametrize("name", EVERY)
def test_the_number_of_validations_changes_no_byte(tmp_path: Path, name: str, ema: Ema | None) -> None:
    often, _ = run_with_stops(tmp_path / "often", name, [], validate_every=1, ema=ema)
    never, _ = run_with_stops(tmp_path / "never", name, [], validate_every=0, ema=ema)
    assert same(often, never)


def test_a_state_that_is_not_restored_changes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, _ = run_with_stops(tmp_path / "straight", "adamw", [], ema=Ema(decay=0.9))
    monkeypatch.setattr(EmaWeights, "restore", lambda *_: None)
    forgetful, _ = run_with_stops(tmp_path / "forgetful", "adamw", [8], ema=Ema(decay=0.9))
    assert not same(forgetful, straight)


@pytest.mark.parametrize("name", [param for param in EVERY if SPECS[str(param.values[0])].finds_rate])
def test_the_estimated_rate_is_reported_and_survives_a_resume(tmp_path: Path, name: str) -> None:
    _, history = run_with_stops(tmp_path, name, [9])
    assert history.rate[0] < 1e-4
    assert history.rate[5] > 2 * history.rate[0]


@pytest.mark.parametrize("name", [param for param in EVERY if SPECS[str(param.values[0])].finds_rate])
def test_an_optimizer_that_estimates_one_rate_refuses_two(name: str) -> None:
    problem = Problem()
    groups = (ParameterGroup({"down": problem.down}, 1.0), ParameterGroup({"up": problem.up}, 0.5))
    with pytest.raises(SettingsError, match=r"2 are set: 0.5, 1"):
        build_optimizer(name, groups, 0.0, SPECS[name].options())
    build_optimizer("adamw", groups, 0.0, {})


@pytest.mark.parametrize("name", sorted(module._PACKAGES))
def test_a_missing_package_is_reported_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=name) as error:
        require_optimizer(name)
    assert "loraline[optimisers]" in error.value.remedy
    assert "adafactor, adamw" in error.value.allowed


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="prodigi"):
        require_optimizer("prodigi")
    with pytest.raises(ValidationError, match="adamw"):
        TrainSettings.model_validate({"steps": 1, "rates": {"optimiser": "prodigi"}})


def test_a_group_may_set_its_own_weight_decay() -> None:
    problem = Problem()
    groups = (
        ParameterGroup({"down": problem.down}, 0.1, weight_decay=0.0),
        ParameterGroup({"gain": problem.gain}, 0.1),
    )
    optimizer = build_optimizer("adamw", groups, 0.5, {})
    for value in (problem.down, problem.gain):
        value.grad = torch.zeros_like(value)
    optimizer.step()
    assert torch.equal(problem.down, Problem().down)
    torch.testing.assert_close(problem.gain.detach(), torch.full((72,), 0.95))


LOSSES = [L2(), L1(), Huber(), SmoothL1()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("weighed", [False, True])
def test_nan_stops_within_the_step_whatever_the_loss(tmp_path: Path, loss: Any, weighed: bool) -> None:
    def broken(number: int) -> Batch:
        drawn = batch(number)
        if number == 2:
            drawn.latents[3, 5] = float("nan")
        return drawn

    reported: list[int] = []
    terms = (DenoisingLoss(Measure(loss, (lambda steps: torch.ones(len(steps))) if weighed else None)),)
    problem = Problem()
    with pytest.raises(NonFiniteError, match="the loss is nan at step 3 of 12"):
        fit(
            phases(problem, 1e-3, batch=broken, terms=terms),
            [problem],
            FitOptions(checkpoint_every=1),
            checkpoints=Checkpoints(tmp_path, "job"),
            progress=lambda done, total, values: reported.append(done),
        )
    checkpoint = Checkpoints(tmp_path, "job").load()
    assert reported == [1, 2]
    assert checkpoint is not None
    assert all(torch.isfinite(value).all() for value in checkpoint.tensors.values())


@pytest.mark.parametrize("name", EVERY)
def test_overflowing_weights_stop_any_optimizer_in_the_same_step(name: str) -> None:
    # Each optimizer scales its gradient, so the weights overflow.
    problem = Problem()
    with pytest.raises(NonFiniteError, match="at step"):
        fit(phases(problem, 1e30, steps=40), [problem], options(name, clip=0.0))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_ema_matches_its_definition_and_is_the_result(warmup: bool) -> None:
    seen: list[Tensor] = []
    problem = Problem()
    fit_options = options("adamw", ema=Ema(decay=0.8, warmup=warmup))
    (only,) = phases(problem, 0.01)[:1]
    fit(
        [only],
        [problem],
        fit_options,
        progress=lambda done, total, values: seen.append(problem.up.detach().clone()),
    )
    mean = torch.zeros(72, 64)
    assert len(seen) == 6
    for step, value in enumerate(seen):
        share = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
        mean = share * mean + (1 - share) * value
    torch.testing.assert_close(problem.up.detach(), mean)
    assert not torch.equal(problem.up, seen[-1])


def test_observations_are_made_when_due_and_see_the_ema() -> None:
    problem, seen, now = Problem(), {}, {}
    fit(
        phases(problem, 0.01),
        [problem],
        options("adamw", ema=Ema(decay=0.9), observe_every=6),
        observe=lambda done: seen.update({done: problem.up.detach().clone()}),
        progress=lambda done, total, values: now.update({done: problem.up.detach().clone()}),
    )
    assert list(seen) == [6, 12]
    assert not torch.equal(seen[6], now[6])
    assert torch.equal(seen[12], problem.up)


def test_written_last_keeps_the_last_step_and_validates_the_ema() -> None:
    def run(ema: Ema | None) -> tuple[Problem, History]:
        problem = Problem()
        fit_options = options("adamw", ema=ema, validate_every=6)
        return problem, fit(
            phases(problem, 0.01), [problem], fit_options, validate=lambda: problem.up.detach().square().sum().item()
        )

    (plain, plain_history), (last, last_history), (mean, mean_history) = map(
        run, (None, Ema(decay=0.9, written="last"), Ema(decay=0.9))
    )
    assert same(plain, last)
    assert not same(plain, mean)
    assert plain_history.validation != last_history.validation
    # The last validation used the final weights.
    assert mean_history.validation[-1][1] == pytest.approx(mean.up.detach().square().sum().item())


def test_the_warmup_raises_the_decay_to_its_setting() -> None:
    shares = [decay_at(Ema(decay=0.99), step) for step in range(2000)]
    assert shares[0] == 0.1
    assert shares == sorted(shares)
    assert shares[-1] == 0.99
    assert decay_at(Ema(decay=0.99, warmup=False), 0) == 0.99


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rates": {"optimiser": "prodigy"}}, r"learning_rate: 1.0"),
        ({"rates": {"optimiser": "d-adaptation"}}, r"learning_rate: 1.0"),
        ({"rates": {"optimiser": "schedule-free"}}, "schedule: constant"),
        ({"rates": {"optimiser": "schedule-free", "ema": {}}, "schedule": "constant"}, "leave out ema"),
        ({"rates": {"optimiser": "prodigy", "text": 0.5}, "learning_rate": 1.0}, "leave out text"),
        ({"rates": {"optimiser": "prodigy", "up_ratio": 4.0}, "learning_rate": 1.0}, "leave out up_ratio"),
        ({"rates": {"optimiser": "prodigy"}, "learning_rate": 1.0, "method": "pivotal"}, "another optimizer"),
        ({"rates": {"optimiser": "prodigy"}, "learning_rate": 1.0, "method": "textual-inversion"}, "another optimizer"),
        ({"rates": {"optimiser": {"name": "lion", "eps": 1e-8}}}, "eps"),
        ({"rates": {"optimiser": {"name": "adamw", "betas": [0.9, 1.0]}}}, "betas"),
        ({"rates": {"ema": {"decay": 1.0}}}, "decay"),
        ({"rates": {"up_ratio": 0.5}}, "up_ratio"),
        ({"rates": {"layers": {"unet.*": -1.0}}}, "layers"),
        ({"schedule": {"name": "cosine", "cycles": 2}}, "cycles"),
        ({"schedule": {"name": "cosine-restarts", "cycles": 0}}, "cycles"),
        ({"schedule": {"name": "polynomial", "power": 0.0}}, "power"),
        ({"schedule": {"name": "cosine", "floor": 1.5}}, "floor"),
        ({"schedule": {"name": "wsd", "decay": 0.0}}, "decay"),
        ({"schedule": {"name": "wsd", "form": "cubic"}}, "form"),
        ({"schedule": {"name": "inverse-sqrt", "timescale": 0}}, "timescale"),
        ({"schedule": {"name": "rex", "floor": -0.1}}, "floor"),
        ({"rates": {"optimiser": {"name": "sgd", "momentum": 0.0, "nesterov": True}}}, "set momentum"),
        ({"rates": {"optimiser": {"name": "came", "betas": [0.9, 0.99]}}}, "betas"),
        ({"rates": {"optimiser": {"name": "ademamix", "grow": 0}}}, "grow"),
    ],
)
def test_incompatible_settings_are_refused_with_a_fix(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainSettings.model_validate({"steps": 10, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"rates": {"optimiser": "prodigy"}, "learning_rate": 1.0},
        {"rates": {"optimiser": "schedule-free"}, "schedule": "constant"},
        {"rates": {"text": 0.0, "layers": {"unet.*": 0.0}, "up_ratio": 16.0, "ema": {}}},
    ],
)
def test_compatible_settings_survive_json(change: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate({"steps": 10, **change})
    assert TrainSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_settings_of_the_objective_and_of_rates_need_no_torch() -> None:
    code = (
        "import sys, lora_engine.training.specs.objective, lora_engine.training.specs.rates, "
        "lora_engine.training.specs.schedules; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def diffusers_rates(make: Callable[..., Any], **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=0, num_training_steps=24, **options)
    rates = []
    for _ in range(24):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_are_those_of_diffusers() -> None:
    from diffusers import optimization as peer

    pairs: list[tuple[str, dict[str, Any], list[float]]] = [
        ("linear", {}, diffusers_rates(peer.get_linear_schedule_with_warmup)),
        ("cosine", {}, diffusers_rates(peer.get_cosine_schedule_with_warmup)),
        (
            "cosine-restarts",
            {"cycles": 3},
            diffusers_rates(peer.get_cosine_with_hard_restarts_schedule_with_warmup, num_cycles=3),
        ),
        (
            "polynomial",
            {"power": 3.0},
            diffusers_rates(peer.get_polynomial_decay_schedule_with_warmup, power=3.0, lr_end=0.0),
        ),
    ]
    for name, settings, expected in pairs:
        ours = [rate_factor(name, step, 24, 0, **settings) for step in range(24)]
        assert ours == pytest.approx(expected, abs=1e-9), name
    assert rate_factor("polynomial", 12, 24, 0, power=3.0) != rate_factor("polynomial", 12, 24, 0, power=2.0)


def transformers_rates(make: Callable[..., Any], **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=4, **options)
    rates = []
    for _ in range(24):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates[4:]  # the warmup of transformers begins at 0


def test_schedules_with_a_floor_or_without_an_end_are_those_of_transformers() -> None:
    from transformers import optimization as peer

    minimum = peer.get_cosine_with_min_lr_schedule_with_warmup
    wsd = {"num_decay_steps": 5, "num_training_steps": 24}
    pairs: list[tuple[str, dict[str, Any], list[float]]] = [
        ("cosine", {"floor": 0.1}, transformers_rates(minimum, num_training_steps=24, min_lr_rate=0.1)),
        ("wsd", {"decay": 0.25}, transformers_rates(peer.get_wsd_schedule, **wsd)),
        (
            "wsd",
            {"decay": 0.25, "form": "linear", "floor": 0.2},
            transformers_rates(peer.get_wsd_schedule, **wsd, decay_type="linear", min_lr_ratio=0.2),
        ),
        (
            "wsd",
            {"decay": 0.25, "form": "sqrt"},
            transformers_rates(peer.get_wsd_schedule, **wsd, decay_type="1-sqrt"),
        ),
        ("inverse-sqrt", {"timescale": 7}, transformers_rates(peer.get_inverse_sqrt_schedule, timescale=7)),
    ]
    for name, settings, expected in pairs:
        ours = [rate_factor(name, step, 24, 4, **settings) for step in range(4, 24)]
        assert ours == pytest.approx(expected, abs=1e-9), (name, settings)


def test_a_floor_raises_every_schedule_to_it_and_rex_is_that_of_the_paper() -> None:
    for name in ("linear", "cosine", "cosine-restarts", "polynomial", "rex", "wsd"):
        without, raised = ([rate_factor(name, step, 50, 5, floor=floor) for step in range(50)] for floor in (0.0, 0.3))
        assert raised[5:] == pytest.approx([0.3 + 0.7 * factor for factor in without[5:]], abs=1e-12)
        assert min(raised[5:]) >= 0.3
    assert [rate_factor("rex", step, 4, 0) for step in range(4)] == pytest.approx([1.0, 6 / 7, 2 / 3, 0.4])


def test_the_decay_of_sgd_is_decoupled_from_its_momentum() -> None:
    value = nn.Parameter(torch.tensor([2.0]))
    group = ParameterGroup({"value": value}, 0.1)
    optimizer = build_optimizer("sgd", (group,), 0.5, {"momentum": 0.9, "nesterov": False})
    for _ in range(3):
        value.grad = torch.zeros(1)
        optimizer.step()
    torch.testing.assert_close(value.detach(), torch.tensor([2.0 * 0.95**3]))
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert all(not buffer.any() for buffer in buffers)


def test_restarts_jump_back_to_the_top_once_a_cycle() -> None:
    factors = [rate_factor("cosine-restarts", step, 110, 10, cycles=4) for step in range(110)]
    tops = [step for step in range(1, 110) if factors[step] > factors[step - 1] and step > 10]
    assert tops == [35, 60, 85]
    assert all(factors[step] == 1.0 for step in (10, *tops))


def test_muon_refuses_parameters_that_are_not_matrices() -> None:
    group = ParameterGroup({"gain": nn.Parameter(torch.ones(4)), "down": nn.Parameter(torch.ones(4, 2))}, 1e-2)
    with pytest.raises(SettingsError, match=r"trains matrices, but 1 parameters have other shapes, first 'gain' \[4\]"):
        build_optimizer("muon", [group], 0.0, {})


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_paged_state_is_refused_on_a_cpu() -> None:
    group = ParameterGroup({"down": nn.Parameter(torch.ones(4, 2))}, 1e-2)
    spec = TrainSettings.model_validate({"steps": 1, "rates": {"optimiser": {"name": "adamw-8bit", "paged": True}}})
    with pytest.raises(SettingsError, match="paged state needs a GPU, but the training runs on cpu"):
        build_optimizer("adamw-8bit", [group], 0.0, spec.rates.optimiser.options())
    build_optimizer("adamw-8bit", [group], 0.0, SPECS["adamw-8bit"].options())
