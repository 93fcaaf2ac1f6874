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
        "predict": lambda batch: (toy(batch.latents), batch.noise),
        "terms": (DenoisingLoss(),),
    }
    return Phase(**{**parts, **change})


def run(phases: Callable[[Toy], list[Phase]], toy: Toy | None = None, **change: Any) -> tuple[Toy, History]:
    toy = toy or Toy()
    options = FitOptions(**{key: change.pop(key) for key in list(change) if key in FitOptions.__dataclass_fields__})
    return toy, fit(phases(toy), [toy], options, **change)


def test_the_loss_falls_and_only_the_phases_parameters_change() -> None:
    before = Toy()
    toy, history = run(lambda toy: [phase(toy, steps=60, rate=0.05)], clip=0.0)
    assert sum(history.loss[-10:]) < sum(history.loss[:10])
    assert not torch.equal(toy.first, before.first)
    assert torch.equal(toy.second, before.second)
    assert torch.equal(toy.frozen, before.frozen)


def test_phases_train_their_own_parameters_in_order() -> None:
    seen: list[tuple[bool, bool]] = []

    def recording(toy: Toy) -> Callable[[Batch], tuple[Tensor, Tensor]]:
        def predict(batch: Batch) -> tuple[Tensor, Tensor]:
            seen.append((toy.first.requires_grad, toy.second.requires_grad))
            return toy(batch.latents), batch.noise

        return predict

    toy, history = run(
        lambda toy: [phase(toy, "first", 2, predict=recording(toy)), phase(toy, "second", 3, predict=recording(toy))]
    )
    assert seen == [(True, False)] * 2 + [(False, True)] * 3
    assert len(history.loss) == 5
    assert (toy.first.requires_grad, toy.frozen.requires_grad) == (True, False)
    assert toy.first.grad is None


def test_accumulated_batches_equal_one_large_batch() -> None:
    def large(number: int) -> Batch:
        parts = [batch(2 * number + index) for index in range(2)]
        latents, noise = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "noise"))
        return Batch(latents, noise, torch.zeros(8, dtype=torch.int64), Conditioning({}), 8)

    parts, in_parts = run(lambda toy: [phase(toy)], accumulate=2)
    whole, at_once = run(lambda toy: [phase(toy, batch=large)])
    torch.testing.assert_close(parts.first, whole.first, rtol=1e-5, atol=1e-6)
    # The optimizer does not see the size of a gradient; the loss shows it.
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_clipping_bounds_the_gradient_and_reports_the_unclipped_norm(
    monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    def descend(groups: Sequence[ParameterGroup], decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([value for group in groups for value in group.parameters.values()], lr=1.0)

    monkeypatch.setitem(optimizers._entries, "descent", descend)
    reported: list[float] = []
    toy, _ = run(
        lambda toy: [phase(toy, steps=1, rate=1.0)],
        clip=clip,
        optimizer="descent",
        progress=lambda done, total, values: reported.append(values["gradient_norm"]),
    )
    moved = (toy.first - Toy().first).norm().item()
    assert reported[0] > 0.25
    assert moved == pytest.approx(clip or reported[0], rel=1e-3)


def test_terms_are_weighted_added_and_reported_by_name() -> None:
    reported: list[dict[str, float]] = []

    def halves(number: int) -> Batch:
        drawn = batch(number)
        return Batch(drawn.latents, drawn.noise, drawn.timesteps, drawn.conditioning, 2)

    run(
        lambda toy: [phase(toy, batch=halves, terms=(DenoisingLoss(), PriorLoss(3.0)))],
        progress=lambda done, total, values: reported.append(dict(values)),
    )
    for values in reported:
        assert values["loss"] == pytest.approx(values["denoising"] + values["prior"])
    toy, first = Toy(), halves(0)
    errors = (toy(first.latents) - first.noise).square().mean(dim=1)
    assert reported[0]["denoising"] == pytest.approx(errors[:2].mean().item())
    assert reported[0]["prior"] == pytest.approx(3.0 * errors[2:].mean().item())


@pytest.mark.parametrize("stops", [[0], [1], [2], [3], [4], [5], [6], [7], [8], [2, 5], [0, 0, 3, 3, 7]])
def test_a_stopped_run_resumes_to_the_result_of_an_uninterrupted_one(tmp_path: Path, stops: list[int]) -> None:
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
        arguments = {
            "checkpoints": Checkpoints(tmp_path, "job"),
            "validate": lambda toy=toy: toy.first.sum().item(),
            "progress": lambda done, total, values, steps=steps: steps.append(done),
            "stop": lambda steps=steps, stop=stop: (steps[-1] if steps else 0) >= stop,
        }
        if stop < 9:
            with pytest.raises(InterruptedRun, match="a checkpoint is written"):
                run(phases, toy, **change, **arguments)
        else:
            _, history = run(phases, toy, **change, **arguments)
    assert torch.equal(toy.first, straight.first)
    assert torch.equal(toy.second, straight.second)
    assert history == expected


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "job")
    first, history = run(lambda toy: [phase(toy)], checkpoints=checkpoints)
    reported: list[int] = []
    again, same = run(
        lambda toy: [phase(toy)], checkpoints=checkpoints, progress=lambda done, total, values: reported.append(done)
    )
    assert reported == []
    assert same == history
    assert torch.equal(again.first, first.first)


def broken(number: int, bad: int) -> Batch:
    drawn = batch(number)
    if number == bad:
        drawn.latents[0, 0] = float("nan")
    return drawn


def test_nan_in_an_image_stops_within_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    reported: list[int] = []
    with pytest.raises(NonFiniteError, match="the loss is nan at step 4 of 6"):
        run(
            lambda toy: [phase(toy, batch=lambda number: broken(number, 3))],
            checkpoints=Checkpoints(tmp_path, "job"),
            checkpoint_every=2,
            progress=lambda done, total, values: reported.append(done),
        )
    assert reported == [1, 2, 3]
    checkpoint = Checkpoints(tmp_path, "job").load()
    assert checkpoint is not None
    assert checkpoint.facts["step"] == 2
    assert torch.isfinite(checkpoint.tensors["value/first"]).all()


def test_inf_in_a_gradient_stops_before_the_weights_change() -> None:
    toy = Toy()
    before = toy.first.detach().clone()

    def predict(batch: Batch) -> tuple[Tensor, Tensor]:
        # Finite forwards, infinite backwards: the slope of the root at zero.
        return toy(batch.latents) + (toy.first * 0.0).sum().abs().sqrt(), batch.noise

    with pytest.raises(NonFiniteError, match="gradient"):
        run(lambda toy: [phase(toy, predict=predict)], toy)
    assert torch.equal(toy.first, before)


def test_overflowing_weights_stop_in_the_same_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="weights is inf at step 1"):
        run(lambda toy: [phase(toy, rate=1e38)], checkpoints=Checkpoints(tmp_path, "job"), checkpoint_every=1)
    assert Checkpoints(tmp_path, "job").load() is None


def test_a_nonfinite_validation_loss_stops() -> None:
    with pytest.raises(NonFiniteError, match="validation"):
        run(lambda toy: [phase(toy)], validate=lambda: float("nan"), validate_every=1)


def test_global_state_is_restored() -> None:
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

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=20)
    for step in range(20):
        assert rate_factor("cosine", step, 20, 0) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="cosine"):
        run(lambda toy: [phase(toy)], schedule="cosin")
