from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.errors import AdapterError, SettingsError
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.run import evaluate
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.formats import read_adapter, write_adapter

MakeDataset = Callable[..., Path]
MEASURED = {name for name in METRICS if not METRICS[name].optional} - {
    *("identity", "faces_found", "prompt_sensitivity", "dino_i_paired")
}
"""Of one prompt, without an embedder of faces and of images only."""
INSENSITIVE = {"copies", "memorized_share"}
"""Whose difference is 0 for an adapter that changes every image and learned nothing."""


@pytest.fixture
def settings(clip_folder: Path) -> Callable[..., EvaluateSettings]:
    def make(**change: Any) -> EvaluateSettings:
        return EvaluateSettings(
            **{"steps": 2, "seeds": 2, "embedder": str(clip_folder), "image_embedder": "none", **change}
        )

    return make


@pytest.fixture
def run(
    base: Path, adapters: dict[str, Path], make_dataset: MakeDataset, tmp_path: Path, settings: Callable[..., Any]
) -> Callable[..., dict[str, Any]]:
    dataset = make_dataset()

    def evaluated(adapter: str = "strong", out: str = "out", **change: Any) -> dict[str, Any]:
        prompts = change.pop("prompts", ("a big zorb",))
        return evaluate(settings(**change), str(base), adapters[adapter], dataset, tmp_path / out, prompts=prompts)

    return evaluated


def test_an_adapter_without_effect_changes_no_metric(run: Callable[..., dict[str, Any]]) -> None:
    metrics = run("zero")["metrics"]
    assert set(metrics) == MEASURED
    for name, metric in metrics.items():
        assert metric["difference"] == 0.0, name
        assert (metric["interval"], metric["verdict"]) == (None, "distance" if METRICS[name].is_distance else "too few")


def test_a_strong_adapter_changes_every_metric(run: Callable[..., dict[str, Any]]) -> None:
    report = run("strong")
    assert set(report["metrics"]) == MEASURED
    for name, metric in report["metrics"].items():
        assert metric["difference"] == pytest.approx(metric["adapter"] - metric["base"], abs=2e-6), name
        assert (metric["difference"] == 0.0) == (name in INSENSITIVE), name
        assert all(math.isfinite(metric[key]) for key in ("base", "adapter", "difference")), name
    assert report["metrics"]["drift"]["base"] == report["metrics"]["drift_pixels"]["base"] == 0.0
    assert [report["metrics"][name]["n"] for name in ("clip_i_paired", "clip_t", "validation_loss")] == [2, 1, 2]


