"""Tests the verbs on files with a small base of real blocks, adapters of several kinds, and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli import app
from lora_engine.adapters import Adapter, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import AdapterError, BaseModelError, EngineError, SettingsError
from lora_engine.formats import read_adapter, write_adapter
from lora_engine.merging.methods import METHODS
from lora_engine.merging.methods.learned import Learned
from lora_engine.merging.spec import MergeOptions
from lora_engine.streaming import CHECKPOINT_METHODS
from tasks.errors import SpecError
from tests.support.untrained import write_untrained_base

COMPONENT = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    base = load_base(str(write_untrained_base(folder / "base", "small-sd")))
    for seed, kind in enumerate(("lora", "lokr", "dora")):
        generator = torch.Generator().manual_seed(seed)
        fresh = create_adapter(base, ["attention", "text"], kind, 2, generator=generator)
        moved = {name: delta.with_factors(_moved(delta.factors(), generator)) for name, delta in fresh.modules.items()}
        write_adapter(folder / f"{kind}.safetensors", Adapter(moved, fresh.base, fresh.fingerprint))
    return folder


def _moved(factors: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in factors.items()}


def say(*arguments: object) -> str:
    result = run(*arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def say_json(*arguments: object) -> Any:
    return json.loads(say(*arguments, "--json"))


def test_inspect_describes_a_file(files: Path) -> None:
    adapter = say_json("inspect", files / "lokr.safetensors")
    assert (adapter["format"], adapter["family"], list(adapter["kinds"])) == ("loraline", "sd", ["lokr"])
    assert "lokr" in say("inspect", files / "lokr.safetensors")
    model = say_json("inspect", files / "base")
    assert model["layout"] == "diffusers"


def test_inspect_shows_the_health_of_weights_without_a_base(files: Path, tmp_path: Path) -> None:
    health = say_json("inspect", files / "lora.safetensors", "--health")["health"]
    assert all(1.0 < module["effective_rank"] <= 2.0 and module["notes"] == [] for module in health.values())
    assert "0 of " in say("inspect", files / "lora.safetensors", "--health")
    adapter, _ = read_adapter(files / "lora.safetensors")
    name, delta = next(iter(adapter.modules.items()))
    factors = {key: value * 0.0 if value.dim() > 1 else value for key, value in delta.factors().items()}
    planted = {**adapter.modules, name: delta.with_factors(factors)}
    write_adapter(tmp_path / "dead.safetensors", Adapter(planted, adapter.base, adapter.fingerprint))
    text = say("inspect", tmp_path / "dead.safetensors", "--health")
    assert "changes nothing" in text
    assert f"1 of {len(planted)} modules have notes" in text
    assert "needs the base" in say("inspect", files / "dora.safetensors", "--health")
    assert "health" not in say_json("inspect", files / "lora.safetensors")


def test_validate_counts_and_compares_with_a_base(files: Path) -> None:
    counted = say_json("validate", files / "lora.safetensors", "--base", files / "base")
    assert counted == {"modules": say_json("inspect", files / "lora.safetensors")["kinds"]["lora"]}
    assert "valid" in say("validate", files / "lora.safetensors")
    with pytest.raises(AdapterError, match="the base"):
        say("validate", files / "lora.safetensors", "--base", "sdxl")
    with pytest.raises(BaseModelError, match="flux"):
        say("validate", files / "lora.safetensors", "--base", "nothing")


def test_convert_reports_its_assumptions(tmp_path: Path) -> None:
    path = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lone = {f"{path}.lora_A.weight": torch.ones(2, 320), f"{path}.lora_B.weight": torch.ones(320, 2)}
    save_file(lone, tmp_path / "lone.safetensors")
    arguments = ("convert", tmp_path / "lone.safetensors", "--to", "kohya", "-o", tmp_path / "out.safetensors")
    assert "scale 1" in say_json(*arguments)["assumed"]
    assert "assumed: scale 1" in say(*arguments)
    assert load_file(tmp_path / "out.safetensors").keys() == {
        f"lora_unet_{path.removeprefix('base_model.model.').replace('.', '_')}.{factor}"
        for factor in ("alpha", "lora_down.weight", "lora_up.weight")
    }


def test_convert_writes_another_format_and_reports_losses(files: Path, tmp_path: Path) -> None:
    done = say_json("convert", files / "lora.safetensors", "--to", "kohya", "-o", tmp_path / "k.safetensors")
    assert [Path(entry["file"]).name for entry in done["files"]] == ["k.safetensors"]
    assert read_adapter(tmp_path / "k.safetensors")[0] == read_adapter(files / "lora.safetensors")[0]
    arguments = ("convert", files / "lokr.safetensors", "--to", "diffusers", "-o", tmp_path / "d")
    with pytest.raises(AdapterError, match="cannot hold"):
        say(*arguments)
    approximation = say_json(*arguments, "--approximate", "--rank", 2, "--base", files / "base")["approximation"]
    assert 0 < approximation["retained"] < 1
    assert approximation["modules"].keys() == read_adapter(tmp_path / "d")[0].modules.keys() != set()
    assert "approximated" in say(*arguments, "--approximate", "--rank", 2, "--base", files / "base")
    with pytest.raises(SettingsError, match="kohya"):
        say("convert", files / "lora.safetensors", "--to", "kohia", "-o", tmp_path / "x")


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("concatenate", "svd", "learned")])
def test_every_method_merges_adapters_of_different_kinds(files: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out.safetensors"
    report = say_json("merge", files / "lora.safetensors:0.5", files / "lokr.safetensors", "-m", method, "-o", out)
    assert set() < set(report["modules"]) <= set(read_adapter(files / "lora.safetensors")[0].modules)
    assert read_adapter(out)[1].recipe["method"] == method


def test_every_option_of_learned_weights_changes_them(files: Path, tmp_path: Path) -> None:
    name = f"pictures/{'0' * 16}.png"
    write_png(tmp_path / name, torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    about = {"width": 16, "height": 16, "caption": "a star", "source": "one.png", "split": "train"}
    Manifest(pictures=(ImageEntry(sha256="0" * 64, file=name, **about),)).save(tmp_path)
    options = {"per": "block", "steps": 3, "learning_rate": 0.5, "timesteps": 2, "pull": 100.0}
    assert options.keys() == Learned.model_fields.keys() - MergeOptions.model_fields.keys() - {"method"}

    def learn(changed: dict[str, object], *more: object) -> str:
        settings = {"steps": 2, "timesteps": 1, **changed}
        pairs = [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]
        inputs = (files / "lora.safetensors", files / "lokr.safetensors", "--base", files / "base")
        say("merge", *inputs, "-m", "learned", "--dataset", tmp_path, *pairs, *more, "-o", tmp_path / "o.safetensors")
        return json.dumps(read_adapter(tmp_path / "o.safetensors")[1].recipe["learned_weights"])

    results = [learn({}), learn({}, "--seed", 5), *(learn({key: value}) for key, value in options.items())]
    assert len(set(results)) == len(results)
    assert "text_encoder" in results[2]


def test_merge_takes_settings_and_names_every_method(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ("merge", files / "lora.safetensors", files / "lora.safetensors", "-o", out)
    assert "modules (lora)" in say(*arguments)
    say(*arguments, "-m", "dare", "--set", "density=0.3", "--set", "rank=2", "--seed", 4)
    recipe = read_adapter(out)[1].recipe
    assert recipe["options"] == {"density": 0.3, "rank": 2}
    assert recipe["seed"] == 4
    with pytest.raises(EngineError, match="density"):
        say(*arguments, "-m", "dare", "--set", "density=3")
    with pytest.raises(SpecError, match="NAME=VALUE"):
        say(*arguments, "--set", "density")
    with pytest.raises(SpecError, match="FILE:WEIGHT"):
        say("merge", "a:b", "-o", out)
    help_text = "".join(run("merge", "--help").stdout.split())  # line breaks split names at hyphens
    assert all(name in help_text for name in (*METHODS, *CHECKPOINT_METHODS))


def test_kinds_that_need_the_base_are_refused_without_it(files: Path, tmp_path: Path) -> None:
    arguments = ("merge", files / "dora.safetensors", files / "lora.safetensors", "-m", "linear", "-o", tmp_path / "o")
    with pytest.raises(AdapterError, match="base"):
        say(*arguments)
    assert say_json(*arguments, "--base", files / "base")["modules"]


def test_resize_reports_the_kept_norm(files: Path, tmp_path: Path) -> None:
    report = say_json("resize", files / "lora.safetensors", "--rank", 1, "-o", tmp_path / "r.safetensors")
    assert {entry["rank"] for entry in report["modules"].values()} == {1}
    adapter, card = read_adapter(tmp_path / "r.safetensors")
    assert {delta.rank for delta in adapter.modules.values()} == {1}
    assert card.recipe["resized"]["retained_energy"] == pytest.approx(report["retained"], abs=1e-6)
    with pytest.raises(AdapterError, match="lokr"):
        say("resize", files / "lokr.safetensors", "--rank", 1, "-o", tmp_path / "x.safetensors")
    shown = say("resize", files / "lokr.safetensors", "--rank", 1, "--others", "lora", "-o", tmp_path / "x.safetensors")
    assert "of the squared norm" in shown


def test_fuse_take_out_and_extract_round_trip(files: Path, tmp_path: Path) -> None:
    adapters = (f"{files / 'lora.safetensors'}:0.7", files / "lokr.safetensors")
    fused = say_json("fuse", files / "base", *adapters, "-o", tmp_path / "fused")
    assert fused["fingerprint"] == "same"
    before, after = load_file(files / "base" / COMPONENT), load_file(tmp_path / "fused" / COMPONENT)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    back = say_json(
        "fuse", tmp_path / "fused", *adapters, "-o", tmp_path / "back", "--take-out", "--original", files / "base"
    )
    assert back["difference"] < 1e-6
    say("extract", tmp_path / "fused", "--base", files / "base", "--energy", 1.0, "-o", tmp_path / "found.safetensors")
    extracted = read_adapter(tmp_path / "found.safetensors")[0]
    in_unet = {name: delta for name, delta in extracted.modules.items() if name.startswith("unet.")}
    assert in_unet
    for name, delta in in_unet.items():
        weight = before[f"{name.removeprefix('unet.')}.weight"]
        change = after[f"{name.removeprefix('unet.')}.weight"] - weight
        torch.testing.assert_close(delta.delta_weight(weight), change, rtol=1e-4, atol=1e-6)


def test_whole_models_are_converted_and_merged(files: Path, tmp_path: Path) -> None:
    write_untrained_base(tmp_path / "a", "sd15", seed=1)
    say_json("convert", tmp_path / "a", "--to", "ldm", "-o", tmp_path / "a.safetensors", "--base", "sd15")
    assert say_json("inspect", tmp_path / "a.safetensors")["architecture"] == "sd15"
    assert "tensors" in say("validate", tmp_path / "a.safetensors")
    done = say_json(
        "merge", tmp_path / "a.safetensors:0.25", tmp_path / "a.safetensors:0.75", "-o", tmp_path / "m.safetensors"
    )
    first, merged = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "m.safetensors")
    assert done["tensors"] + done["kept"] == len(first) > 0
    assert merged.keys() == first.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(merged[name], tensor)
    arguments = ("convert", tmp_path / "a.safetensors", "--to", "diffusers", "--config", tmp_path / "a")
    again = say_json(*arguments, "--tokenizer", tmp_path / "a", "-o", tmp_path / "again")
    assert any(entry["file"].endswith(COMPONENT) for entry in again["files"])
    assert load_file(tmp_path / "again" / COMPONENT).keys() == load_file(tmp_path / "a" / COMPONENT).keys()
    assert (tmp_path / "again" / "tokenizer").is_dir()
    say(*arguments, "--without-tokenizer", "-o", tmp_path / "bare")
    assert {path.name for path in (tmp_path / "again").iterdir()} - {
        path.name for path in (tmp_path / "bare").iterdir()
    } == {"tokenizer"}
    save_file(first | {"control_model.x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=r"unknown: control_model\.x.*--drop-unknown"):
        say(*arguments, "--without-tokenizer", "-o", tmp_path / "more")
    say(*arguments, "--without-tokenizer", "--drop-unknown", "-o", tmp_path / "more")
    assert load_file(tmp_path / "more" / COMPONENT).keys() == load_file(tmp_path / "a" / COMPONENT).keys()


def test_an_embedding_is_inspected_and_validated(tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "zorb.safetensors")
    (token,) = say_json("inspect", tmp_path / "zorb.safetensors")["embeddings"]
    assert (token["token"], token["vectors"]) == ("zorb", 2)
    assert say_json("validate", tmp_path / "zorb.safetensors") == {"embeddings": 1}
