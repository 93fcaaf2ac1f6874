"""Optimisers, averages of the weights and schedules on a small problem: laws over the registries."""

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
from lora_engine.training.ema import RunningMean, decay_at
from lora_engine.training.loop import FitOptions, History, fit
from lora_engine.training.losses import DenoisingLoss
from lora_engine.training.measure import Measure
from lora_engine.training.optimizers import build_optimiser, optimizers, require_optimiser
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.schedules import rate_factor, schedules
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.objective import L1, L2, Huber, SmoothL1
from lora_engine.training.specs.rates import AnyOptimizer, Ema, Optimizer
from lora_engine.training.specs.schedules import AnySchedule

SPECS: dict[str, Optimizer] = {found().name: found() for found in get_args(get_args(AnyOptimizer)[0])}
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
    """Factors of several shapes, one of which begins at zero, as `up` does."""

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


def phases(problem: Problem, rate: float, steps: int = 12, **change: Any) -> list[Phase]:
    def look(found: Batch) -> tuple[Tensor, Tensor]:
        return problem(found.latents), found.latents @ problem.goal.T

    def phase(name: str, names: str) -> Phase:
        groups = tuple(ParameterGroup({key: getattr(problem, key)}, rate) for key in names.split())
        return Phase(**{"terms": (DenoisingLoss(),), "batch": batch, "predict": look, **change}, **named(name, groups))

    def named(name: str, groups: tuple[ParameterGroup, ...]) -> dict[str, Any]:
        return {"name": name, "groups": groups, "steps": steps // 2}

    return [phase("first", "down up"), phase("second", "up gain")]


def options(name: str, **change: Any) -> FitOptions:
    return FitOptions(**{"optimiser": name, "optimiser_options": SPECS[name].options(), "weight_decay": 0.01, **change})


def rate_of(name: str) -> float:
    return 1.0 if SPECS[name].finds_rate else {"lion": 5e-3}.get(name, 1e-2)


def same(first: Problem, second: Problem) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_optimiser_and_schedule_that_can_be_chosen_exists_and_the_other_way_round() -> None:
    assert set(SPECS) == set(optimizers)
    assert {found().name for found in get_args(get_args(AnySchedule)[0])} == set(schedules)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimiser_lowers_the_loss_from_a_factor_of_zeros(name: str) -> None:
    problem = Problem()
    change = {"steps": 240 if SPECS[name].finds_rate else 60}
    history = fit(phases(problem, rate_of(name), **change), [problem], options(name))
    assert sum(history.loss[-10:]) < 0.5 * sum(history.loss[:10])


def stopped(
    tmp_path: Path, name: str, stops: list[int], validate_every: int = 3, ema: Ema | None = None
) -> tuple[Problem, History]:
    chosen = options(name, validate_every=validate_every, ema=ema, checkpoint_every=5, accumulate=2, warmup=2)
    for stop in [*stops, 99]:
        problem = Problem()
        taken: list[int] = []
        extra: dict[str, Any] = {
            "checkpoints": Checkpoints(tmp_path, "job"),
            "validate": lambda problem=problem: problem(batch(99).latents).square().mean().item(),
            "progress": lambda done, total, values, taken=taken: taken.append(done),
            "stop": lambda taken=taken, stop=stop: (taken[-1] if taken else 0) >= stop,
        }
        if stop < 12:
            with pytest.raises(InterruptedRun):
                fit(phases(problem, rate_of(name)), [problem], chosen, **extra)
        else:
            history = fit(phases(problem, rate_of(name)), [problem], chosen, **extra)
    return problem, history


@pytest.mark.parametrize("ema", [None, Ema(decay=0.9)])
@pytest.mark.parametrize("name", EVERY)
def test_every_optimiser_and_mean_resumes_to_the_same_bytes(tmp_path: Path, name: str, ema: Ema | None) -> None:
    straight, expected = stopped(tmp_path / "straight", name, [], ema=ema)
    assert not same(straight, Problem())
    for stops in ([0, 1], [6], [7, 11]):
        resumed, history = stopped(tmp_path / "-".join(map(str, stops)), name, stops, ema=ema)
        assert same(resumed, straight)
        assert history == expected


@pytest.mark.parametrize("ema", [None, Ema(decay=0.9)])
@pytest.mark.parametrize("name", EVERY)
def test_how_often_a_run_is_looked_at_changes_no_byte_of_it(tmp_path: Path, name: str, ema: Ema | None) -> None:
    often, _ = stopped(tmp_path / "often", name, [], validate_every=1, ema=ema)
    never, _ = stopped(tmp_path / "never", name, [], validate_every=0, ema=ema)
    assert same(often, never)


def test_a_state_that_is_not_put_back_changes_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, _ = stopped(tmp_path / "straight", "adamw", [], ema=Ema(decay=0.9))
    monkeypatch.setattr(RunningMean, "restore", lambda *_: None)
    forgetful, _ = stopped(tmp_path / "forgetful", "adamw", [8], ema=Ema(decay=0.9))
    assert not same(forgetful, straight)


@pytest.mark.parametrize("name", [chosen for chosen in EVERY if SPECS[str(chosen.values[0])].finds_rate])
def test_the_rate_that_was_found_is_told_and_kept_over_a_stop(tmp_path: Path, name: str) -> None:
    _, history = stopped(tmp_path, name, [9])
    assert history.rate[0] < 1e-4
    assert history.rate[5] > 2 * history.rate[0]


@pytest.mark.parametrize("name", [chosen for chosen in EVERY if SPECS[str(chosen.values[0])].finds_rate])
def test_an_optimiser_that_finds_one_rate_refuses_two(name: str) -> None:
    problem = Problem()
    groups = (ParameterGroup({"down": problem.down}, 1.0), ParameterGroup({"up": problem.up}, 0.5))
    with pytest.raises(SettingsError, match=r"2 are set: 0.5, 1"):
        build_optimiser(name, groups, 0.0, SPECS[name].options())
    build_optimiser("adamw", groups, 0.0, {})


@pytest.mark.parametrize("name", sorted(module._PACKAGES))
def test_a_package_that_is_missing_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None)
    with pytest.raises(SettingsError, match=name) as error:
        require_optimiser(name)
    assert "loraline[optimisers]" in error.value.remedy
    assert "adafactor, adamw" in error.value.allowed


