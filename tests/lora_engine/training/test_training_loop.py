from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import InterruptedRun, NonFiniteError, SettingsError
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.checkpoint import Checkpoints
from lora_engine.training.loop import FitOptions, History, fit
from lora_engine.training.losses import DenoisingLoss, PriorLoss
from lora_engine.training.optimizers import optimizers
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.schedules import rate_factor, schedules


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = generator(0, "toy")
        self.first = nn.Parameter(torch.randn(4, 4, generator=draw))
        self.second = nn.Parameter(torch.randn(4, 4, generator=draw))
        self.frozen = nn.Parameter(torch.randn(4, 4, generator=draw), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen @ self.first @ self.second


def batch(number: int, rows: int = 4) -> Batch:
    draw = generator(1, number)
    clean, noise = (torch.randn(rows, 4, generator=draw) for _ in range(2))
    return Batch(clean, noise, torch.zeros(rows, dtype=torch.int64), Conditioning({}), rows)


def phase(toy: Toy, names: str = "first", steps: int = 6, rate: float = 0.01, **change: Any) -> Phase:
    moving = {name: getattr(toy, name) for name in names.split()}
    parts: dict[str, Any] = {
        "name": names,
        "steps": steps,
        "groups": (ParameterGroup(moving, rate),),
        "batch": batch,
        "predict": lambda found: (toy(found.latents), found.noise),
        "terms": (DenoisingLoss(),),
    }
    return Phase(**{**parts, **change})


def run(phases: Callable[[Toy], list[Phase]], toy: Toy | None = None, **change: Any) -> tuple[Toy, History]:
    toy = toy or Toy()
    options = FitOptions(**{key: change.pop(key) for key in list(change) if key in FitOptions.__dataclass_fields__})
    return toy, fit(phases(toy), [toy], options, **change)


def test_the_loss_goes_down_and_only_what_the_phase_names_moves() -> None:
    before = Toy()
    toy, history = run(lambda toy: [phase(toy, steps=60, rate=0.05)], clip=0.0)
    assert sum(history.loss[-10:]) < sum(history.loss[:10])
    assert not torch.equal(toy.first, before.first)
    assert torch.equal(toy.second, before.second)
    assert torch.equal(toy.frozen, before.frozen)


def test_phases_move_what_they_name_one_after_another() -> None:
    seen: list[tuple[bool, bool]] = []

    def watch(toy: Toy) -> Callable[[Batch], tuple[Tensor, Tensor]]:
        def predict(found: Batch) -> tuple[Tensor, Tensor]:
            seen.append((toy.first.requires_grad, toy.second.requires_grad))
            return toy(found.latents), found.noise

        return predict

    toy, history = run(
        lambda toy: [phase(toy, "first", 2, predict=watch(toy)), phase(toy, "second", 3, predict=watch(toy))]
    )
    assert seen == [(True, False)] * 2 + [(False, True)] * 3
    assert len(history.loss) == 5
    assert (toy.first.requires_grad, toy.frozen.requires_grad) == (True, False)
    assert toy.first.grad is None


def test_accumulated_batches_equal_one_large_batch() -> None:
    def large(number: int) -> Batch:
        parts = [batch(2 * number + place) for place in range(2)]
        latents, noise = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "noise"))
        return Batch(latents, noise, torch.zeros(8, dtype=torch.int64), Conditioning({}), 8)

    parts, in_parts = run(lambda toy: [phase(toy)], accumulate=2)
    whole, at_once = run(lambda toy: [phase(toy, batch=large)])
    torch.testing.assert_close(parts.first, whole.first, rtol=1e-5, atol=1e-6)
    # The optimizer does not see the size of a gradient; the loss shows it.
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_clipping_bounds_the_gradient_and_tells_its_norm_before(monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    def descend(groups: Sequence[ParameterGroup], decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([value for group in groups for value in group.parameters.values()], lr=1.0)

    monkeypatch.setitem(optimizers._entries, "descent", descend)
    told: list[float] = []
    toy, _ = run(
        lambda toy: [phase(toy, steps=1, rate=1.0)],
        clip=clip,
        optimiser="descent",
        progress=lambda done, total, values: told.append(values["gradient_norm"]),
    )
    moved = (toy.first - Toy().first).norm().item()
    assert told[0] > 0.25
    assert moved == pytest.approx(clip or told[0], rel=1e-3)


def test_terms_are_weighted_added_and_told_by_name() -> None:
    told: list[dict[str, float]] = []

    def halves(number: int) -> Batch:
        found = batch(number)
        return Batch(found.latents, found.noise, found.timesteps, found.conditioning, 2)

    run(
        lambda toy: [phase(toy, batch=halves, terms=(DenoisingLoss(), PriorLoss(3.0)))],
        progress=lambda done, total, values: told.append(dict(values)),
    )
    for values in told:
        assert values["loss"] == pytest.approx(values["denoising"] + values["prior"])
    toy, found = Toy(), halves(0)
    errors = (toy(found.latents) - found.noise).square().mean(dim=1)
    assert told[0]["denoising"] == pytest.approx(errors[:2].mean().item())
    assert told[0]["prior"] == pytest.approx(3.0 * errors[2:].mean().item())


@pytest.mark.parametrize("stops", [[0], [1], [2], [3], [4], [5], [6], [7], [8], [2, 5], [0, 0, 3, 3, 7]])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, stops: list[int]) -> None:
    def phases(toy: Toy) -> list[Phase]:
        return [phase(toy, "first", 5), phase(toy, "first second", 4, rate=0.02)]

    change: dict[str, Any] = {
        "accumulate": 2,
        "schedule": "cosine",
        "warmup": 2,
        "weight_decay": 0.1,
        "validate_every": 3,
        "checkpoint_every": 4,
    }
    straight_toy = Toy()
    straight, expected = run(phases, straight_toy, **change, validate=lambda: straight_toy.first.sum().item())
    for stop in [*stops, 99]:
        toy = Toy()
        steps: list[int] = []
        extra = {
            "checkpoints": Checkpoints(tmp_path, "job"),
            "validate": lambda toy=toy: toy.first.sum().item(),
            "progress": lambda done, total, values, steps=steps: steps.append(done),
            "stop": lambda steps=steps, stop=stop: (steps[-1] if steps else 0) >= stop,
        }
        if stop < 9:
            with pytest.raises(InterruptedRun, match="a checkpoint is written"):
                run(phases, toy, **change, **extra)
        else:
            _, history = run(phases, toy, **change, **extra)
    assert torch.equal(toy.first, straight.first)
    assert torch.equal(toy.second, straight.second)
    assert history == expected


def test_a_run_that_is_through_does_nothing_more(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "job")
    first, history = run(lambda toy: [phase(toy)], checkpoints=checkpoints)
    told: list[int] = []
    again, same = run(
        lambda toy: [phase(toy)], checkpoints=checkpoints, progress=lambda done, total, values: told.append(done)
    )
    assert told == []
    assert same == history
    assert torch.equal(again.first, first.first)


def broken(number: int, bad: int) -> Batch:
    found = batch(number)
    if number == bad:
        found.latents[0, 0] = float("nan")
    return found


def test_nan_in_a_picture_stops_within_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    told: list[int] = []
    with pytest.raises(NonFiniteError, match="the loss is nan at step 4 of 6"):
        run(
            lambda toy: [phase(toy, batch=lambda number: broken(number, 3))],
            checkpoints=Checkpoints(tmp_path, "job"),
            checkpoint_every=2,
            progress=lambda done, total, values: told.append(done),
        )
    assert told == [1, 2, 3]
    kept = Checkpoints(tmp_path, "job").load()
    assert kept is not None
    assert kept.facts["step"] == 2
    assert torch.isfinite(kept.tensors["value/first"]).all()


def test_inf_in_a_gradient_stops_before_the_weights_move() -> None:
    toy = Toy()
    before = toy.first.detach().clone()

    def predict(found: Batch) -> tuple[Tensor, Tensor]:
        # Finite forwards, infinite backwards: the slope of the root at zero.
        return toy(found.latents) + (toy.first * 0.0).sum().abs().sqrt(), found.noise

    with pytest.raises(NonFiniteError, match="gradient"):
        run(lambda toy: [phase(toy, predict=predict)], toy)
    assert torch.equal(toy.first, before)


def test_weights_that_overflow_stop_in_the_same_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="weights is inf at step 1"):
        run(lambda toy: [phase(toy, rate=1e38)], checkpoints=Checkpoints(tmp_path, "job"), checkpoint_every=1)
    assert Checkpoints(tmp_path, "job").load() is None


def test_a_validation_loss_that_is_not_finite_stops_too() -> None:
    with pytest.raises(NonFiniteError, match="validation"):
        run(lambda toy: [phase(toy)], validate=lambda: float("nan"), validate_every=1)


def test_global_state_is_as_before() -> None:
    state, mode = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    run(lambda toy: [phase(toy)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.are_deterministic_algorithms_enabled() == mode
    assert torch.utils.deterministic.fill_uninitialized_memory == fill  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(schedules))
def test_schedules_rise_in_the_warmup_and_never_leave_the_unit_range(name: str) -> None:
    factors = [rate_factor(name, step, 100, 10) for step in range(100)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == 1.0
    assert (factors[10:] == sorted(factors[10:], reverse=True)) == (name != "cosine-restarts")


def test_the_cosine_is_that_of_diffusers() -> None:
    from diffusers.optimization import get_cosine_schedule_with_warmup

    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimiser, num_warmup_steps=0, num_training_steps=20)
    for step in range(20):
        assert rate_factor("cosine", step, 20, 0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimiser.step()
        theirs.step()


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="cosine"):
        run(lambda toy: [phase(toy)], schedule="cosin")
