"""The resume law: an interrupted run that is started again gives the bytes of an uninterrupted run.

Cases come from the registries of methods and optimizers. `make test` runs a covering design, see `covering`;
`make nightly` runs every combination. Killed processes are tested in test_training_process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from lora_engine.training import fit_state, fitting
from lora_engine.training.loop import fit
from lora_engine.training.methods import methods
from lora_engine.training.optimizers import _PACKAGES, optimizers
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.rates import AnyOptimizer, Optimizer
from tests.lora_engine.training.runs import OBJECTIVE, Ending, Runs, digests, factors_of
from tests.support.untrained import save_other_vae

STEPS, ACCUMULATE, CHECKPOINT_EVERY = 4, 2, 2
USUAL: dict[str, Any] = {
    "steps": STEPS,
    "accumulate": ACCUMULATE,
    "checkpoint_every": CHECKPOINT_EVERY,
    "validate_every": 2,
    "warmup": 1,
    "dropout": 0.2,
    "caption_dropout": 0.2,
    "weight_decay": 0.01,
}
EMAS: dict[str, dict[str, Any] | None] = {"plain": None, "ema": {"decay": 0.8}}
SPECS: dict[str, Optimizer] = {spec().name: spec() for spec in get_args(get_args(AnyOptimizer)[0])}

MEETS = 4
"""Minimum number of stop points that each method meets in `make test`."""
PHASED = ("pivotal",)
"""Methods of more than one phase."""

Point = Callable[[int], tuple[Ending, int]]
"""Steps of the first phase -> ending of a run, and the step from which it must resume."""


def _last_checkpoint(step: int) -> int:
    return step if step == STEPS else step - step % CHECKPOINT_EVERY


POINTS: dict[str, Point] = {
    "stopped while it prepares": lambda first: (Ending(poll=2), 0),
    "stopped within an accumulation group": lambda first: (Ending(batch=0), 1),
    "crashes within an accumulation group": lambda first: (Ending(batch=5, crashes=True), 2),
    "stopped at a checkpoint": lambda first: (Ending(step=2), 2),
    # For methods of one phase: the end of the run, before its artifact is written.
    "stopped at the end of the first phase": lambda first: (Ending(step=first), first),
    "crashes at the end of the first phase": lambda first: (Ending(step=first, crashes=True), _last_checkpoint(first)),
    "crashes in the last step": lambda first: (Ending(batch=STEPS * ACCUMULATE - 1, crashes=True), 2),
}


@dataclass(frozen=True)
class Case:
    method: str
    optimizer: str
    ema: str
    point: str

    def __str__(self) -> str:
        return ", ".join((self.method, self.optimizer, self.ema, self.point))

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.method, self.optimizer, self.ema)


def settings_of(method: str, optimizer: str, ema: str) -> dict[str, Any]:
    spec = SPECS[optimizer]
    return {
        **USUAL,
        "method": method,
        "learning_rate": 1.0 if spec.finds_rate else 1e-3,
        "schedule": "constant" if spec.averages else "cosine",
        "rates": {"optimiser": optimizer, "ema": EMAS[ema]},
    }


def fits(method: str, optimizer: str, ema: str) -> bool:
    try:
        TrainSettings.model_validate(settings_of(method, optimizer, ema))
    except ValidationError:
        return False
    return True


def covering() -> Iterator[Case]:
    """Yields a covering design; `test_the_design_covers_every_required_pair` says what it covers.

    The pairs of optimizer and average are distributed over the methods, those that fit few methods first. Each method
    goes through its pairs and through consecutive stop points in turn, from another point than the method before it.
    """
    pairs_of: dict[str, list[tuple[str, str]]] = {method: [] for method in methods}
    methods_of = {pair: [method for method in methods if fits(method, *pair)] for pair in product(optimizers, EMAS)}
    for pair in sorted((pair for pair in methods_of if methods_of[pair]), key=lambda pair: len(methods_of[pair])):
        pairs_of[min(methods_of[pair], key=lambda method: len(pairs_of[method]))].append(pair)
    points = tuple(POINTS)
    for start, (method, pairs) in enumerate(pairs_of.items()):
        # A second phase begins with a new optimizer, so a method with two meets every point.
        count = len(POINTS) if method in PHASED else max(len(pairs), MEETS)
        for number in range(count):
            yield Case(method, *pairs[number % len(pairs)], points[(6 * start + number) % len(POINTS)])


COVERING = tuple(covering())
EVERY = tuple(Case(*case) for case in product(methods, optimizers, EMAS, POINTS) if fits(*case[:3]))


def parameter(case: Case) -> Any:
    package = _PACKAGES.get(case.optimizer, ("torch", "torch"))[0]
    missing = importlib.util.find_spec(package) is None
    marks = [pytest.mark.skipif(missing, reason=f"{package} is not installed")]
    return pytest.param(case, id=str(case), marks=marks if case in COVERING else [*marks, pytest.mark.nightly])


def test_the_design_covers_every_required_pair() -> None:
    assert set(optimizers) == set(SPECS)
    assert set(COVERING) <= set(EVERY)
    for method in methods:
        assert len({case.point for case in COVERING if case.method == method}) >= MEETS
    assert {case.point for case in COVERING if case.method in PHASED} == set(POINTS)
    unfit = {(name, "ema") for name, spec in SPECS.items() if spec.averages}
    assert {(case.optimizer, case.ema) for case in COVERING} == set(product(optimizers, EMAS)) - unfit
    assert {(case.ema, case.point) for case in COVERING} == set(product(EMAS, POINTS))
    for method in methods:
        assert len({case.optimizer for case in COVERING if case.method == method}) >= 2


def test_methods_of_several_phases_are_known(straight: Callable[[Case], Straight]) -> None:
    first = {case.method: straight(case).first for case in COVERING}
    assert {method for method in methods if first[method] < STEPS} == set(PHASED)


@dataclass(frozen=True)
class Straight:
    """An uninterrupted run: its digests, and the steps of its first phase."""

    digests: dict[str, str]
    first: int


@pytest.fixture(scope="module")
def straight_runs() -> dict[str, Straight]:
    return {}


@pytest.fixture
def straight(
    runs: Runs, straight_runs: dict[str, Straight], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], Straight]:
    """Runs the settings of a case without an interruption; once for all cases that share them."""

    def run(case: Case) -> Straight:
        key = str(case.settings)
        if key not in straight_runs:
            firsts: list[int] = []

            def note(phases: Any, *rest: Any, **options: Any) -> Any:
                firsts.append(phases[0].steps)
                return fit(phases, *rest, **options)

            with monkeypatch.context() as patch:
                patch.setattr(fitting, "fit", note)
                out = runs("straight", **case.settings)
            straight_runs[key] = Straight(digests(out), *firsts)
        return straight_runs[key]

    return run


@pytest.mark.parametrize("case", [parameter(case) for case in EVERY])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    runs: Runs, straight: Callable[[Case], Straight], case: Case
) -> None:
    expected = straight(case)
    ending, resumes_at = POINTS[case.point](expected.first)
    # A stop request in the last step comes too late.
    ends_early = ending.crashes or ending.step != STEPS
    out, steps = runs.resume("resumed", [ending] if ends_early else [], **case.settings)
    assert steps == list(range(resumes_at + 1 if ends_early else 1, STEPS + 1))
    assert digests(out) == expected.digests


def test_a_stop_request_in_the_last_step_comes_too_late(runs: Runs) -> None:
    ending = Ending(batch=STEPS * ACCUMULATE - 1)
    assert digests(runs("stopped", ending=ending, **USUAL)) == digests(runs("straight", **USUAL))
    assert ending.is_stopping
    assert ending.steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("missing_state", ["optimizer", "mean"])
def test_a_state_that_is_not_restored_changes_the_bytes(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, missing_state: str
) -> None:
    settings = settings_of("finetune", "adamw", "ema")
    expected = digests(runs("straight", **settings))
    if missing_state == "optimizer":
        monkeypatch.setattr(fit_state, "import_state", lambda *_: None)
    else:
        monkeypatch.setattr(fit_state.EmaWeights, "restore", lambda *_: None)
    out, steps = runs.resume("resumed", [Ending(step=2)], **settings)
    assert steps == [3, 4]
    assert digests(out).keys() == expected.keys()
    assert digests(out)["adapter.safetensors"] != expected["adapter.safetensors"]


TOKEN = {"token": "sks", "vectors": 2, "word_rate": 0.02}
ALTERNATING = {"count": 3, "steps": 2, "batches": "alternating"}
TEXT = ["attention", "text"]
OPTIONS: dict[str, dict[str, Any]] = {
    "pivotal with class images": {"method": {"name": "pivotal", **TOKEN}, "prior": ALTERNATING},
    "alternating class images": {"method": "dreambooth", "prior": ALTERNATING},
    "masks, identity, preservation": {
        "method": {"name": "finetune", "preservation": {}, "mask": {"temperature": 2.0}, "identity": {"until": 1.0}},
        "targets": TEXT,
    },
    "two text encoders and samples": {
        "targets": TEXT,
        "rates": {"ema": {"decay": 0.8, "written": "last"}},
        "samples": {"every": 2, "prompts": ["a ring", "a star --n red --d 3"], "seeds": [1], "steps": 2},
        "shape": "small-sdxl",
    },
    "stages, a warmup by share and saved adapters": {
        "method": {"name": "pivotal", **TOKEN},
        "steps": 2,
        "warmup": "10%",
        "then": [{"steps": 2, "learning_rate": 3e-4, "schedule": "linear"}],
        "save_every": 1,
    },
    "the best of several steps": {
        "method": {"name": "pivotal", **TOKEN},
        "best_checkpoint": {"by": "validation_loss", "every": 1, "patience": 0, "anneal": 0.5, "max_memorized": 0.1},
        "schedule": "constant",
        "rates": {"ema": {"decay": 0.8}},
    },
    "the end of a training that stops early": {
        "best_checkpoint": {"by": "validation_loss", "every": 1, "patience": 1, "min_delta": 10.0, "anneal": 0.5},
        "schedule": "constant",
        "steps": 40,
    },
    "prefixes of the ranks": {"rank": "auto", "targets": TEXT, "save_every": 2},
    "dropout of ranks and modules, and a norm limit": {
        "rank_dropout": 0.5,
        "module_dropout": 0.5,
        "norm_limit": 0.01,
    },
    "frozen weights in float8, in the memory of the CPU": {"running": {"quantise": "fp8", "offload": 0.5}},
    "a base in bfloat16 and gradient checkpointing": {
        "precision": "bf16",
        "running": {"gradient_checkpointing": True, "channels_last": True},
        "objective": {"loss": {"name": "smooth_l1", "delta": 0.3, "schedule": "snr"}},
    },
    "another layer of the text encoder and a rescaled schedule": {
        "clip_skip": 2,
        "prediction": "v_prediction",
        "zero_terminal_snr": True,
    },
    "objective and rates": {
        "method": "dreambooth",
        "targets": TEXT,
        "objective": OBJECTIVE,
        "rates": {"text": 1e-4, "up_ratio": 4.0, "ema": {"decay": 0.8}},
        "schedule": {"name": "cosine-restarts", "cycles": 2, "floor": 0.1},
        "shape": "small-sd-v",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_more_options_resumes_to_the_same_bytes(runs: Runs, masked: Path, name: str) -> None:
    settings = {**USUAL, **OPTIONS[name], "dataset": masked}
    expected = runs("straight", **settings)
    assert any(value.any() for key, value in factors_of(expected).items() if key.endswith("up"))
    out, steps = runs.resume("resumed", [Ending(batch=1), Ending(batch=3, crashes=True)], **settings)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)


def test_a_run_with_another_autoencoder_resumes_to_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    plain = runs("plain", **USUAL)
    change = {**USUAL, "arguments": {"vae": str(save_other_vae(runs.bases["small-sd"], tmp_path / "vae"))}}
    expected = runs("straight", **change)
    out, steps = runs.resume("resumed", [Ending(batch=5, crashes=True)], **change)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)
    assert any(not value.equal(factors_of(plain)[name]) for name, value in factors_of(out).items())


CAPTIONS: dict[str, Any] = {
    "wildcards": True,
    "replacements": {"on": ["on", "upon"]},
    "shuffle": True,
    "keep_tokens": 1,
    "tag_dropout": 0.2,
    "keep_separator": "|||",
    "secondary_separator": ";;;",
    "tag_warmup": 3,
    "dropout_every": 2,
    "templates": ["a photo of {}", "{}"],
    "prefix": "the ",
    "weights": True,
    "chunks": 2,
    "flip": True,
    "colours": {"variants": 1, "hue": 0.1},
}


@pytest.mark.parametrize(("shape", "targets"), [("small-sdxl", "attention"), ("small-sd", TEXT)])
def test_a_run_with_augmentations_resumes_to_the_same_bytes(
    runs: Runs, varied: Path, tmp_path: Path, shape: str, targets: Any
) -> None:
    settings = {**USUAL, "captions": CAPTIONS, "targets": targets, "shape": shape, "dataset": varied}
    expected = runs("straight", arguments={"cache": tmp_path / "encoded by this run alone"}, **settings)
    out, steps = runs.resume("resumed", [Ending(batch=1), Ending(batch=3, crashes=True)], **settings)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)
