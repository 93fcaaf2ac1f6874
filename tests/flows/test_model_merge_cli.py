"""Runs every method for whole models, and every option of it, through `merge`; compares results with plain arithmetic.

The models are one component each: every layout takes the same way from the verb on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine.formats import read_adapter
from lora_engine.streaming import CHECKPOINT_METHODS
from tests.flows.commands import loraline_here, say
from tests.flows.test_merge_cli import agreed

NAME = "down_blocks.0.attentions.0.proj_in.weight"


def write_model(path: Path, seed: int, channels: int = 4) -> Path:
    draw = torch.Generator().manual_seed(seed)
    shapes = {NAME: (12, 10), "conv_in.weight": (8, channels, 3, 3), "conv_out.weight": (4, 8, 3, 3)}
    save_file({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]


def merge(models: list[Path], weights: list[str], out: Path, *more: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    arguments = [f"{model}{weight}" for model, weight in zip(models, weights, strict=True)]
    report = json.loads(say("merge", *arguments, *more, "-o", out, "--json", home=out.parent))
    return load_file(out), report


Expected = Callable[[Tensor, Tensor, Tensor], Tensor]
# Method, weights as typed, settings, expected tensor.
CASES: list[tuple[str, list[str], dict[str, float], Expected]] = [
    ("weighted-sum", ["", "", ""], {}, lambda a, b, c: (a + b + c) / 3),
    ("weighted-sum", [":0.5", "", ""], {}, lambda a, b, c: 0.5 * a + 0.25 * (b + c)),
    ("weighted-sum", [":1", ":1", ":-1"], {}, lambda a, b, c: a + b - c),
    ("add-difference", ["", "", ""], {}, lambda a, b, c: a + (b - c)),
    ("add-difference", ["", ":0.7", ""], {}, lambda a, b, c: a + 0.7 * (b - c)),
    ("ties", ["", "", ""], {"density": 1.0}, lambda a, b, c: a + agreed(b - a, c - a)),
    ("ties", ["", ":0.5", ""], {"density": 1.0}, lambda a, b, c: a + agreed(0.5 * (b - a), c - a)),
    ("ties", ["", "", ""], {"density": 1.0, "scale": 0.5}, lambda a, b, c: a + 0.5 * agreed(b - a, c - a)),
]


def test_every_method_and_option_for_models_has_a_case() -> None:
    used = {(method, option) for method, _, settings, _ in CASES for option in (None, *settings)}
    assert used == {(name, option) for name, m in CHECKPOINT_METHODS.items() for option in (None, *dict(m.options))}


@pytest.mark.parametrize(("method", "weights", "settings", "expected"), CASES)
def test_every_method_for_models_gives_the_weights_that_it_names(
    method: str, weights: list[str], settings: dict[str, float], expected: Expected, models: list[Path], tmp_path: Path
) -> None:
    pairs = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    merged, report = merge(models, weights, tmp_path / "out.safetensors", "-m", method, *pairs)
    tensors = [load_file(model) for model in models]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected(*(part[name] for part in tensors)), rtol=1e-5, atol=1e-5)
    assert (report["tensors"], report["kept"], report["warnings"]) == (3, 0, [])


def test_a_merge_of_two_models_keeps_the_size_of_the_weights(models: list[Path], tmp_path: Path) -> None:
    merged, report = merge([models[0], models[0]], ["", ""], tmp_path / "out.safetensors")
    assert report["weights"] == [0.5, 0.5]
    torch.testing.assert_close(merged, load_file(models[0]))


def test_weights_that_do_not_sum_to_1_are_reported(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    merged, report = merge(models[:2], [":1", ":1"], out)
    torch.testing.assert_close(merged[NAME], sum(load_file(model)[NAME] for model in models[:2]))
    assert "sum to 2" in report["warnings"][0]
    shown = loraline_here("merge", f"{models[0]}:0.7", f"{models[1]}:0.7", "-o", out, home=tmp_path)
    assert "sum to 1.4" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("{0}:1.5", "{1}"), "leaves nothing for the other models"),
        (("{0}", "{1}", "{2}:0.5", "-m", "add-difference"), "model 3 has the weight 0.5"),
        (("{0}", "{1}", "-m", "add-difference"), "2 models"),
        (("{0}:1", "{1}", "-m", "ties"), "model 1 has the weight 1"),
        (("{0}", "{1}", "-m", "ties", "--set", "density=much"), "density is 'much'"),
        (("{0}", "{1}", "-m", "dare"), "'dare'"),
        (("{0}", "{1}", "--base", "tiny"), "takes no base"),
        (("{0}", "{1}", "--seed", "3"), "takes no seed"),
    ],
)
def test_arguments_that_a_merge_of_models_cannot_use_are_refused(
    arguments: tuple[str, ...], problem: str, models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    completed = loraline_here("merge", *(text.format(*models) for text in arguments), "-o", out, home=tmp_path)
    assert completed.returncode == 1
    assert problem in completed.stderr
    assert not out.exists()


@pytest.mark.parametrize("widths", [(9, 4, 4), (9, 4, 9), (4, 9, 4), (9, 8, 4)])
@pytest.mark.parametrize("method", CHECKPOINT_METHODS)
def test_models_with_other_input_channels_are_merged_in_the_channels_of_the_latents(
    method: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    models = [write_model(tmp_path / f"{seed}.safetensors", seed, width) for seed, width in enumerate(widths)]
    settings = ("--set", "density=1.0") if method == "ties" else ()
    merged, report = merge(models, ["", "", ""], tmp_path / "out.safetensors", "-m", method, *settings)
    expected = next(function for name, weights, _, function in CASES if name == method and not any(weights))
    first, *others = (load_file(model)["conv_in.weight"] for model in models)
    wanted = expected(first[:, :4], *(other[:, :4] for other in others))
    torch.testing.assert_close(merged["conv_in.weight"][:, :4], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged["conv_in.weight"][:, 4:], first[:, 4:])
    assert report["common_channels"] == {"unet.conv_in.weight": 4}


@pytest.mark.parametrize("widths", [(9, 4), (4, 9)])
def test_models_with_other_input_channels_differ_by_an_adapter_for_the_base(
    widths: tuple[int, int], tmp_path: Path
) -> None:
    tuned, base = (write_model(tmp_path / f"{w}.safetensors", seed, w) for seed, w in enumerate(widths))
    out = tmp_path / "out.safetensors"
    arguments = ("extract", tuned, "--base", base, "--energy", 1.0, "-o", out)
    assert "conv_in.weight: the models have different input channels; used the 4" in say(*arguments, home=tmp_path)
    assert json.loads(say(*arguments, "--json", home=tmp_path))["common_channels"] == {"unet.conv_in.weight": 4}
    before, after = load_file(base)["conv_in.weight"], load_file(tuned)["conv_in.weight"]
    change = read_adapter(out)[0].modules["unet.conv_in"].delta_weight(before)
    torch.testing.assert_close(change[:, :4], after[:, :4] - before[:, :4], rtol=1e-4, atol=1e-4)
    assert change.shape == before.shape
    assert not change[:, 4:].abs().gt(1e-5).any()
