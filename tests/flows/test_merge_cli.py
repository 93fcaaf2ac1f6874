"""Runs every method for adapters, and every option of it, through `merge`; compares results with plain arithmetic."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.formats import read_adapter, write_adapter
from lora_engine.merging.methods import METHODS
from tests.flows.commands import loraline_here, say

MODULES = ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
WEIGHTS = (0.75, 0.5)


def agreed(a: Tensor, b: Tensor) -> Tensor:
    """Returns TIES' mean of the values that have the sign of the sum."""
    total = a + b
    agrees = [(part.sign() == total.sign()).float() for part in (a, b)]
    return (a * agrees[0] + b * agrees[1]) / (agrees[0] + agrees[1]).clamp(min=1)


def mean(a: Tensor, b: Tensor) -> Tensor:
    return (a / WEIGHTS[0] * 0.6) + (b / WEIGHTS[1] * 0.4)


def on_the_arc(a: Tensor, b: Tensor) -> Tensor:
    first, second = a / WEIGHTS[0], b / WEIGHTS[1]
    x, y = first / first.norm(), second / second.norm()
    angle = torch.acos((x * y).sum())
    direction = (torch.sin(0.6 * angle) * x + torch.sin(0.4 * angle) * y) / torch.sin(angle)
    return (0.6 * first.norm() + 0.4 * second.norm()) * direction


def towards_the_base(a: Tensor, b: Tensor) -> Tensor:
    cosine = (a * b).sum() / (a.norm() * b.norm())
    return 2 * cosine.clamp(min=0) / (1 + cosine) * mean(a, b)


# Method to its settings here and the expected delta from the weighted deltas; density 1 leaves nothing to chance.
ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "concatenate": ({}, torch.add),
    "linear": ({}, torch.add),
    "svd": ({"rank": 4}, torch.add),
    "interpolate": ({}, mean),
    "slerp": ({}, on_the_arc),
    "model-stock": ({}, towards_the_base),
    "geometric-median": ({}, lambda a, b: a / WEIGHTS[0]),  # the adapter with more than half of the weight
    "ties": ({"density": 1.0, "kind": "full"}, agreed),
    "dare": ({"density": 1.0, "kind": "full"}, torch.add),
    "dare-ties": ({"density": 1.0, "kind": "full"}, agreed),
    "della": ({"density": 1.0, "window": 0.0, "kind": "full"}, agreed),
    "magnitude-prune": ({"density": 1.0, "kind": "full"}, torch.add),
}
OPTIONS: dict[str, Any] = {
    "rank": 1,
    "energy": 0.5,
    "error": 0.5,
    "kind": "full",
    "density": 0.3,
    "window": 0.6,
    "scale": 2.0,
    "tolerance": 0.5,
    "iterations": 1,
}


CHOSEN = [name for name, entry in METHODS.items() if entry.learn is None]
PAIRS = [(name, option) for name in CHOSEN for option in METHODS[name].spec.model_fields if option != "method"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two similar adapters, whose deltas have no element of zero."""
    folder = tmp_path_factory.mktemp("adapters")
    draw = torch.Generator().manual_seed(0)
    common = {name: (torch.randn(2, 10, generator=draw), torch.randn(12, 2, generator=draw)) for name in MODULES}
    files = []
    for number in (1, 2):
        moved = {
            name: [factor + 0.4 * number * torch.randn(factor.shape, generator=draw) for factor in factors]
            for name, factors in common.items()
        }
        files.append(folder / f"{number}.safetensors")
        write_adapter(files[-1], Adapter({name: LoraDelta(*pair, 2.0) for name, pair in moved.items()}, "sd"))
    return files


def merge_of(files: list[Path], out: Path, method: str, settings: dict[str, Any], *more: object) -> dict[str, Any]:
    weighted = [f"{file}:{weight}" for file, weight in zip(files, WEIGHTS, strict=True)]
    pairs = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    return json.loads(say("merge", *weighted, "-m", method, *pairs, *more, "-o", out, "--json", home=out.parent))


def dense(file: Path) -> dict[str, Tensor]:
    return {name: delta.delta_weight(torch.zeros(12, 10)) for name, delta in read_adapter(file)[0].modules.items()}


@pytest.mark.parametrize("method", CHOSEN)
def test_every_method_for_adapters_gives_the_deltas_that_it_names(
    method: str, adapters: list[Path], tmp_path: Path
) -> None:
    settings, expected = ADAPTERS[method]
    out = tmp_path / "out.safetensors"
    report = merge_of(adapters, out, method, settings)
    first, second = map(dense, adapters)
    assert set(report["modules"]) == set(MODULES)
    for name, delta in dense(out).items():
        wanted = expected(WEIGHTS[0] * first[name], WEIGHTS[1] * second[name])
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def plain(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """Returns a function that merges with a method's defaults, once per method."""

    @functools.cache
    def merged(method: str) -> dict[str, Tensor]:
        out = tmp_path_factory.mktemp("plain") / "out.safetensors"
        merge_of(adapters, out, method, needed(method))
        return dense(out)

    return merged


def needed(method: str) -> dict[str, Any]:
    """Returns the settings without which a method does not run."""
    return {"rank": 4} if method == "svd" else {}


@pytest.mark.parametrize(("method", "option"), [pair for pair in PAIRS if pair != ("svd", "kind")])
def test_every_option_of_a_method_for_adapters_has_its_effect(
    method: str,
    option: str,
    adapters: list[Path],
    plain: Callable[[str], dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    value, out = OPTIONS[option], tmp_path / "out.safetensors"
    report = merge_of(adapters, out, method, {**needed(method), option: value})
    assert read_adapter(out)[1].recipe["options"][option] == value
    entries, before, after = report["modules"].values(), plain(method), dense(out)
    if option == "kind":
        assert {entry["kind"] for entry in entries} == {"full"}
        return
    if option == "rank":
        assert {entry["rank"] for entry in entries} == {value}
    elif option in ("energy", "error"):
        least = value if option == "energy" else 1 - value**2
        assert all(entry["retained"] >= least for entry in entries)
    elif option == "scale":
        assert all(torch.allclose(after[name], value * before[name], rtol=1e-3, atol=1e-4) for name in MODULES)
    assert not any(torch.allclose(before[name], after[name], rtol=1e-3, atol=1e-5) for name in MODULES)


def test_a_full_difference_by_svd_and_a_dataset_for_given_weights_are_refused(
    adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    for more in (("-m", "svd", "--set", "rank=2", "--set", "kind=full"), ("--dataset", tmp_path)):
        refused = loraline_here("merge", *adapters, *more, "-o", out, home=tmp_path)
        assert refused.returncode == 1
        assert "leave" in refused.stderr
    assert not out.exists()
