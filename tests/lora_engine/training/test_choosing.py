"""The best step is chosen on images that the evaluation does not use, and its figure is corrected for the choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lora_engine.data.manifest import Manifest
from lora_engine.errors import SettingsError
from lora_engine.evaluation.bands import share_memorized
from lora_engine.formats import read_bundle
from lora_engine.training.automatic import block_of, choose_blocks, choose_rank, choose_rate, limit_steps
from lora_engine.training.choice_images import choice_images
from lora_engine.training.choosing import Check, Chooser, read_checks, with_memorized, write_checks
from lora_engine.training.schedules import PhaseRates, RateStage
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.choosing import RANK_PREFIXES
from tests.lora_engine.training.runs import Ending, Runs, curves_of, digests, factors_of

CHOICE: dict[str, Any] = {"by": "validation_loss", "every": 1, "patience": 0, "anneal": 0}
PLANNED = (PhaseRates("one", (RateStage(10),)), PhaseRates("two", (RateStage(100, warmup="10%"),)))


def chooser(**change: Any) -> Chooser:
    return Chooser(**{"by": "validation_loss", "every": 10, "patience": 3, "min_delta": 0.0, "anneal": 0.2, **change})


def checks(*scores: float, first: int = 10, every: int = 10) -> list[Check]:
    return [Check(first + every * number, ((score, score),)) for number, score in enumerate(scores)]


def test_without_an_early_stop_the_last_share_of_the_steps_falls_to_0() -> None:
    before, last = chooser().rates(PLANNED, checks(5, 4, 3))
    assert before == PLANNED[0]
    assert [(stage.steps, stage.schedule) for stage in last.stages] == [(80, "constant"), (20, "linear")]
    assert [last.factor(step) for step in (9, 10, 79, 80, 99)] == pytest.approx([10 / 11, 1, 1, 1, 0.05])


def test_patience_counts_candidates_without_an_improvement() -> None:
    assert chooser().find_stop(checks(5, 4, 4, 4.1, 3.9, 4, 4, 4)[1:]) == 80
    assert chooser(min_delta=0.2).find_stop(checks(5, 4, 4, 4.1, 3.9, 4, 4, 4)[1:]) == 50
    assert chooser(patience=0).find_stop(checks(1, 2, 3, 4, 5)) is None


def test_an_early_stop_leaves_the_same_share_for_the_falling_rate() -> None:
    # The first check is that before the phase; it stops after 3 without an improvement, 40 steps into it.
    _, last = chooser().rates(PLANNED, checks(9, 4, 5, 5, 5))
    assert [stage.steps for stage in last.stages] == [40, 10]
    assert last.steps == 50
    _, ended = chooser(anneal=0.0).rates(PLANNED, checks(9, 4, 5, 5, 5))
    assert (ended.steps, ended.stages) == (40, PLANNED[1].stages)
    assert PhaseRates.from_json(ended.to_json()) == ended


def test_checks_of_the_falling_rate_end_nothing() -> None:
    rising = checks(9, *[9.0 - number for number in range(8)], 8, 8, 8)
    assert chooser().rates(PLANNED, rising) == chooser().rates(PLANNED, rising[:9])


def test_dvar_stops_when_the_last_losses_hardly_vary() -> None:
    falling = checks(0.354, 0.138, 0.116, 0.110, 0.1095, 0.111)[1:]
    assert chooser(by="dvar").find_stop(falling) == 50
    assert chooser(by="dvar").find_stop(checks(5, 4, 3, 2, 1, 0)) is None
    assert chooser(by="dvar").best(falling) is falling[-1]
    assert chooser(by="dvar").leave_one_out(falling) is None


def test_leave_one_out_scores_every_unit_by_a_choice_without_it() -> None:
    candidates = [Check(1, ((0.0, 1.0, 1.0),)), Check(2, ((0.9, 0.8, 0.9),))]
    assert chooser().best(candidates).step == 1
    # Without the first unit the second candidate wins: (0.9 + 1 + 1) / 3.
    assert chooser().leave_one_out(candidates) == pytest.approx((0.9 + 1.0 + 1.0) / 3)
    assert chooser().leave_one_out([Check(1, ((0.5,),))]) is None


def memorizing(*losses: tuple[float, float]) -> list[Check]:
    """Returns checks of held-out and training losses, after that of the base: 1 for both."""
    found: list[Check] = []
    for number, (heldout, trained) in enumerate([(1.0, 1.0), *losses]):
        found.append(with_memorized(Check(10 * number, ((heldout, heldout),), trained), found))
    return found


def test_the_memorized_share_of_a_candidate_is_that_of_the_metric() -> None:
    start, *candidates = memorizing((0.8, 0.5), (0.5, 0.5), (1.2, 0.6), (0.9, 0.995))
    assert start.memorized == 0.0
    for check, expected in zip(candidates, (0.6, 0.0, 1.5, 0.0), strict=True):
        trained, heldout = (
            (np.array([before]), np.array([after])) for before, after in ((1, check.trained), (1, check.score))
        )
        assert check.memorized == pytest.approx(float(share_memorized(heldout, trained)[0]))
        assert check.memorized == pytest.approx(expected)


def test_a_candidate_that_memorizes_too_much_is_neither_kept_nor_an_improvement() -> None:
    start, *candidates = memorizing((0.9, 0.8), (0.7, 0.1), (0.85, 0.75), (0.6, 0.05))
    plain, limited = chooser(), chooser(max_memorized=0.5, patience=2)
    assert [round(check.memorized or 0.0, 2) for check in candidates] == [0.5, 0.67, 0.4, 0.58]
    assert plain.best(candidates).step == 40
    assert limited.best(candidates).step == 30
    assert limited.find_stop(candidates) is None
    assert chooser(max_memorized=0.45, patience=2).find_stop(candidates) == 20, "the first two are no improvement"
    assert limited.leave_one_out(candidates) == pytest.approx(0.85)
    described = limited.describe(start, candidates, 40)
    assert described["candidates"]["memorized"][1] == [20, pytest.approx(2 / 3)]
    assert "lowest validation loss of 2 candidates that memorize at most 0.5" in described["candidates"]["why"]
    assert "memorized" not in plain.describe(start, candidates, 40)["candidates"]


def test_if_every_candidate_memorizes_too_much_the_least_is_kept_and_the_reason_says_so() -> None:
    start, *candidates = memorizing((0.9, 0.5), (0.75, 0.4), (0.7, 0.1))
    limited = chooser(max_memorized=0.5)
    assert limited.best(candidates).step == 20
    why = limited.describe(start, candidates, 30)["candidates"]["why"]
    assert "every one of 3 candidates memorizes more than 0.5, step 20 the least (0.58)" in why
    assert limited.leave_one_out(candidates) == pytest.approx(0.75)


def test_the_losses_of_training_images_survive_a_checkpoint() -> None:
    found = memorizing((0.8, 0.5), (0.7, 0.1))
    assert read_checks(json.loads(json.dumps(write_checks(found)))) == found
    assert write_checks(checks(5, 4)).keys() == {"checks"}


def test_with_an_automatic_rank_a_step_counts_by_its_best_prefix() -> None:
    # By the last row, the highest rank, the first step would win.
    candidates = [Check(10, ((0.5, 0.5), (0.4, 0.4))), Check(20, ((0.1, 0.3), (0.6, 0.6)))]
    assert [check.score for check in candidates] == pytest.approx([0.4, 0.2])
    assert chooser().best(candidates).step == 20
    # Without a unit, the same row wins: the mean of both.
    assert chooser().leave_one_out(candidates) == pytest.approx(0.2)
    # Without its first unit, (0.1, 0.6) is worse than (0.5, 0.5).
    assert chooser().leave_one_out([Check(10, ((0.5, 0.5), (0.1, 0.6)))]) == pytest.approx((0.5 + 0.6) / 2)
    assert read_checks(json.loads(json.dumps(write_checks(candidates)))) == candidates
    single = checks(3.0, 2.0)
    assert read_checks(json.loads(json.dumps(write_checks(single)))) == single


def simulate_bias(n: int, k: int, trials: int, corrected: bool) -> float:
    """Returns the mean of the reported loss minus the true one, in sd of a unit; all candidates are equally good."""
    random, total = np.random.Generator(np.random.PCG64(n * 100 + k)), 0.0
    for _ in range(trials):
        values = np.empty((k, n))
        values[0] = random.standard_normal(n)
        for step in range(1, k):  # neighbors correlate by .6, as in the fact paper
            values[step] = 0.6 * values[step - 1] + 0.8 * random.standard_normal(n)
        candidates = [Check(step, (tuple(row),)) for step, row in enumerate(values.tolist())]
        rules = chooser()
        reported = rules.leave_one_out(candidates) if corrected else rules.best(candidates).score
        assert reported is not None
        total += reported
    return total / trials


@pytest.mark.nightly
@pytest.mark.parametrize(("n", "k"), [(6, 5), (6, 20), (8, 10), (16, 10), (32, 20)])
def test_the_corrected_figure_has_hardly_a_bias(n: int, k: int) -> None:
    assert abs(simulate_bias(n, k, 4_000, corrected=True)) < 0.05
    # The figure of the winner itself is too good: what the correction is for.
    assert simulate_bias(n, k, 400, corrected=False) < -0.1


def test_the_corrected_figure_has_less_bias_than_that_of_the_winner() -> None:
    assert abs(simulate_bias(6, 5, 400, corrected=True)) < 0.12
    assert simulate_bias(6, 5, 400, corrected=False) < -0.25


@pytest.mark.parametrize(
    ("heldout", "scored", "by"), [(0, 5, "dvar"), (5, 5, "dvar"), (6, 6, "validation_loss"), (9, 5, "validation_loss")]
)
def test_from_8_groups_on_half_of_the_held_out_images_is_left_for_the_evaluation(
    make_dataset: Callable[..., Path],
    settings: Callable[..., TrainSettings],
    caplog: pytest.LogCaptureFixture,
    heldout: int,
    scored: int,
    by: str,
) -> None:
    dataset = make_dataset(heldout=heldout)
    manifest = Manifest.load(dataset)
    with caplog.at_level(logging.WARNING):
        choice = choice_images(settings(best_checkpoint={}), dataset, manifest)
    assert (len(choice.units), choice.by) == (scored, by)
    assert ("too few" in caplog.text) is (heldout == 5)
    digests = sorted(image.sha256 for image in manifest.of_split("heldout"))
    assert list(choice.heldout) == ([] if by == "dvar" else digests[::2] if heldout == 9 else digests)


def test_images_that_show_the_same_are_one_unit(
    make_dataset: Callable[..., Path], settings: Callable[..., TrainSettings]
) -> None:
    dataset = make_dataset(heldout=8)
    manifest = Manifest.load(dataset)
    first, second = manifest.of_split("heldout")[:2]
    (dataset / second.file).write_bytes((dataset / first.file).read_bytes())
    choice = choice_images(settings(best_checkpoint={}), dataset, manifest)
    assert sorted(map(len, choice.units)) == [1] * 6 + [2]
    assert len(choice.heldout) == 8
    assert choice.unit_losses([float(number) for number in range(8)])[0] in (0.0, 0.5)


def test_a_score_without_its_images_is_refused(
    make_dataset: Callable[..., Path], settings: Callable[..., TrainSettings]
) -> None:
    dataset = make_dataset()
    with pytest.raises(SettingsError, match="no held-out images"):
        choice_images(settings(best_checkpoint=CHOICE), dataset, Manifest.load(dataset))


def test_the_chosen_step_is_written_with_the_evidence(runs: Runs, make_dataset: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"dataset": make_dataset(heldout=6), "steps": 4, "schedule": "constant"}
    # The rate is so high that the first step is the best.
    settings |= {"learning_rate": 5.0, "clip": 0.0}
    out = runs("best", best_checkpoint=CHOICE, **settings)
    curves = curves_of(out)
    chosen, candidates = curves["chosen"], curves["candidates"]
    best = min(candidates["scores"][1:], key=lambda entry: entry[1])
    assert (chosen["step"], chosen["score"]) == tuple(best)
    assert chosen["step"] < 4
    assert chosen["from"] == [1, 2, 3, 4]
    assert [step for step, _ in candidates["scores"]] == [0, 1, 2, 3, 4]
    assert len(chosen["on"]) == 6
    assert chosen["leave_one_out"] >= chosen["score"]
    done = read_bundle(out / "adapter.safetensors").card.recipe["done"]
    assert done["best_checkpoint"]["step"] == chosen["step"]
    assert done["best_checkpoint"]["among"] == 4
    assert ("NO candidate is better than the base" in candidates["why"]) is (best[1] >= candidates["scores"][0][1])
    shorter = runs("shorter", **{**settings, "steps": chosen["step"]})
    for name, factor in factors_of(shorter).items():
        assert torch.equal(factor, factors_of(out)[name])


def test_a_training_keeps_no_step_that_memorizes_more_than_allowed(
    runs: Runs, make_dataset: Callable[..., Path]
) -> None:
    settings: dict[str, Any] = {"dataset": make_dataset(heldout=6), "steps": 6, "schedule": "constant"}
    settings |= {"learning_rate": 0.5, "clip": 0.0}
    shares = {}
    for limit in (1.0, 0.0):
        choice = {**CHOICE, "max_memorized": limit}
        curves = curves_of(runs(f"limit {limit}", best_checkpoint=choice, **settings))
        shares[limit] = dict(map(tuple, curves["candidates"]["memorized"]))
        step, scores = curves["chosen"]["step"], dict(map(tuple, curves["candidates"]["scores"]))
        allowed = [step for step, share in shares[limit].items() if share <= limit]
        expected = (
            min(allowed, key=scores.__getitem__) if allowed else min(shares[limit], key=shares[limit].__getitem__)
        )
        assert step == expected
    assert shares[1.0] == shares[0.0], "the limit changes no step of the training"
    assert len(set(shares[0.0].values())) > 1


def test_a_limit_of_what_is_memorized_needs_held_out_images(
    make_dataset: Callable[..., Path], settings: Callable[..., TrainSettings]
) -> None:
    dataset = make_dataset(heldout=5)
    with pytest.raises(
        SettingsError, match=r"max_memorized is 0\.5, but the dataset has 5 held-out images; 6 are needed"
    ):
        choice_images(settings(best_checkpoint={"max_memorized": 0.5}), dataset, Manifest.load(dataset))


def test_a_training_without_an_improvement_stops_early(runs: Runs, make_dataset: Callable[..., Path]) -> None:
    ending = Ending()
    choice = {**CHOICE, "every": 2, "patience": 2, "min_delta": 10.0, "anneal": 0.5}
    out = runs("early", ending=ending, dataset=make_dataset(heldout=6), steps=100, best_checkpoint=choice)
    # The first candidate improves on nothing; two more end it at step 6, and 6 steps fall to 0.
    assert ending.steps == list(range(1, 13))
    curves = curves_of(out)
    assert curves["candidates"]["stopped"] == 6
    assert [round(rate / curves["lr"][0][1], 2) for _, rate in curves["lr"]][5:] == [1, 1, 0.83, 0.67, 0.5, 0.33, 0.17]


def test_a_few_held_out_images_stop_by_the_training_loss(runs: Runs) -> None:
    out = runs("few", steps=60, best_checkpoint={"every": 1, "anneal": 0}, schedule="constant")
    chosen = curves_of(out)["chosen"]
    assert (chosen["by"], chosen["on"], chosen["leave_one_out"]) == ("dvar", [], None)
    assert chosen["step"] == chosen["from"][-1] <= 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best_checkpoint": {}, "schedule": "cosine"}, "schedule is 'cosine'"),
        ({"best_checkpoint": {}, "then": [{"steps": 1}]}, "`then` cannot add others"),
        ({"best_checkpoint": {}, "rates": {"optimiser": "schedule-free"}}, "set best_checkpoint.anneal to 0"),
        ({"learning_rate": "auto", "rates": {"optimiser": "prodigy"}}, "finds the rate itself"),
        ({"best_checkpoint": {"by": "dvar", "max_memorized": 0.5}}, "by: dvar does not use"),
        ({"best_checkpoint": {"max_memorized": 1.5}}, "less than or equal to 1"),
        ({"rank": "auto", "best_checkpoint": {"max_memorized": 0.5}}, "compares one rank"),
        ({"rank": "auto", "alpha": 1.0}, "leave alpha and overrides out"),
        ({"rank": "auto", "kind": "loha"}, "choose kind lora"),
        ({"rank": "auto", "kind": {"name": "lora", "tucker": True}}, "choose kind lora"),
        ({"rank": "auto", "rank_dropout": 0.1}, "leave rank_dropout out"),
        ({"targets": "auto", "method": "textual-inversion"}, "trains no adapter"),
        ({"rank": "automatic"}, "valid integer"),
    ],
    ids=str,
)
def test_settings_that_contradict_the_choice_are_refused(
    settings: Callable[..., TrainSettings], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**change)


def test_automatic_steps_are_the_longest_training_until_a_choice_ends_it(
    settings: Callable[..., TrainSettings],
) -> None:
    limited = limit_steps(settings(steps="auto"), 2)
    assert (limited.steps, limited.schedule.name, limited.automatic) == (400, "constant", ())
    assert limited.best_checkpoint is not None
    assert limit_steps(settings(steps="auto"), 1).steps == 200
    assert limit_steps(settings(steps="auto"), 10**6).steps == 20_000
    assert limit_steps(settings(steps=5), 2).steps == 5


def test_the_rate_is_the_one_below_the_best() -> None:
    flat = {1e-3: [3.0, 3.1], 2e-3: [2.0, 2.1], 4e-3: [1.0, 1.4], 8e-3: [1.1, 1.2], 1.6e-2: None}
    # 4e-3 and 8e-3 do not differ by a standard error, so the lower one is the best.
    rate, evidence = choose_rate(flat)
    assert (rate, evidence["best"]) == (2e-3, 4e-3)
    assert evidence["losses"][-1] == [1.6e-2, None]
    lowest, evidence = choose_rate({1e-3: [1.0, 1.1], 2e-3: [2.0, 2.1]})
    assert lowest == 1e-3
    assert "lowest that was tried" in evidence["why"]
    with pytest.raises(ValueError, match="every rate diverged"):
        choose_rate({1e-3: None})


def test_the_rank_is_the_smallest_within_a_standard_error_of_the_best() -> None:
    losses = {1: [3.0, 3.0, 3.0], 4: [1.0, 1.3, 1.0], 8: [1.0, 1.0, 1.0], 16: [1.0, 1.0, 1.1]}
    rank, evidence = choose_rank(losses)
    assert (rank, evidence["best"]) == (4, 8)
    assert choose_rank({**losses, 4: [1.1, 1.1, 1.1]})[0] == 8


def test_blocks_that_hardly_change_the_loss_are_dropped() -> None:
    products = {"unet.down_blocks.0.attentions.1.a": 50.0, "unet.down_blocks.0.attentions.1.b": 50.0, "unet.mid.x": 0.9}
    layers, evidence = choose_blocks(products)
    assert layers == ["unet.down_blocks.0.attentions.1.a", "unet.down_blocks.0.attentions.1.b"]
    assert evidence["blocks"] == [
        ["unet.down_blocks.0.attentions.1", 1.0, True],
        ["unet.mid", pytest.approx(0.009), False],
    ]
    assert choose_blocks({**products, "unet.mid.x": 1.0})[0] == "all"
    assert block_of("transformer.single_transformer_blocks.12.attn.to_q") == "transformer.single_transformer_blocks.12"


AUTOMATIC: dict[str, Any] = {"rank": "auto", "learning_rate": "auto", "targets": "auto", "steps": 8}


@pytest.mark.nightly
def test_automatic_settings_resume_to_the_same_bytes(runs: Runs, make_dataset: Callable[..., Path]) -> None:
    # Two candidates of eight steps: each is measured at every rank.
    settings = {**AUTOMATIC, "dataset": make_dataset(heldout=6), "best_checkpoint": {**CHOICE, "every": 4}}
    expected = runs("straight", **settings)
    # Two batches of each of five rates, then those of the training.
    out, steps = runs.resume("resumed", [Ending(batch=3), Ending(batch=2, crashes=True), Ending(batch=9)], **settings)
    assert digests(out) == digests(expected)
    assert steps[-1] == 8
    automatic = curves_of(out)["automatic"]
    assert set(automatic) == {"targets", "learning_rate", "rank"}
    recipe = read_bundle(out / "adapter.safetensors").card.recipe
    assert (recipe["rank"], recipe["learning_rate"]) == (
        automatic["rank"]["chosen"],
        automatic["learning_rate"]["chosen"],
    )
    assert recipe["done"]["automatic"]["rank"]["losses"] == automatic["rank"]["losses"]
    chosen = curves_of(out)["chosen"]
    assert chosen["score"] == pytest.approx(min(loss for _, loss in automatic["rank"]["losses"]), rel=1e-5)
    assert {delta.rank for delta in read_bundle(out / "adapter.safetensors").adapter.modules.values()} == {
        recipe["rank"]
    }
    # The narrowest layers of the base have 8 columns.
    assert [rank for rank, _ in automatic["rank"]["losses"]] == [rank for rank in RANK_PREFIXES if rank <= 8]


def test_the_cut_adapter_is_the_prefix_that_was_measured(runs: Runs, make_dataset: Callable[..., Path]) -> None:
    settings = {"rank": "auto", "steps": 3, "dataset": make_dataset(heldout=6)}
    out = runs("cut", **settings)
    rank = curves_of(out)["automatic"]["rank"]
    measured = dict(map(tuple, rank["losses"]))[rank["chosen"]]
    # A run of one step at almost no rate that starts from the cut file has its loss.
    init = {"arguments": {"init": out / "adapter.safetensors"}}
    again = runs(
        "again",
        **init,
        **{**settings, "rank": rank["chosen"], "steps": 1, "learning_rate": 1e-12, "best_checkpoint": CHOICE},
    )
    assert curves_of(again)["candidates"]["scores"][0][1] == pytest.approx(measured, rel=1e-5)
