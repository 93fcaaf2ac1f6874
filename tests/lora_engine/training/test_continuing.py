"""Longer and changed runs continue from the state of an earlier one, to the bytes of a run without an interruption."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.errors import InterruptedRun, SettingsError, TrainingError
from lora_engine.formats import read_bundle
from lora_engine.training import candidates, fit_state, loop
from lora_engine.training.continuing import find_loss, find_state, planned_rates
from lora_engine.training.methods import methods
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.schedules import PhaseRates, RateStage, common_steps, schedules
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.continuing import CHANGES, find_change
from tests.lora_engine.training.runs import Ending, Runs, curves_of, digests, factors_of

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
CONSTANT: dict[str, Any] = {"schedule": "constant", "checkpoint_every": 2}
WATCHED: dict[str, Any] = {
    "validate_every": 2,
    "save_every": 2,
    "samples": {"every": 2, "prompts": ["a ring"], "seeds": [1], "steps": 2},
}


@pytest.fixture
def trained(runs: Runs, tmp_path: Path) -> Callable[..., tuple[Path, list[int]]]:
    """Trains with a state folder; returns the artifact and the steps that were taken."""

    def run(
        name: str, states: str = "states", *, ending: Ending | None = None, **change: Any
    ) -> tuple[Path, list[int]]:
        arguments = {"state": tmp_path / states / name, "origin": "photos", **change.pop("arguments", {})}
        ending = ending or Ending()
        return runs(name, ending=ending, arguments=arguments, **change), ending.steps

    return run


Trained = Callable[..., tuple[Path, list[int]]]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "finetune", **WATCHED},
        {"method": "dreambooth", "rates": {"ema": {"decay": 0.8}}, "warmup": 2},
        {"method": "textual-inversion"},
    ],
    ids=lambda options: options["method"],
)
def test_half_a_run_and_then_the_rest_gives_the_bytes_of_the_whole(trained: Trained, options: dict[str, Any]) -> None:
    settings = {**CONSTANT, **options}
    straight, _ = trained("straight", "alone", steps=6, **settings)
    trained("half", steps=3, **settings)
    out, steps = trained("whole", steps=6, **settings)
    assert steps == [4, 5, 6]
    assert digests(out) == digests(straight)


CHOICE: dict[str, Any] = {"by": "validation_loss", "every": 2, "patience": 0, "anneal": 0}


@pytest.mark.parametrize(("half", "first"), [(4, 5), (3, 3)])
def test_a_longer_run_continues_with_the_candidates_of_a_shorter_one(
    trained: Trained, settings: Callable[..., TrainSettings], tmp_path: Path, half: int, first: int
) -> None:
    choice = {**CONSTANT, "best_checkpoint": CHOICE}
    straight, _ = trained("straight", "alone", steps=6, **choice)
    trained("half", steps=half, **choice)
    state = find_state(settings(steps=6, **choice), "photos", [tmp_path / "states" / "half" / "checkpoints"])
    assert state is not None
    out, steps = trained("whole", steps=6, **choice)
    # The end of three steps is a candidate that the longer run does not have.
    assert steps == list(range(first, 7))
    assert state.step == first - 1
    assert digests(out) == digests(straight)


def test_automatic_settings_continue_from_a_state_of_the_same_ones(
    trained: Trained, settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    trained("half", steps=3, rank="auto", **CONSTANT)
    folders = [tmp_path / "states" / "half" / "checkpoints"]
    state = find_state(settings(steps=6, rank="auto", **CONSTANT), "photos", folders)
    assert state is not None
    assert state.step == 3
    assert find_state(settings(steps=6, rank=8, **CONSTANT), "photos", folders) is None


def test_a_falling_rate_begins_at_step_0_again(trained: Trained) -> None:
    settings = {**CONSTANT, "schedule": "cosine"}
    straight, _ = trained("straight", "alone", steps=6, **settings)
    trained("half", steps=3, **settings)
    out, steps = trained("whole", steps=6, **settings)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert digests(out) == digests(straight)


def test_a_state_whose_rates_are_not_compared_gives_other_bytes(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**CONSTANT, "schedule": "cosine"}
    straight, _ = trained("straight", "alone", steps=6, **settings)
    trained("half", steps=3, **settings)
    monkeypatch.setattr(candidates, "common_steps", lambda before, after: 10**9)
    out, steps = trained("whole", steps=6, **settings)
    assert steps == [4, 5, 6]
    assert digests(out) != digests(straight)


@pytest.mark.parametrize("method", ["finetune", "pivotal"])
def test_stages_at_another_rate_continue_from_the_last_state(trained: Trained, method: str) -> None:
    then = [{"steps": 2, "learning_rate": 1e-4}, {"steps": 2, "schedule": "cosine", "warmup": "50%"}]
    settings = {**CONSTANT, "method": method, "steps": 4}
    straight, _ = trained("straight", "alone", **settings, then=then)
    trained("first", **settings)
    out, steps = trained("then", **settings, then=then)
    assert steps == [5, 6, 7, 8]
    assert digests(out) == digests(straight)
    rates = [rate for _, rate in curves_of(out)["lr"]]
    highest = rates[3]
    assert rates[4:6] == pytest.approx([1e-4 / 1e-3 * highest] * 2)
    assert rates[6:] == pytest.approx([highest / 2, highest])


def test_a_change_that_is_watched_only_resumes_an_interrupted_run(trained: Trained) -> None:
    expected, _ = trained("straight", "alone", steps=6, **CONSTANT)
    with pytest.raises(InterruptedRun):
        trained("run", steps=6, ending=Ending(step=3), **CONSTANT)
    out, steps = trained("run", steps=6, **CONSTANT, **WATCHED)
    assert steps == [4, 5, 6]
    assert digests(out)["adapter.safetensors"] == digests(expected)["adapter.safetensors"]
    # The steps before the change have none; the base is drawn on each start.
    assert [entry["step"] for entry in curves_of(out)["saved"]] == [4, 6]
    drawn = sorted(path.name for path in (out / "samples").glob("step-*"))
    assert drawn == ["step-000000", "step-000004", "step-000006"]


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"seed": 8}, {"batch": 3}, {"learning_rate": 2e-3}, {"rates": {"ema": {}}}], ids=str
)
def test_a_change_of_every_step_begins_at_step_0(trained: Trained, change: dict[str, Any]) -> None:
    trained("before", steps=2, **CONSTANT)
    _, steps = trained("after", **{"steps": 3, **CONSTANT, **change})
    assert steps == [1, 2, 3]


def test_a_fresh_run_repeats_a_finished_one(trained: Trained) -> None:
    first, _ = trained("run", steps=3, **CONSTANT)
    expected = digests(first)
    _, again = trained("run", steps=3, **CONSTANT)
    assert again == []
    out, steps = trained("run", steps=3, arguments={"fresh": True}, **CONSTANT)
    assert steps == [1, 2, 3]
    assert digests(out) == expected


def test_plans_say_what_a_run_continues_or_begins_again(
    trained: Trained, tmp_path: Path, settings: Callable[..., TrainSettings]
) -> None:
    trained("half", steps=3, **CONSTANT)
    folder = tmp_path / "states" / "half" / "checkpoints"

    def state(origin: str = "photos", **change: Any) -> int | None:
        found = find_state(settings(**{"steps": 6, **CONSTANT, **change}), origin, [folder])
        return None if found is None else found.step

    assert state() == 3
    assert state(steps="3 epochs", then=[{"steps": 2, "learning_rate": 1e-4}]) == 3
    assert state(precision="auto", **WATCHED) == 3
    assert state(schedule="cosine") is state(rank=3) is state("other photos") is None
    file, changes = find_loss(settings(steps=6, rank=3, **CONSTANT), "photos", folder) or (None, {})
    assert file is not None
    assert (file.step, list(changes)) == (3, ["rank"])
    assert find_loss(settings(steps=6, **CONSTANT), "photos", folder) is None
    assert find_loss(settings(steps=6, **CONSTANT), "photos", tmp_path / "none") is None


def test_plans_know_the_rates_of_every_method(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    actual: list[tuple[PhaseRates, ...]] = []
    original = fit_state.rates_of

    def note(phases: Any, options: Any) -> Any:
        rates = tuple(original(phases, options))
        actual.append(rates)
        return iter(rates)

    monkeypatch.setattr(fit_state, "rates_of", note)
    for method in methods:
        settings = {"method": method, "steps": 3, "then": [{"steps": 1, "learning_rate": 1e-4}], "warmup": "34%"}
        runs(f"with {method}", **settings, shape="small-sd")
        assert actual[-1] == planned_rates(TrainSettings.model_validate(settings)), method


def test_common_steps_end_where_a_rate_or_a_phase_differs() -> None:
    def rates(*steps: int, schedule: str = "constant", **change: Any) -> list[PhaseRates]:
        return [PhaseRates(str(number), (RateStage(n, schedule, **change),)) for number, n in enumerate(steps)]

    assert common_steps(rates(5), rates(9)) == common_steps(rates(9), rates(5)) == 5
    assert common_steps(rates(5, 5), rates(9, 9)) == 5
    assert common_steps(rates(5, 5), rates(5, 9)) == 10
    assert common_steps(rates(5, warmup=3), rates(9, warmup=3)) == 5
    assert common_steps(rates(5, warmup=3), rates(5)) == 0
    assert common_steps(rates(5, warmup=2, schedule="linear"), rates(9, warmup=2, schedule="linear")) == 3
    assert common_steps(rates(5), rates(5, scale=0.5)) == 0
    for schedule in schedules:
        assert common_steps(rates(5, schedule=schedule), rates(5, schedule=schedule)) == 5


def test_every_setting_says_what_its_change_does() -> None:
    fields = set(TrainSettings.model_fields)
    assert set(CHANGES) <= fields
    assert all(change.reason for change in CHANGES.values())
    assert find_change("an option of tomorrow").effect == "restarts"
    section = DOCS.read_text().partition("## More steps")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    documented = {name: effect.split()[0].strip(":") for cell, effect in rows for name in re.findall(r"`(\w+)`", cell)}
    assert documented == {name: change.effect for name, change in CHANGES.items() if change.effect != "restarts"}


def test_saved_adapters_are_adapters_with_their_step_and_validation_loss(trained: Trained) -> None:
    out, _ = trained("run", steps=5, method="pivotal", validate_every=3, save_every=2, **CONSTANT)
    losses = dict(curves_of(out)["validation_loss"])
    entries = curves_of(out)["saved"]
    assert [(entry["step"], entry["validation_loss"]) for entry in entries] == [(2, losses[2]), (4, losses[4])]
    final = read_bundle(out / "adapter.safetensors")
    for entry in entries:
        bundle = read_bundle(out / entry["file"])
        step = {"step": entry["step"], "validation_loss": entry["validation_loss"]}
        assert bundle.card.recipe == {**final.card.recipe, "saved": step}
        assert bundle.adapter.modules.keys() == final.adapter.modules.keys()
        assert [token.token for token in bundle.embeddings] == ["sks"]
    ends = (
        trained("short", "alone", steps=2, **CONSTANT)[0],
        trained("saving", "another", steps=4, save_every=2, **CONSTANT)[0],
    )
    assert all(
        value.equal(factors_of(ends[0])[name]) for name, value in _factors(ends[1] / "saved/step-000002.safetensors")
    )


def _factors(file: Path) -> list[tuple[str, torch.Tensor]]:
    modules = read_bundle(file).adapter.modules
    return [(f"{name}.{key}", value) for name, delta in modules.items() for key, value in delta.factors().items()]


def test_a_full_disk_while_saving_loses_nothing(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained("straight", "alone", steps=4, save_every=2, **CONSTANT)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_engine.training.saved.write_adapter", full)
        with pytest.raises(OSError, match="No space"):
            trained("run", steps=4, save_every=2, checkpoint_every=1, schedule="constant")
    out, steps = trained("run", steps=4, save_every=2, **CONSTANT)
    assert steps == [2, 3, 4]
    assert digests(out) == digests(expected)


def test_epochs_are_steps_of_all_images(trained: Trained) -> None:
    # Five images in batches of two: three steps.
    in_epochs = {"steps": "2 epochs", "warmup": "1 epoch", "validate_every": "0.5 epochs", "save_every": "1 epoch"}
    in_steps = {"steps": 6, "warmup": 3, "validate_every": 2, "save_every": 3}
    one, steps = trained("epochs", "one", **in_epochs)
    other, _ = trained("steps", "other", **in_steps)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert digests(one) == digests(other)
    prior = {"batches": "alternating", "count": 1, "steps": 1}
    _, steps = trained("alternating", "third", method="dreambooth", prior=prior, steps="1 epoch", batch=5)
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 4}, "less than steps 4"),
        ({"warmup": 3, "method": "pivotal"}, "phase 'inversion', which would never reach its rate"),
        ({"then": [{"steps": 2, "warmup": 2}]}, "then.0.warmup 2 must be less than steps 2"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": "0 epochs"}, "greater than or equal to 1"),
        ({"steps": "ten"}, "epochs such as '10 epochs'"),
        ({"warmup": "100%"}, "a share such as '10%'"),
        ({"warmup": "-1%"}, "a share such as '10%'"),
        ({"save_every": "50%"}, "epochs such as"),
        ({"then": [{"steps": 2, "learning_rate": float("nan")}]}, "finite"),
        (
            {
                "schedule": "constant",
                "rates": {"optimiser": "schedule-free"},
                "then": [{"steps": 2, "schedule": "cosine"}],
            },
            "replaces schedule 'cosine'",
        ),
    ],
    ids=str,
)
def test_lengths_and_warmups_that_cannot_be_reached_are_refused(
    settings: Callable[..., TrainSettings], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**change)


def test_a_warmup_in_epochs_that_is_too_long_is_refused_before_training(runs: Runs) -> None:
    ending = Ending()
    with pytest.raises(SettingsError, match="warmup 6 must be less than steps 4"):
        runs(warmup="2 epochs", ending=ending)
    assert ending.batches == 0


def test_a_share_warms_up_every_phase(runs: Runs) -> None:
    rates = [rate for _, rate in curves_of(runs(method="pivotal", steps=8, warmup="50%", schedule="constant"))["lr"]]
    assert rates[:4] == pytest.approx([5e-3 / 3, 10e-3 / 3, 5e-3, 5e-3])
    assert rates[4:] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])


def test_processes_that_would_resume_from_different_steps_stop() -> None:
    value = torch.nn.Parameter(torch.ones(2, 2))
    phase = Phase("toy", 1, (ParameterGroup({"value": value}, 0.1),), lambda number: None, lambda batch: None, ())  # type: ignore[arg-type,return-value]

    def differ(tensors: Any) -> None:
        for tensor in tensors:
            tensor.add_(1)

    with pytest.raises(TrainingError, match="others after another number"):
        loop.fit([phase], [], loop.FitOptions(), average=differ)
