"""Compares the output of `diff` with values that are computed from dense deltas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from lora_engine.adapters import Adapter, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.formats import Card, write_adapter
from lora_engine.formats.embeddings import Embedding
from lora_engine.merging.compare import compare_adapters
from registry.entities import ArtifactRef, Execution
from registry.home import Home
from registry.versions.versions import Versions
from tasks.operations.changes import compare_records
from tasks.operations.diff import diff
from tasks.operations.weights import compare_weights
from tests.flows.made import random_adapter, write_random


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    delta = adapter.modules[name]
    shape = (delta.factors()["up"].shape[0], delta.factors()["down"].shape[1])
    return delta.delta_weight(torch.zeros(shape)).double()


def test_metrics_of_factors_equal_those_of_dense_differences() -> None:
    first, second = random_adapter(0), random_adapter(1, rank=3)
    difference = compare_adapters(first, second)
    squares = [0.0, 0.0, 0.0, 0.0]
    assert difference.modules.keys() == first.modules.keys()
    for name, module in difference.modules.items():
        a, b = dense(first, name), dense(second, name)
        sizes = (a.square().sum(), b.square().sum(), (a - b).square().sum(), (a * b).sum())
        squares = [total + float(size) for total, size in zip(squares, sizes, strict=True)]
        assert module.relative == pytest.approx(math.sqrt(sizes[2] / sizes[0]), rel=1e-5)
        assert module.cosine == pytest.approx(float(sizes[3] / torch.sqrt(sizes[0] * sizes[1])), rel=1e-4, abs=1e-6)
        assert module.ranks == (2, 3)
        assert module.largest is None
    assert difference.relative == pytest.approx(math.sqrt(squares[2] / squares[0]), rel=1e-5)
    assert difference.cosine == pytest.approx(squares[3] / math.sqrt(squares[0] * squares[1]), rel=1e-4, abs=1e-6)


def test_the_same_effect_by_other_factors_is_no_difference_and_equal_factors_are_exactly_none() -> None:
    first = random_adapter(0)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(5))).Q
    turned = {
        name: delta.with_factors({"down": turn @ delta.factors()["down"], "up": delta.factors()["up"] @ turn.T})
        for name, delta in first.modules.items()
    }
    difference = compare_adapters(first, replace(first, modules=turned))
    assert difference.relative is not None
    assert difference.relative < 1e-6
    assert difference.largest is not None
    assert difference.largest > 0.01
    assert compare_adapters(first, random_adapter(0)).relative == 0.0


def test_a_small_difference_keeps_its_digits() -> None:
    first = random_adapter(0)
    name = next(iter(first.modules))
    factors = {key: factor.double() for key, factor in first.modules[name].factors().items()}
    one = {name: first.modules[name].with_factors(factors)}
    other = {name: first.modules[name].with_factors({**factors, "up": factors["up"] * (1 + 1e-12)})}
    difference = compare_adapters(Adapter(one), Adapter(other))
    assert difference.relative == pytest.approx(1e-12, rel=1e-2)


def test_modules_that_only_one_adapter_has_count_in_full_and_are_named() -> None:
    first, fewer = random_adapter(0, modules=2), random_adapter(0, modules=1)
    difference = compare_adapters(first, fewer)
    (removed,) = difference.removed
    assert difference.added == []
    assert difference.modules[removed].relative == 1.0
    assert difference.relative == pytest.approx(
        float(
            dense(first, removed).norm() / math.sqrt(sum(float(dense(first, n).square().sum()) for n in first.modules))
        )
    )


@pytest.mark.parametrize("kind", ["dora", "loha", "ia3", "full"])
def test_kinds_without_plain_factors_are_compared_by_their_effect(kind: str) -> None:
    base = load_base("tiny", device="cpu")
    target = ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"]
    first, second = (moved(create_adapter(base, target, kind, 2), seed) for seed in (1, 2))
    difference = compare_adapters(first, second, base=base)
    (module,) = difference.modules.values()
    assert module.kinds == (kind, kind)
    assert module.relative is not None
    assert module.relative > 0.0
    assert compare_adapters(first, first, base=base).relative == 0.0
    if kind in ("dora", "ia3"):
        partial = compare_adapters(first, second)
        assert (partial.untold, partial.relative) == (1, None)
        assert "base" in next(iter(partial.modules.values())).note


def moved(adapter: Adapter, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return replace(
        adapter,
        modules={
            name: delta.with_factors(
                {
                    key: value + 0.1 * torch.randn(value.shape, generator=generator)
                    for key, value in delta.factors().items()
                }
            )
            for name, delta in adapter.modules.items()
        },
    )


def test_learned_tokens_are_compared_by_their_vectors(tmp_path: Path) -> None:
    first = Embedding("sks", {"text_encoder": torch.zeros(1, 64)})
    second = Embedding("sks", {"text_encoder": torch.full((1, 64), 0.25)})
    for name, tokens in (("one", [first]), ("two", [second, Embedding("new", dict(first.vectors))])):
        write_adapter(tmp_path / f"{name}.safetensors", random_adapter(0), embeddings=tokens)
    difference = compare_weights(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert difference.words == {"new": None, "sks": 0.25}
    assert difference.relative == 0.0


def test_nested_mappings_give_one_change_per_key() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": 1}
    after = {"a": {"b": 2, "c": (1, 2)}, "d": None, "f": {"g": 1}}
    assert [(change.path, change.kind) for change in compare_records(before, after)] == [
        ("a.b", "changed"),
        ("e", "removed"),
        ("f", "added"),
    ]


def test_files_of_two_formats_differ_in_nothing_but_their_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_HOME", str(tmp_path / "no-home"))
    kohya = write_random(tmp_path / "k.safetensors", 0, card=Card(license="MIT", recipe={"rank": 2, "kind": {"a": 1}}))
    peft = write_random(tmp_path / "peft", 0, form="peft", card=Card(recipe={"rank": 3, "kind": {"a": 1}}))
    result = CliRunner().invoke(app, ["diff", str(kohya), str(peft), "--json"])
    assert result.exit_code == 0, result.output
    difference = json.loads(result.stdout)
    assert [(change["path"], change["before"], change["after"]) for change in difference["recipe"]] == [
        ("adapter.rank", 2, 3)
    ]
    assert [change["kind"] for change in difference["license"]] == ["removed"]
    assert difference["weights"]["relative"] == pytest.approx(0.0, abs=1e-6)
    assert "adapter.rank" in CliRunner().invoke(app, ["diff", str(kohya), str(peft)]).stdout


IMAGES = {"a": ("5" * 64, "a cat"), "b": ("6" * 64, "a dog"), "c": ("7" * 64, "a hen")}


def register(home: Home, images: dict[str, str], seed: int, value: float) -> ArtifactRef:
    """Registers a version like that of a training, without training; returns its dataset."""
    versions = Versions(home)
    manifest = {
        "format": 1,
        "pictures": [
            {"sha256": IMAGES[name][0], "file": f"pictures/{IMAGES[name][0][:16]}.png", "width": 8, "height": 8}
            | {"caption": caption, "source": f"{name}.png"}
            for name, caption in images.items()
        ],
    }
    dataset = versions.store.put_files("manifest", {"manifest.json": json.dumps(manifest).encode()})
    file = write_random(home.path / f"{seed}.safetensors", seed, form="loraline")
    adapter: ArtifactRef = versions.store.put_files("adapter", {"adapter.safetensors": file})
    run = versions.lineage.start_run("try", {})
    steps = {"photos": ({}, dataset), "train": ({"dataset": dataset}, adapter)}
    for step, (inputs, output) in steps.items():
        settings = {"settings": {"seed": seed}}
        environment = {"packages": {"torch": f"2.{seed}"}}
        versions.lineage.log_execution(
            Execution(
                f"{run.id}{step}", run.id, step, step, "1", step, settings, inputs, output, environment=environment
            )
        )
    card = {"recipe": {"steps": 10, "kind": {"name": "lora"}}, "base": "tiny", "license": "MIT"}
    metric = {"adapter": value, "difference": value - 1, "interval": [value - 2, value]}
    versions.register("zorb", adapter, run_id=run.id, card=card, metrics={"clip_t": metric}, parents=["base:tiny"])
    versions.close()
    return dataset


def test_versions_differ_in_images_captions_metrics_settings_and_environment(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    register(home, {"a": "a cat", "b": "a dog"}, 0, 0.5)
    register(home, {"b": "a big dog", "c": "a hen"}, 1, 0.75)
    difference = diff(home, "zorb@1", "zorb@2")
    assert {(change.path, change.kind) for change in difference.data} == {
        ("5" * 64, "removed"),
        ("6" * 64 + ".caption", "changed"),
        ("7" * 64, "added"),
    }
    after = {change.path: change.after for change in difference.metrics}
    assert after == {"clip_t.adapter": 0.75, "clip_t.difference": -0.25, "clip_t.interval": [-1.25, 0.75]}
    assert [(change.path, change.before, change.after) for change in difference.recipe] == [("step photos.seed", 0, 1)]
    assert [(change.path, change.before, change.after) for change in difference.environment] == [
        ("packages.torch", "2.0", "2.1")
    ]
    assert (difference.base, difference.gates, difference.license, difference.parents, difference.notes) == (
        [],
        [],
        [],
        [],
        [],
    )
    assert difference.weights["relative"] > 1.0
    assert diff(home, "zorb@1", "zorb@1").as_json()["identical"] is True


def test_a_missing_dataset_is_noted_and_the_rest_is_compared(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    dataset = register(home, {"a": "a cat"}, 0, 0.5)
    register(home, {"b": "a dog"}, 1, 0.5)
    (blob,) = home.store.rglob(dataset.sha256)
    blob.unlink()
    difference = diff(home, "zorb@1", "zorb@2")
    assert difference.data == []
    assert len(difference.notes) == 1
    assert difference.weights["relative"] > 0.0
