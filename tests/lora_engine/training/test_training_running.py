"""Sample images, and settings of device and memory, which must not change the result."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import SettingsError
from lora_engine.training import samples
from lora_engine.training.device import choose_device
from lora_engine.training.init import init_adapter
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.running import Running
from tests.lora_engine.training.runs import Runs, digests, factors_of

SAMPLES = {"every": 2, "prompts": ["a sks star", "a ring"], "seeds": [3, 5], "steps": 2}

# Torch's compiler warns about its own internals.
COMPILED = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


def test_samples_are_drawn_at_intervals_and_do_not_change_the_adapter(runs: Runs) -> None:
    out = runs("sampled", steps=5, samples=SAMPLES)
    sampled, plain = digests(out), digests(runs("plain", steps=5))
    names = {f"{number:02d}-{seed}.png" for number in (0, 1) for seed in (3, 5)}
    drawn = {f"samples/step-{step:06d}/{name}" for step in (0, 2, 4) for name in names}
    assert sampled.keys() == plain.keys() | drawn | {"samples/samples.json"}
    assert all(sampled[name] == digest for name, digest in plain.items())
    assert json.loads((out / "samples/samples.json").read_bytes())["prompts"] == SAMPLES["prompts"]
    # Each sample differs by prompt, seed and step.
    assert len({sampled[name] for name in drawn}) == len(drawn)
    assert read_pixels(out / sorted(drawn)[0]).shape == (3, 16, 16)


def test_a_full_disk_costs_the_samples_and_not_the_training(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(path: Path, pixels: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(samples, "write_png", write)
    drawn: list[int] = []
    announced = {"on_samples": lambda step, files: drawn.append(step)}
    out = runs("unsampled", steps=5, samples=SAMPLES, arguments=announced)
    texts = {record.getMessage() for record in caplog.records if record.name == samples.__name__}
    assert texts == {"sample images cannot be written (No space left on device); the training continues"}
    assert drawn == []
    plain = digests(runs("plain", steps=5))
    assert digests(out) == plain | {"samples/samples.json": digests(out)["samples/samples.json"]}


def require_same_factors(runs: Runs, running: dict[str, Any], **usual: Any) -> None:
    plain = factors_of(runs("plain", **usual))
    try:
        other = factors_of(runs("other", **usual, running=running))
    except SettingsError as error:
        if "torch.compile fails" not in error.problem:
            raise
        pytest.skip(error.problem)
    assert plain.keys() == other.keys()
    assert any(value.any() for name, value in plain.items() if name.endswith("up"))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("running", "dropout"),
    [
        # With dropout, whose masks must be the same when activations are recomputed.
        ({"gradient_checkpointing": True}, 0.3),
        ({"channels_last": True}, 0.0),
        pytest.param({"compile": "regional"}, 0.0, marks=COMPILED),
        pytest.param({"compile": "regional", "gradient_checkpointing": True}, 0.0, marks=COMPILED),
    ],
)
def test_memory_and_speed_settings_do_not_change_the_result(
    runs: Runs, running: dict[str, Any], dropout: float
) -> None:
    require_same_factors(runs, running, steps=2, dropout=dropout, targets="all")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("differentiated", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_compiled_graphs_of_adapted_blocks_do_not_change_the_result(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, differentiated: bool
) -> None:
    # Graphs are captured as usual, and run by torch instead of generated code, which takes minutes.
    captured: list[Any] = []

    def capture(graph: Any, examples: Any) -> Any:
        captured.append(graph)
        return aot_eager(graph, examples) if differentiated else graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=capture))
    require_same_factors(runs, {"compile": "regional"}, steps=1)
    # One for the probe, and the others for blocks of the network.
    assert len(captured) > 1


def test_gradient_checkpointing_saves_less_for_the_backward_pass(bases: dict[str, Path]) -> None:
    from lora_engine.bases.base import load_base
    from lora_engine.training.device import prepare_network

    def saved_bytes(running: Running) -> int:
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

    assert saved_bytes(Running(gradient_checkpointing=True)) < 0.5 * saved_bytes(Running())


def test_a_nondeterministic_operation_is_refused_by_name_and_only_if_determinism_is_requested(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def init(base: BaseModel, settings: TrainSettings, *initial: Any) -> Adapter:
        seen.append(torch.are_deterministic_algorithms_enabled())
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # torch has no deterministic form of it
        return init_adapter(base, settings, *initial)

    monkeypatch.setattr("lora_engine.training.prepare.init_adapter", init)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # registers the restore
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    runs("plain")
    with pytest.raises(
        SettingsError, match=r"put_ does not have a deterministic implementation.*running.deterministic"
    ):
        runs("out", running={"deterministic": True})
    assert seen == [False, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not (tmp_path / "out").exists()


def test_half_precision_bases_train(runs: Runs) -> None:
    full, half = factors_of(runs("fp32")), factors_of(runs("fp16", precision="fp16"))
    assert {value.dtype for value in half.values()} == {torch.float32}
    ups = [name for name in full if name.endswith("up")]
    # Adam's steps have the size of the rate. Equal signs show that small gradients do not underflow.
    agreement = [float((full[name].sign() == half[name].sign()).float().mean()) for name in ups]
    assert sum(agreement) / len(agreement) > 0.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_or_kernel_is_refused_before_the_work(runs: Runs) -> None:
    assert choose_device(Running()) is None
    assert choose_device(Running(device="cpu")) == "cpu"
    with pytest.raises(SettingsError, match="'cuda'"):
        choose_device(Running(device="cuda"))
    with pytest.raises(SettingsError, match="xformers"):
        runs(running={"attention": "xformers"})
