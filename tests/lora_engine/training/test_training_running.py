"""Sample pictures, and what changes where and how training computes but not what."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import read_adapter
from lora_engine.training.fresh import begin_adapter
from lora_engine.training.machine import choose_device
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.running import Running

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]
SAMPLES = {"every": 2, "prompts": ["a sks star", "a ring"], "seeds": [3, 5], "steps": 2}

# Torch's compiler warns of things inside itself.
COMPILED = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def digests(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): sha256_file(path) for path in sorted(out.rglob("*")) if path.is_file()}


def factors_of(out: Path) -> dict[str, torch.Tensor]:
    adapter, _ = read_adapter(out / "adapter.safetensors")
    return {f"{name}.{key}": value for name, delta in adapter.modules.items() for key, value in delta.factors().items()}


def test_samples_are_drawn_at_intervals_and_leave_the_adapter_as_it_is(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    base = str(bases["small-sd"])
    train(settings(steps=5), base, dataset, tmp_path / "plain", tmp_path / "work")
    train(settings(steps=5, samples=SAMPLES), base, dataset, tmp_path / "sampled", tmp_path / "work")
    found, plain = digests(tmp_path / "sampled"), digests(tmp_path / "plain")
    names = {f"{number:02d}-{seed}.png" for number in (0, 1) for seed in (3, 5)}
    drawn = {f"samples/step-{step:06d}/{name}" for step in (2, 4) for name in names}
    assert found.keys() == plain.keys() | drawn | {"samples/samples.json"}
    assert all(found[name] == digest for name, digest in plain.items())
    assert json.loads((tmp_path / "sampled/samples/samples.json").read_bytes())["prompts"] == SAMPLES["prompts"]
    # They show the adapter as it grows, and what was asked for.
    assert len({found[name] for name in drawn}) == len(drawn)
    assert read_pixels(tmp_path / "sampled" / sorted(drawn)[0]).shape == (3, 16, 16)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_samples_of_a_run_that_was_stopped_are_the_same(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, stop_at: int
) -> None:
    base, chosen = str(bases["small-sd"]), settings(samples={**SAMPLES, "prompts": ["a ring"], "seeds": [1]})
    train(chosen, base, dataset, tmp_path / "straight", tmp_path / "fresh")
    done: list[int] = []
    with pytest.raises(InterruptedRun):
        train(
            chosen,
            base,
            dataset,
            tmp_path / "resumed",
            tmp_path / "work",
            progress=lambda number, total, values: done.append(number),
            stop=lambda: bool(done) and done[-1] >= stop_at,
        )
    assert not (tmp_path / "resumed").exists()
    train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")


@pytest.mark.parametrize(
    "running",
    [
        {"gradient_checkpointing": True},
        {"channels_last": True},
        pytest.param({"compile": "regional"}, marks=COMPILED),
        pytest.param({"compile": "regional", "gradient_checkpointing": True}, marks=COMPILED),
    ],
)
def test_how_it_is_computed_does_not_change_what_is_learnt(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, running: dict[str, Any]
) -> None:
    # With dropout, whose masks must be the same when activations are computed again.
    usual = {"steps": 2, "dropout": 0.3 if running == {"gradient_checkpointing": True} else 0.0, "targets": "all"}
    plain, other = settings(**usual), settings(**usual, running=running)
    train(plain, str(bases["small-sd"]), dataset, tmp_path / "plain", tmp_path / "work")
    try:
        train(other, str(bases["small-sd"]), dataset, tmp_path / "other", tmp_path / "work")
    except SettingsError as error:
        if "torch.compile does not work" not in error.problem:
            raise
        pytest.skip(error.problem)
    mine, theirs = factors_of(tmp_path / "plain"), factors_of(tmp_path / "other")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(bases: dict[str, Path]) -> None:
    from lora_engine.bases.base import load_base
    from lora_engine.training.machine import prepare_network

    def kept(running: Running) -> int:
        base = load_base(str(bases["small-sd"]), device="cpu")
        prepare_network(base, running)
        sizes: list[int] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            sizes.append(value.nbytes)
            return value

        noisy = torch.zeros(2, 4, 8, 8).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            base.predict(noisy, torch.tensor([1, 2]), base.encode_text(["a", "b"]))
        return sum(sizes)

    assert kept(Running(gradient_checkpointing=True)) < 0.5 * kept(Running())


def test_an_operation_without_a_deterministic_form_is_refused_by_name_and_only_where_that_is_asked_for(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def begin(base: BaseModel, chosen: TrainSettings) -> Adapter:
        seen.append(torch.are_deterministic_algorithms_enabled())
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # torch has no deterministic form of it
        return begin_adapter(base, chosen)

    monkeypatch.setattr("lora_engine.training.job.begin_adapter", begin)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    base = str(bases["small-sd"])
    train(settings(), base, dataset, tmp_path / "plain", tmp_path / "work")
    with pytest.raises(
        SettingsError, match=r"put_ does not have a deterministic implementation.*running.deterministic"
    ):
        train(settings(running={"deterministic": True}), base, dataset, tmp_path / "out", tmp_path / "work")
    assert seen == [False, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not (tmp_path / "out").exists()


def test_half_precision_bases_train(bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make) -> None:
    train(settings(), str(bases["small-sd"]), dataset, tmp_path / "fp32", tmp_path / "work")
    train(settings(precision="fp16"), str(bases["small-sd"]), dataset, tmp_path / "fp16", tmp_path / "work")
    mine, theirs = factors_of(tmp_path / "fp32"), factors_of(tmp_path / "fp16")
    assert {value.dtype for value in theirs.values()} == {torch.float32}
    ups = [name for name in mine if name.endswith("up")]
    # Adam's steps have the size of the rate; that most go the same way shows that small gradients are not lost.
    alike = [float((mine[name].sign() == theirs[name].sign()).float().mean()) for name in ups]
    assert sum(alike) / len(alike) > 0.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_or_kernel_that_is_not_there_is_refused_before_the_work(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    assert choose_device(Running()) is None
    assert choose_device(Running(device="cpu")) == "cpu"
    with pytest.raises(SettingsError, match="'cuda'"):
        choose_device(Running(device="cuda"))
    chosen = settings(running={"attention": "xformers"})
    with pytest.raises(SettingsError, match="xformers"):
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