def test_the_same_inputs_give_the_same_bytes(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run(out="one")
    run(out="two")
    files = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*.*")}
    assert files == {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    assert json.loads(files[Path("report.json")]) == report
    names = {sample[role] for sample in report["samples"] for role in ("base", "adapter", "reference")} - {None}
    images = report["images"]
    assert images["count"] == images["kept"] == 16, "two captions and two prompts without the trigger, twice, by both"
    names |= {file for entry in images["entries"] for file in entry["files"].values()}
    assert names == {str(path) for path in files if path.suffix == ".png" and "near-" not in path.name}
    assert {sample["kind"] for sample in report["samples"]} == {"paired", "asked", "unasked"}
    assert str(tmp_path).encode() not in files[Path("report.json")]


def test_gates_decide_whether_the_report_passes(run: Callable[..., dict[str, Any]]) -> None:
    assert run("zero", gates={"drift": {"max": 0.01}})["passed"] is True
    report = run("strong", gates={"drift": {"max": 0.0, "of": "adapter"}, "clip_t": {"min": -2}})
    assert [(gate["metric"], gate["passed"]) for gate in report["gates"]] == [("clip_t", True), ("drift", False)]
    assert report["passed"] is False


def test_the_progress_ends_at_its_total(
    base: Path, adapters: dict[str, Path], make_dataset: MakeDataset, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int, values: object) -> None:
        seen.append((done, total))

    evaluate(settings(), str(base), adapters["zero"], make_dataset(), tmp_path / "out", progress=watch)
    # Two captions and two prompts without the trigger, two seeds, two losses and three of training; by both models.
    assert seen[-1] == (26, 26)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_adapter_that_makes_nan_is_refused(
    base: Path,
    adapters: dict[str, Path],
    make_dataset: MakeDataset,
    tmp_path: Path,
    settings: Callable[..., Any],
    change_adapter: Callable[..., Any],
) -> None:
    broken, _ = read_adapter(adapters["strong"] / "adapter.safetensors")
    write_adapter(tmp_path / "loud.safetensors", change_adapter(broken, lambda factor: torch.full_like(factor, 1e30)))
    with pytest.raises(AdapterError, match="of the candidate contain NaN or Inf"):
        evaluate(settings(), str(base), tmp_path / "loud.safetensors", make_dataset(), tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_size_that_the_base_cannot_generate_is_refused_first(
    base: Path, adapters: dict[str, Path], make_dataset: MakeDataset, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    with pytest.raises(SettingsError, match="cannot generate images of 15 x 15"):
        evaluate(settings(), str(base), adapters["zero"], make_dataset(size=15), tmp_path / "out")


def test_without_an_embedder_likeness_is_left_out_and_a_gate_on_it_is_refused_before_drawing(
    run: Callable[..., dict[str, Any]],
) -> None:
    report = run("zero", embedder="none")
    assert {"clip_t", "clip_i_paired", "drift"} <= report["unmeasured"].keys()
    required = {name for name in METRICS if not METRICS[name].optional}
    assert set(report["metrics"]) == required - report["unmeasured"].keys()
    assert report["embedder"] is None
    with pytest.raises(SettingsError, match="cannot be measured \\('clip_t': no embedder of images and texts\\)"):
        run("zero", out="refused", embedder="none", gates={"clip_t": {"min": 0.0}})


def test_values_carry_the_embedders_that_they_depend_on(run: Callable[..., dict[str, Any]]) -> None:
    report = run("strong")
    assert report["format"] == 2
    assert report["metrics"]["clip_t"]["embedders"] == [report["embedder"]["sha256"]]
    assert "embedders" not in report["metrics"]["validation_loss"]


def test_the_values_of_every_group_are_stored(run: Callable[..., dict[str, Any]]) -> None:
    report = run("strong")
    for name, metric in report["metrics"].items():
        values = report["units"][name]["values"]
        assert len(values["candidate"]) == len(report["units"][name]["groups"]) == metric["n"], name
        assert sum(values["candidate"]) / metric["n"] == pytest.approx(metric["adapter"], abs=2e-6), name


def test_no_more_images_are_stored_than_the_limit(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    report = run("zero", keep=3)
    assert (report["images"]["count"], report["images"]["kept"]) == (16, 3)
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 3
    assert len(report["images"]["entries"]) == 8, "prompts and seeds of all"


def test_another_version_is_drawn_with_the_same_prompts_and_seeds(
    base: Path, adapters: dict[str, Path], make_dataset: MakeDataset, tmp_path: Path, settings: Callable[..., Any]
) -> None:
    dataset, against = make_dataset(), {"production": adapters["zero"], "zorb@3": adapters["strong"]}
    report = evaluate(settings(), str(base), adapters["strong"], dataset, tmp_path / "out", against=against)
    for name, values in report["comparisons"]["zorb@3"].items():
        assert values["difference"] == 0.0, name
    for name, values in report["comparisons"]["production"].items():
        assert values["difference"] == pytest.approx(report["metrics"][name]["difference"], abs=2e-6), name
        assert values["verdict"] == "too few"


def test_a_measurement_on_training_images_and_prompts_in_another_script_are_warned_of_before_drawing(
    base: Path,
    adapters: dict[str, Path],
    make_dataset: MakeDataset,
    tmp_path: Path,
    settings: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[list[str]] = []

    def watch(*_: object) -> None:
        seen.append([record.getMessage() for record in caplog.records])

    dataset, prompts = make_dataset(heldout=0), ("a zorb", "красный zorb")
    report = evaluate(
        settings(), str(base), adapters["zero"], dataset, tmp_path / "out", prompts=prompts, progress=watch
    )
    before = "\n".join(seen[0])
    assert "metrics are measured on the training images" in before
    assert "'красный star' has letters of another script than Latin" in before
    assert report["measured_on"] == "training"
    assert report["unreadable"] == ["красный star"]
