"""Data-parallel training: the shards of a batch, and equality with a single process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import BaseModelError, EngineError, InterruptedRun, SettingsError, TrainingError
from lora_engine.files import sha256_file
from lora_engine.formats import read_bundle
from lora_engine.training.batches import Batch
from lora_engine.training.distributed import ProcessGroup, process_group
from lora_engine.training.preservation import PreservationBatch
from lora_engine.training.run import train
from lora_engine.training.sharding import shard_network
from lora_engine.training.spawn import _environments, train_in_child
from lora_engine.training.spec import TrainSettings
from tests.faults.points import forked
from tests.support.untrained import write_untrained_base

TWO = {"running": {"processes": 2, "device": "cpu"}}
ONE = {"running": {"device": "cpu"}}


def batch_of(rows: int, instances: int) -> Batch:
    numbers = torch.arange(rows, dtype=torch.float32).view(rows, 1, 1, 1)
    return Batch(
        latents=numbers,
        noise=-numbers,
        timesteps=torch.arange(rows),
        conditioning=Conditioning({"states": numbers.view(rows, 1, 1)}),
        instances=instances,
    )


def test_the_shards_of_a_batch_cover_it_and_keep_the_proportion_of_instances() -> None:
    whole = batch_of(8, 4)
    shards = [ProcessGroup(rank, 2).shard(whole) for rank in (0, 1)]
    assert [shard.instances for shard in shards] == [2, 2]
    assert shards[0].timesteps.tolist() == [0, 2, 4, 6]
    assert shards[1].timesteps.tolist() == [1, 3, 5, 7]
    for shard in shards:
        assert torch.equal(shard.latents, -shard.noise)
        assert torch.equal(shard.latents.view(-1), shard.conditioning["states"].view(-1))
        assert (shard.timesteps[: shard.instances] < 4).all()
    assert ProcessGroup().shard(whole) is whole


def test_a_teachers_conditioning_is_sharded_with_its_rows() -> None:
    plain = batch_of(8, 4)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    whole = PreservationBatch(**fields, teacher_conditioning=plain.conditioning.index(range(4, 8)))
    for rank in (0, 1):
        shard = ProcessGroup(rank, 2).shard(whole)
        assert isinstance(shard, PreservationBatch)
        assert shard.teacher_conditioning["states"].view(-1).tolist() == shard.timesteps[shard.instances :].tolist()


def test_an_indivisible_batch_is_refused(settings: Callable[..., TrainSettings]) -> None:
    with pytest.raises(SettingsError, match="3 images and 3 other rows"):
        ProcessGroup(0, 2).shard(batch_of(6, 3))
    with pytest.raises(ValueError, match="batch 3 is not a multiple"):
        settings(batch=3, **TWO)


def test_a_single_process_refuses_settings_for_several(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Callable[..., TrainSettings]
) -> None:
    with pytest.raises(SettingsError, match="single process"):
        train(settings(**TWO), str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")


@pytest.fixture
def job(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(name: str, **change: Any) -> dict[str, Any]:
        settings = {"method": "dreambooth", "prior": {"count": 3, "steps": 2}, "rank": 2, "batch": 4, "seed": 7}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return {
            "settings": {**settings, "steps": 6, "accumulate": 2, "checkpoint_every": 2, **change},
            "base": str(bases["small-sd"]),
            "dataset": str(dataset),
            "out": str(folder / "out"),
            "work": str(folder / "work"),
        }

    return make


def train_here(job: dict[str, Any]) -> None:
    folders = (Path(job[name]) for name in ("dataset", "out", "work"))
    train(TrainSettings.model_validate(job["settings"]), job["base"], *folders)


def digest(job: dict[str, Any]) -> str:
    return sha256_file(Path(job["out"]) / "adapter.safetensors")


def require_same_training(one: dict[str, Any], two: dict[str, Any]) -> None:
    single, both = (read_bundle(Path(done["out"]) / "adapter.safetensors").adapter for done in (one, two))
    assert single.modules.keys() == both.modules.keys()
    moved = 0.0
    for name, delta in single.modules.items():
        for factor, value in delta.factors().items():
            value_of_two = both.modules[name].factors()[factor]
            torch.testing.assert_close(value_of_two, value, rtol=0, atol=1e-6)
            moved = max(moved, float(value.abs().max())) if factor == "up" else moved
    embeddings = [read_bundle(Path(done["out"]) / "adapter.safetensors").embeddings for done in (one, two)]
    for first, second in zip(*embeddings, strict=True):
        torch.testing.assert_close(dict(first.vectors), dict(second.vectors), rtol=0, atol=1e-6)
    assert moved > 1e-4 or embeddings[0]


COMBINED = {"name": "dreambooth", "mask": {"floor": 0.2, "normalise": True}, "identity": {"until": 0.9}}
"""One method with class images, masks and an embedder: shared or computed by each process."""


def halt_and_resume(job: dict[str, Any]) -> None:
    seen: list[int] = []
    with pytest.raises(InterruptedRun, match=r"stopped after \d of 6"):
        train_in_child(job, lambda done, total, values: seen.append(done), stop=lambda: bool(seen and seen[-1] > 0))
    assert not Path(job["out"]).exists()
    train_in_child(job, lambda done, total, values: seen.append(done))
    steps = [done for done in seen if done]  # 0 is the preparation, which a resumed run repeats
    assert sorted(steps) == steps


def train_forked(job: dict[str, Any]) -> None:
    """Trains in two processes that need no imports, unlike those of `train_in_child`."""
    Path(job["work"]).mkdir(parents=True)
    trials = [
        forked(lambda _: train_here(job), before=partial(os.environ.update, environment))
        for environment in _environments(2, Path(job["work"]) / "rendezvous")
    ]
    assert [trial.finish() for trial in trials] == [(0, [])] * 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_match_a_single_one(job: Callable[..., dict[str, Any]]) -> None:
    one, two = (job(name, method=COMBINED, **how) for name, how in (("one", ONE), ("two", TWO)))
    train_here(one)
    train_forked(two)
    require_same_training(one, two)
    curves = [json.loads((Path(done["out"]) / "training.json").read_bytes())["loss"] for done in (one, two)]
    assert len(curves[0]) == 6
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_choose_the_same_rate_rank_and_step(job: Callable[..., dict[str, Any]]) -> None:
    choice = {"best_checkpoint": {"by": "validation_loss", "every": 2}, "schedule": "constant"}
    automatic = {"rank": "auto", "learning_rate": "auto", **choice}
    one, two = (job(name, **automatic, **how) for name, how in (("one", ONE), ("two", TWO)))
    train_here(one)
    train_forked(two)
    require_same_training(one, two)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_no_process_disconnects_before_all_have_ended(tmp_path: Path) -> None:
    disconnected = tmp_path / "disconnected"

    def run(say: Callable[[str], None]) -> None:
        with process_group(2, "cpu") as group:
            group.barrier()
            if not group.is_main_process:
                time.sleep(1)
                say(str(disconnected.exists()))
        disconnected.touch()

    trials = [
        forked(run, before=partial(os.environ.update, environment))
        for environment in _environments(2, tmp_path / "rendezvous")
    ]
    assert [trial.finish() for trial in trials] == [(0, []), (0, ["False"])]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_when_one_of_two_dies_the_other_ends_and_the_cause_is_reported(
    job: Callable[..., dict[str, Any]], rank: int
) -> None:
    dying = job("dying", steps=100_000, **TWO)
    killed: list[int] = []

    def kill(done: int, total: int, values: Any) -> None:
        if done and not killed:
            killed.append(child_of(dying, rank))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(TrainingError, match="SIGKILL"):
        train_in_child(dying, kill)
    assert killed
    for child_rank in (0, 1):
        with pytest.raises(LookupError):
            child_of(dying, child_rank)


@pytest.mark.nightly
def test_two_processes_resume_to_the_bytes_of_two_uninterrupted_ones(job: Callable[..., dict[str, Any]]) -> None:
    two, halted = job("two", method=COMBINED, **TWO), job("halted", method=COMBINED, **TWO)
    train_in_child(two)
    halt_and_resume(halted)
    assert digest(halted) == digest(two)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "change",
    [
        {
            "method": {
                "name": "finetune",
                "preservation": {"prompt": "a star"},
                "mask": {"floor": 0.2, "normalise": True},
                "identity": {"until": 0.9},
            },
            "prior": None,
        },
        {"method": {"name": "inpainting"}, "prior": None},
        {"method": {"name": "textual-inversion", "token": "sks"}, "prior": None},
        {"method": {"name": "pivotal", "token": "sks"}},
        {"method": {"name": "dreambooth"}},
    ],
    ids=["preservation, masks and identity", "inpainting", "textual-inversion", "pivotal", "dreambooth"],
)
def test_two_processes_match_a_single_one_with_every_method(job: Callable[..., dict[str, Any]], change: Any) -> None:
    one, two = (job(name, **change, steps=2, accumulate=1, **how) for name, how in (("one", ONE), ("two", TWO)))
    train_here(one)
    train_in_child(two)
    require_same_training(one, two)


SHARDED = {"running": {"processes": 2, "device": "cpu", "shard": True}}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "change",
    [
        {"samples": {"prompts": ("a star",), "every": 3, "steps": 1}},
        pytest.param({"kind": {"name": "dora", "inner": "lora"}}, marks=pytest.mark.nightly),
        pytest.param({"running": {"gradient_checkpointing": True}}, marks=pytest.mark.nightly),
        pytest.param({"base": "small-flux"}, marks=pytest.mark.nightly),
        pytest.param({"targets": "all", "validate_every": 1, "save_every": 1}, marks=pytest.mark.nightly),
        pytest.param(
            {
                "best_checkpoint": {"by": "dvar", "every": 1, "patience": 0, "anneal": 0},
                "schedule": "constant",
                "rates": {"optimiser": "sgd", "ema": {"decay": 0.8}},
            },
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            {"method": {"name": "pivotal", "token": "sks", "preservation": {"prompt": "a star"}}},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["lora and samples", "dora", "checkpointing", "flux", "all and validation", "best checkpoint", "pivotal"],
)
def test_two_processes_with_a_split_network_match_two_with_all_of_it(
    job: Callable[..., dict[str, Any]], tmp_path: Path, change: dict[str, Any]
) -> None:
    # Unlike Adam, SGD does not turn the rounding of a small gradient into a step of full size.
    rates = {"rates": {"optimiser": "sgd"}, "learning_rate": 1.0}
    change = {"method": "finetune", "prior": None, "steps": 3, **rates, **change}
    running, base = change.pop("running", {}), tmp_path / "base"
    write_untrained_base(base, change.pop("base", "small-sd"))
    whole, split = (
        {**job(name, **change, running={**how["running"], **running}), "base": str(base)}
        for name, how in (("whole", TWO), ("split", SHARDED))
    )
    train_forked(whole)
    train_forked(split)
    require_same_training(whole, split)
    drawn = [sorted(Path(done["out"]).glob("samples/*/*.png")) for done in (whole, split)]
    assert [len(files) for files in drawn] == [2 if "samples" in change else 0] * 2
    for first, second in zip(*drawn, strict=True):
        torch.testing.assert_close(read_pixels(second), read_pixels(first), rtol=0, atol=1.01 / 127.5)


def test_each_process_keeps_a_share_of_a_split_network(bases: dict[str, Path], tmp_path: Path) -> None:
    def run(say: Callable[[str], None]) -> None:
        with process_group(2, "cpu") as group:
            base = load_base(str(bases["small-sd"]), device="cpu")
            (network,) = (module for name, module in base.modules.items() if name == "unet")
            count = sum(value.numel() for value in network.parameters())
            adapter = create_adapter(base, "attention", rank=2)
            with attach(base, adapter, trainable=True) as attachment:
                shard_network(base, group)
                own = {id(value) for value in attachment.parameters()}
                kept = [value for value in network.parameters() if id(value) not in own]
                assert all(value.requires_grad for value in attachment.parameters())
            say(str(sum(value.to_local().numel() for value in kept) / count < 0.6))

    trials = [
        forked(run, before=partial(os.environ.update, environment))
        for environment in _environments(2, tmp_path / "rendezvous")
    ]
    assert [trial.finish() for trial in trials] == [(0, ["True"])] * 2


@pytest.mark.nightly
def test_two_processes_with_a_split_network_resume_to_the_same_bytes(job: Callable[..., dict[str, Any]]) -> None:
    change = {"method": "finetune", "prior": None}
    straight, halted = job("straight", **change, **SHARDED), job("halted", **change, **SHARDED)
    train_in_child(straight)
    halt_and_resume(halted)
    assert digest(halted) == digest(straight)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"running": {"shard": True}}, "set processes to the number of GPUs"),
        ({"running": {**SHARDED["running"], "quantise": "fp8"}}, "shard does not go with quantise"),
        ({"running": {**SHARDED["running"], "offload": 0.5}}, "shard does not go with offload"),
        ({"running": {**SHARDED["running"], "compile": "regional"}}, "shard does not go with compile"),
        ({**SHARDED, "rank": "auto"}, "rank auto needs the whole network"),
    ],
)
def test_what_a_split_network_cannot_do_is_refused(
    settings: Callable[..., TrainSettings], change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        settings(**{"batch": 4, **change})


def test_class_images_are_not_drawn_with_a_split_network(job: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SettingsError, match="class images would be drawn by one process"):
        train_in_child(job("drawn", **SHARDED))


@pytest.mark.parametrize(
    ("parts", "change", "error", "problem"),
    [
        # Before the processes have connected, and after.
        ({"base": "./nowhere"}, {}, BaseModelError, "nowhere"),
        pytest.param({}, {"rank": 4096}, SettingsError, "4096", marks=pytest.mark.nightly),
    ],
)
def test_an_error_of_all_processes_is_reported_once_with_its_class(
    job: Callable[..., dict[str, Any]],
    parts: dict[str, Any],
    change: dict[str, Any],
    error: type[EngineError],
    problem: str,
) -> None:
    with pytest.raises(error, match=problem):
        train_in_child({**job("wrong", **change, **TWO), **parts})


def child_of(job: dict[str, Any], rank: int) -> int:
    target, rank_variable = str(Path(job["work"]) / "job.json").encode(), f"RANK={rank}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            has_job = target in (path / "cmdline").read_bytes().split(b"\0")
            if has_job and rank_variable in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    raise LookupError("no child process has this job and rank")
