"""The noise and timesteps drawn for a batch, and the loss weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.noise import FlowSchedule, NoiseSchedule, flow_schedule_from
from lora_engine.errors import SettingsError
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.losses import DenoisingLoss, PriorLoss
from lora_engine.training.measure import PLAIN, Measure, snr_weights
from lora_engine.training.objective import (
    check_objective,
    draw_perturbation,
    draw_timesteps,
    draw_training_noise,
    measure_for,
    noisy_and_target,
    timestep_grid,
)
from lora_engine.training.specs.objective import Loss, Objective, Weighting

SHAPE = (4, 3, 8, 8)
LOSSES: list[Any] = ["l2", "l1", {"name": "huber", "delta": 0.3}, {"name": "smooth_l1", "delta": 0.3}]
WEIGHTINGS = ["min_snr", "soft_min_snr", "debiased"]


def eps_schedule(parameterization: str = "eps", terminal: float | None = None) -> NoiseSchedule:
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
    if terminal is not None:
        alphas[-1] = terminal
    return NoiseSchedule(alphas, parameterization)


def flow_schedule(**settings: Any) -> FlowSchedule:
    return flow_schedule_from(settings)


def objective(**settings: Any) -> Objective:
    return Objective.model_validate(settings)


def weighting(settings: Any) -> Any:
    return TypeAdapter(Weighting).validate_python(settings)


def measure(settings: Any, **options: Any) -> Measure:
    return Measure(TypeAdapter(Loss).validate_python(settings), **options)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = generator(seed, "pair")
    return torch.randn(SHAPE, generator=draw), torch.randn(SHAPE, generator=draw)


def batch(instances: int = 4, timesteps: Tensor | None = None, **change: Any) -> Batch:
    clean, noise = pair(1)
    chosen = torch.tensor([0, 200, 600, 999]) if timesteps is None else timesteps
    return Batch(clean, noise, chosen, Conditioning({}), instances, **change)


def test_the_default_objective_draws_noise_then_uniform_timesteps() -> None:
    draw, reference = generator(3, "noise"), generator(3, "noise")
    noise = draw_training_noise(Objective(), SHAPE, draw)
    timesteps = draw_timesteps(Objective(), eps_schedule(), 4, draw, (8, 8))
    assert draw_perturbation(Objective(), SHAPE, draw) is None
    assert torch.equal(noise, torch.randn(SHAPE, generator=reference))
    assert torch.equal(timesteps, torch.randint(1000, (4,), generator=reference))
    assert torch.equal(torch.rand(3, generator=draw), torch.rand(3, generator=reference))


def test_the_default_loss_is_the_mean_squared_error() -> None:
    predicted, target = pair()
    plain = measure_for(Objective(), eps_schedule())
    assert plain == PLAIN
    assert torch.equal(DenoisingLoss(plain)(predicted, target, batch()), F.mse_loss(predicted, target))
    assert measure_for(objective(weighting="min_snr"), eps_schedule()) != PLAIN


@pytest.mark.parametrize("snr", [0.0, 1e-4, 0.3, 1.0, 4.9, 5.0, 5.1, 800.0, 5e4])
def test_weights_are_those_of_the_papers(snr: float) -> None:
    def weigh(name: str, predicts_v: bool) -> float:
        return snr_weights(weighting(name), torch.tensor([snr]), predicts_v).item()

    assert weigh("min_snr", True) == pytest.approx(min(snr, 5.0) / (snr + 1))
    assert weigh("min_snr", False) == pytest.approx(min(snr, 5.0) / snr if snr else 1.0)
    assert weigh("soft_min_snr", False) == pytest.approx(4.0 / (snr + 4.0))
    assert weigh("soft_min_snr", True) == pytest.approx(4.0 * snr / ((snr + 4.0) * (snr + 1.0)))
    assert weigh("debiased", True) == pytest.approx(1 / (snr + 1))
    assert weigh("debiased", False) == pytest.approx(1 / math.sqrt(min(max(snr, 1e-3), 1000.0)))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("parameterization", ["eps", "v_prediction"])
def test_a_schedule_that_ends_without_signal_gives_finite_weights(name: str, parameterization: str) -> None:
    schedule = eps_schedule(parameterization, terminal=0.0)
    assert schedule.snr(torch.tensor([999])).item() == 0.0
    weigh = measure_for(objective(weighting=name), schedule).weigh
    assert weigh is not None
    weights = weigh(torch.arange(1000))
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert weights.max() < 40


def test_soft_min_snr_is_min_snr_without_the_kink() -> None:
    ratios = torch.logspace(-4, 4, 60)
    for predicts_v in (False, True):
        soft = snr_weights(weighting({"name": "soft_min_snr", "gamma": 5.0}), ratios, predicts_v)
        hard = snr_weights(weighting("min_snr"), ratios, predicts_v)
        assert (soft <= hard + 1e-6).all()
        assert (soft >= 0.5 * hard - 1e-6).all()


@pytest.mark.parametrize("settings", LOSSES)
def test_losses_and_their_slopes_are_as_defined(settings: Any) -> None:
    name, delta = (settings, 0.0) if isinstance(settings, str) else (settings["name"], settings["delta"])
    errors = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
    predicted = errors.clone().requires_grad_()
    losses = measure(settings).errors(predicted, torch.zeros_like(errors), torch.zeros(41))
    size, inside = errors.abs(), errors.abs() <= delta
    line = 2 * delta * size - delta**2
    expected = {
        "l2": errors**2,
        "l1": size,
        "huber": torch.where(inside, errors**2, line),
        "smooth_l1": torch.where(inside, errors**2, line) / (2 * delta) if delta else size,
    }[name]
    torch.testing.assert_close(losses.detach(), expected)
    (slope,) = torch.autograd.grad(losses.sum(), predicted)
    (expected_slope,) = torch.gradient(expected, spacing=(errors,))
    # Excludes the kinks, where a difference over two steps is not the slope.
    smooth = (inside.roll(1) == inside) & (inside.roll(-1) == inside) & (size > 0.15)
    smooth[[0, -1]] = False
    torch.testing.assert_close(slope[smooth], expected_slope[smooth])
    assert smooth.sum() > 20


def test_huber_tends_to_l2_and_smooth_l1_to_l1() -> None:
    predicted, target = pair()
    steps = torch.zeros(4)
    square = measure("l2").errors(predicted, target, steps)
    torch.testing.assert_close(measure({"name": "huber", "delta": 1e3}).errors(predicted, target, steps), square)
    size = measure("l1").errors(predicted, target, steps)
    small = measure({"name": "smooth_l1", "delta": 1e-6}).errors(predicted, target, steps)
    torch.testing.assert_close(small, size, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", LOSSES)
def test_each_row_is_weighted_by_its_own_timestep_in_both_terms(settings: Any) -> None:
    predicted, target = pair()
    weights = torch.tensor([1.0, 2.0, 0.25, 7.0])
    rows_of_both = batch(instances=1)
    by_step = dict(zip(rows_of_both.timesteps.tolist(), weights.tolist(), strict=True))
    weighed = measure(settings, weigh=lambda steps: torch.tensor([by_step[step] for step in steps.tolist()]))
    row_losses = measure(settings).errors(predicted, target, rows_of_both.timesteps).flatten(1).mean(dim=1) * weights
    assert DenoisingLoss(weighed)(predicted, target, rows_of_both).item() == pytest.approx(
        row_losses[:1].mean().item(), rel=1e-5
    )
    prior = PriorLoss(0.5, weighed)(predicted, target, rows_of_both)
    assert prior.item() == pytest.approx(0.5 * row_losses[1:].mean().item(), rel=1e-5)


@pytest.mark.parametrize("settings", LOSSES)
@pytest.mark.parametrize("prior", [False, True])
def test_elements_of_weight_zero_have_no_gradient_and_others_are_unchanged(settings: Any, prior: bool) -> None:
    inside = torch.zeros(4, 1, 8, 8)
    inside[..., 2:5, 1:7] = 1.0
    for instances in (2, 4):
        predicted, target = pair()
        predicted.requires_grad_()
        slopes = []
        for weights in (inside, None):
            term = PriorLoss(1.0, measure(settings)) if prior else DenoisingLoss(measure(settings))
            loss = term(predicted, target, batch(instances, weights=weights))
            slopes.append(torch.autograd.grad(loss, predicted)[0])
        covered = inside.expand_as(predicted).bool()
        assert torch.equal(slopes[0][~covered], torch.zeros_like(slopes[0][~covered]))
        torch.testing.assert_close(slopes[0][covered], slopes[1][covered])
        # Without weights, the same elements do have one, in the rows of the term; a whole batch has no class images.
        assert bool((slopes[1][~covered] != 0).any()) is not (prior and instances == 4)


def test_a_term_without_rows_is_zero_and_keeps_the_graph() -> None:
    predicted, target = pair()
    predicted.requires_grad_()
    loss = PriorLoss(1.0)(predicted, target, batch(instances=4))
    (slope,) = torch.autograd.grad(loss, predicted)
    assert loss.item() == 0.0
    assert not slope.any()


def steps_of(schedule: NoiseSchedule, count: int = 4000, **settings: Any) -> Tensor:
    chosen = objective(timesteps=settings)
    check_objective(chosen, schedule)
    return draw_timesteps(chosen, schedule, count, generator(0, "steps"), (8, 8))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.5), (0.7, 1.0)])
def test_timesteps_keep_to_their_range(distribution: str, low: float, high: float) -> None:
    whole = steps_of(eps_schedule(), distribution=distribution, low=low, high=high)
    assert whole.dtype == torch.int64
    assert whole.min() >= 1000 * low
    assert whole.max() <= 1000 * high - 1
    assert len(whole.unique()) > 0.8 * 1000 * (high - low)
    flowing = steps_of(flow_schedule(), distribution=distribution, low=low, high=high)
    assert flowing.dtype == torch.float32
    assert flowing.min() >= 1000 * low - 1e-3
    assert flowing.max() <= 1000 * high + 1e-3


def test_distributions_have_the_shapes_of_the_paper() -> None:
    schedule = flow_schedule()
    for name, mean, std in (("logit_normal", 0.0, 1.0), ("logit_normal", 0.8, 0.5)):
        sigmas = schedule.sigma_of(steps_of(schedule, distribution={"name": name, "mean": mean, "std": std}))
        normal = torch.logit(sigmas.double())
        assert normal.mean().item() == pytest.approx(mean, abs=0.05)
        assert normal.std().item() == pytest.approx(std, abs=0.05)
    middle = [
        ((steps_of(schedule, distribution=chosen) - 500).abs() < 250).float().mean().item()
        for chosen in ({"name": "mode", "scale": 1.75}, "mode", {"name": "mode", "scale": 0.0}, "uniform")
    ]
    assert middle[0] > middle[1] > middle[2] + 0.05
    assert middle[2] == pytest.approx(0.5, abs=0.03)
    assert middle[3] == pytest.approx(0.5, abs=0.03)


def test_the_mode_is_that_of_equation_20() -> None:
    draw = generator(0, "steps")
    even = torch.rand(9, generator=draw)
    expected = 1 - even - 0.81 * (torch.cos(math.pi / 2 * even) ** 2 - 1 + even)
    timesteps = draw_timesteps(
        objective(timesteps={"distribution": {"name": "mode", "scale": 0.81}}),
        flow_schedule(),
        9,
        generator(0, "steps"),
        (8, 8),
    )
    torch.testing.assert_close(timesteps, 1000 * expected)


def test_a_shift_moves_timesteps_towards_noise_and_the_bases_own_is_the_default() -> None:
    plain = steps_of(flow_schedule(), shift=1.0) / 1000
    shifted = steps_of(flow_schedule(), shift=3.0) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    torch.testing.assert_close(steps_of(flow_schedule(shift=3.0)) / 1000, shifted)
    torch.testing.assert_close(steps_of(flow_schedule(shift=3.0), shift=1.0) / 1000, plain)
    dynamic = flow_schedule(use_dynamic_shifting=True)
    default = objective()
    small, large = (
        draw_timesteps(default, dynamic, 50, generator(0, "steps"), size).mean() for size in ((8, 8), (128, 128))
    )
    assert small < large


@pytest.mark.parametrize(
    ("settings", "schedule", "problem"),
    [
        ({"weighting": "min_snr"}, flow_schedule(), "min_snr.*flow-matching"),
        ({"timesteps": {"shift": 3.0}}, eps_schedule(), "predicts noise"),
        ({"timesteps": {"shift": 3.0}}, eps_schedule("v_prediction"), "predicts v"),
        ({"loss": {"name": "huber", "schedule": "snr"}}, flow_schedule(), "'snr'.*flow-matching"),
    ],
)
def test_objectives_that_do_not_suit_a_base_are_refused(settings: Any, schedule: NoiseSchedule, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        measure_for(objective(**settings), schedule)
    other = eps_schedule() if isinstance(schedule, FlowSchedule) else flow_schedule()
    measure_for(objective(**settings), other)


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "max_snr"},
        {"weighting": {"name": "min_snr", "gamma": 0.0}},
        {"weighting": {"name": "none", "gamma": 5.0}},
        {"loss": {"name": "huber", "delta": 0.0}},
        {"loss": {"name": "l2", "delta": 1.0}},
        {"timesteps": {"low": 0.5, "high": 0.5}},
        {"timesteps": {"low": -0.1}},
        {"timesteps": {"distribution": {"name": "mode", "scale": 1.8}}},
        {"timesteps": {"shift": 0.0}},
        {"noise_offset": float("nan")},
        {"input_perturbation": -0.1},
        {"pyramid": {"discount": 0.0}},
        {"random_offset": True},
        {"random_perturbation": True},
        {"loss": {"name": "huber", "delta": 2.0, "schedule": "snr"}},
        {"loss": {"name": "smooth_l1", "schedule": "linear"}},
    ],
)
def test_invalid_objectives_are_refused(settings: dict[str, Any]) -> None:
    (name, value), *_ = settings.items()
    with pytest.raises(ValidationError, match=list(value)[-1] if isinstance(value, dict) else name):
        objective(**settings)


def test_the_validation_grid_has_the_midpoints() -> None:
    assert timestep_grid(eps_schedule(), 4).tolist() == [125, 375, 625, 875]
    assert timestep_grid(flow_schedule(), 4).tolist() == [125.0, 375.0, 625.0, 875.0]
    assert timestep_grid(flow_schedule(), 4).dtype == torch.float32


def noise_with(shape: tuple[int, ...] = (64, 4, 16, 16), seed: int = 0, **settings: Any) -> Tensor:
    return draw_training_noise(objective(**settings), shape, generator(seed, "noise"))


def test_a_noise_offset_moves_whole_channels_and_nothing_within() -> None:
    plain, moved = noise_with(), noise_with(noise_offset=0.5)
    level = (moved - plain).mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(moved - plain, level.expand_as(plain), rtol=1e-5, atol=1e-5)
    assert level.std().item() == pytest.approx(0.5, abs=0.08)


def test_pyramid_noise_is_coarser_at_the_same_strength_for_each_image() -> None:
    plain, coarse = noise_with(), noise_with(pyramid={"discount": 0.8})
    torch.testing.assert_close(coarse.flatten(1).square().mean(dim=1), torch.ones(64))
    likeness = [(noise[..., 1:] * noise[..., :-1]).mean().item() for noise in (plain, coarse)]
    assert abs(likeness[0]) < 0.05
    assert likeness[1] > 0.2
    single = draw_training_noise(objective(pyramid={"levels": 1}), (1, 1, 1, 1), generator(0, "noise"))
    assert single.abs().item() == pytest.approx(1.0)


def test_input_perturbation_reaches_the_input_and_not_the_target() -> None:
    perturbed = objective(input_perturbation=0.1)
    extra = draw_perturbation(perturbed, SHAPE, generator(5))
    assert extra is not None
    assert extra.std().item() == pytest.approx(0.1, abs=0.01)
    schedule = eps_schedule()
    plain, disturbed = batch(), batch(perturbation=extra)
    noisy, target = noisy_and_target(schedule, plain)
    noisier, same = noisy_and_target(schedule, disturbed)
    assert torch.equal(target, same)
    share = schedule.sigma_of(plain.timesteps).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisier - noisy, share * extra, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"noise_offset": 0.1}, {"pyramid": {}}, {"input_perturbation": 0.1}])
def test_draws_are_a_pure_function_of_the_generator(settings: dict[str, Any]) -> None:
    chosen = objective(**settings)

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        source = generator(seed, "noise")
        noise = draw_training_noise(chosen, SHAPE, source)
        steps = draw_timesteps(chosen, eps_schedule(), 4, source, (8, 8))
        return noise, steps, draw_perturbation(chosen, SHAPE, source)

    state = torch.get_rng_state()
    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["exponential", "snr"])
def test_scheduled_deltas_are_those_of_sd_scripts(name: str, schedule: str) -> None:
    noise, steps, c = eps_schedule(), torch.tensor([0, 200, 600, 999]), 0.1
    # The formulas of sd-scripts' `huber_schedule`, with its c as delta.
    alphas = noise.alphas_cumprod[steps].double()
    sigmas = ((1.0 - alphas) / alphas).sqrt()
    expected = {
        "exponential": torch.exp(math.log(c) / 1000 * steps.double()),
        "snr": (1 - c) / (1 + sigmas) ** 2 + c,
    }[schedule]
    predicted, target = pair()
    chosen = measure_for(objective(loss={"name": name, "delta": c, "schedule": schedule}), noise)
    errors = chosen.errors(predicted, target, steps)
    for row, delta in enumerate(expected.tolist()):
        alone = measure({"name": name, "delta": delta}).errors(predicted[row], target[row], steps[:1])
        torch.testing.assert_close(errors[row], alone, rtol=1e-4, atol=1e-5)
    assert expected[0] > 0.9
    assert expected[-1] < 0.12


def test_a_random_strength_is_drawn_for_each_image_and_leaves_the_white_noise_alone() -> None:
    plain, moved, random = noise_with(), noise_with(noise_offset=0.5), noise_with(noise_offset=0.5, random_offset=True)
    full, part = ((noise - plain).mean(dim=(2, 3)) for noise in (moved, random))
    shares = part / full
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=1e-3, atol=1e-3)
    assert 0.0 <= shares.min() < 0.1
    assert 0.9 < shares.max() <= 1.001
    extras = [
        draw_perturbation(objective(input_perturbation=0.1, random_perturbation=flag), (64, 4, 8, 8), generator(5))
        for flag in (False, True)
    ]
    assert extras[0] is not None
    assert extras[1] is not None
    ratio = extras[1] / extras[0]
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert ratio.std() > 0.2