def test_an_unknown_optimiser_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="prodigi"):
        require_optimiser("prodigi")
    with pytest.raises(ValidationError, match="adamw"):
        TrainSettings.model_validate({"steps": 1, "rates": {"optimiser": "prodigi"}})


def test_weight_decay_is_the_groups_own_where_it_has_one() -> None:
    problem = Problem()
    groups = (
        ParameterGroup({"down": problem.down}, 0.1, weight_decay=0.0),
        ParameterGroup({"gain": problem.gain}, 0.1),
    )
    optimiser = build_optimiser("adamw", groups, 0.5, {})
    for value in (problem.down, problem.gain):
        value.grad = torch.zeros_like(value)
    optimiser.step()
    assert torch.equal(problem.down, Problem().down)
    torch.testing.assert_close(problem.gain.detach(), torch.full((72,), 0.95))


LOSSES = [L2(), L1(), Huber(), SmoothL1()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("weighed", [False, True])
def test_nan_stops_within_the_step_whatever_the_loss(tmp_path: Path, loss: Any, weighed: bool) -> None:
    def broken(number: int) -> Batch:
        found = batch(number)
        if number == 2:
            found.latents[3, 5] = float("nan")
        return found

    told: list[int] = []
    terms = (DenoisingLoss(Measure(loss, (lambda steps: torch.ones(len(steps))) if weighed else None)),)
    problem = Problem()
    with pytest.raises(NonFiniteError, match="the loss is nan at step 3 of 12"):
        fit(
            phases(problem, 1e-3, batch=broken, terms=terms),
            [problem],
            FitOptions(checkpoint_every=1),
            checkpoints=Checkpoints(tmp_path, "job"),
            progress=lambda done, total, values: told.append(done),
        )
    kept = Checkpoints(tmp_path, "job").load()
    assert told == [1, 2]
    assert kept is not None
    assert all(torch.isfinite(value).all() for value in kept.tensors.values())


@pytest.mark.parametrize("name", EVERY)
def test_weights_that_overflow_stop_in_the_same_step_whatever_the_optimiser(name: str) -> None:
    # Each of them scales its gradient, so it is the weights that overflow.
    problem = Problem()
    with pytest.raises(NonFiniteError, match="at step"):
        fit(phases(problem, 1e30, steps=40), [problem], options(name, clip=0.0))


@pytest.mark.parametrize("warmup", [False, True])
def test_the_mean_is_that_of_its_definition_and_is_what_is_left(warmup: bool) -> None:
    seen: list[Tensor] = []
    problem = Problem()
    chosen = options("adamw", ema=Ema(decay=0.8, warmup=warmup))
    (only,) = phases(problem, 0.01)[:1]
    fit(
        [only],
        [problem],
        chosen,
        progress=lambda done, total, values: seen.append(problem.up.detach().clone()),
    )
    mean = torch.zeros(72, 64)
    assert len(seen) == 6
    for step, value in enumerate(seen):
        share = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
        mean = share * mean + (1 - share) * value
    torch.testing.assert_close(problem.up.detach(), mean)
    assert not torch.equal(problem.up, seen[-1])


def test_a_look_is_taken_when_it_is_due_and_sees_the_mean() -> None:
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


def test_the_last_step_is_left_where_that_is_wanted_and_the_mean_is_validated() -> None:
    def run(ema: Ema | None) -> tuple[Problem, History]:
        problem = Problem()
        chosen = options("adamw", ema=ema, validate_every=6)
        return problem, fit(
            phases(problem, 0.01), [problem], chosen, validate=lambda: problem.up.detach().square().sum().item()
        )

    (plain, plain_history), (last, last_history), (mean, mean_history) = map(
        run, (None, Ema(decay=0.9, written="last"), Ema(decay=0.9))
    )
    assert same(plain, last)
    assert not same(plain, mean)
    assert plain_history.validation != last_history.validation
    # What was validated last is what is left.
    assert mean_history.validation[-1][1] == pytest.approx(mean.up.detach().square().sum().item())


def test_the_memory_of_a_mean_grows_to_its_decay() -> None:
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
        ({"rates": {"optimiser": "prodigy"}, "learning_rate": 1.0, "method": "pivotal"}, "another optimiser"),
        ({"rates": {"optimiser": "prodigy"}, "learning_rate": 1.0, "method": "textual-inversion"}, "another optimiser"),
        ({"rates": {"optimiser": {"name": "lion", "eps": 1e-8}}}, "eps"),
        ({"rates": {"optimiser": {"name": "adamw", "betas": [0.9, 1.0]}}}, "betas"),
        ({"rates": {"ema": {"decay": 1.0}}}, "decay"),
        ({"rates": {"up_ratio": 0.5}}, "up_ratio"),
        ({"rates": {"layers": {"unet.*": -1.0}}}, "layers"),
        ({"schedule": {"name": "cosine", "cycles": 2}}, "cycles"),
        ({"schedule": {"name": "cosine-restarts", "cycles": 0}}, "cycles"),
        ({"schedule": {"name": "polynomial", "power": 0.0}}, "power"),
    ],
)
def test_what_does_not_go_together_is_refused_and_says_what_to_set(change: dict[str, Any], problem: str) -> None:
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
def test_what_goes_together_is_taken_and_survives_json(change: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate({"steps": 10, **change})
    assert TrainSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_settings_of_the_objective_and_of_rates_need_no_torch() -> None:
    code = (
        "import sys, lora_engine.training.specs.objective, lora_engine.training.specs.rates, "
        "lora_engine.training.specs.schedules; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def theirs(make: Callable[..., Any], **options: Any) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimiser, num_warmup_steps=0, num_training_steps=24, **options)
    found = []
    for _ in range(24):
        found.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    return found


def test_schedules_are_those_of_diffusers() -> None:
    from diffusers import optimization as peer

    pairs: list[tuple[str, dict[str, Any], list[float]]] = [
        ("linear", {}, theirs(peer.get_linear_schedule_with_warmup)),
        ("cosine", {}, theirs(peer.get_cosine_schedule_with_warmup)),
        (
            "cosine-restarts",
            {"cycles": 3},
            theirs(peer.get_cosine_with_hard_restarts_schedule_with_warmup, num_cycles=3),
        ),
        ("polynomial", {"power": 3.0}, theirs(peer.get_polynomial_decay_schedule_with_warmup, power=3.0, lr_end=0.0)),
    ]
    for name, settings, expected in pairs:
        mine = [rate_factor(name, step, 24, 0, **settings) for step in range(24)]
        assert mine == pytest.approx(expected, abs=1e-9), name
    assert rate_factor("polynomial", 12, 24, 0, power=3.0) != rate_factor("polynomial", 12, 24, 0, power=2.0)


def test_restarts_jump_back_to_the_top_once_a_cycle() -> None:
    factors = [rate_factor("cosine-restarts", step, 110, 10, cycles=4) for step in range(110)]
    tops = [step for step in range(1, 110) if factors[step] > factors[step - 1] and step > 10]
    assert tops == [35, 60, 85]
    assert all(factors[step] == 1.0 for step in (10, *tops))
