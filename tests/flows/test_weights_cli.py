"""Runs `resize`, `extract`, `fuse` and `convert` through the command line with every option that their parsers have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from flows.cli import app
from lora_engine.adapters import Adapter, FullDelta, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.formats import inspect, read_bundle, write_adapter
from lora_engine.merging.methods import METHODS
from lora_engine.streaming import CHECKPOINT_METHODS
from tests.flows.commands import loraline_here, say
from tests.support.untrained import write_untrained_base

VERBS = ("resize", "extract", "fuse", "convert")
SHARED = {"output", "as_json", "to"}  # in every run of the verb


@dataclass(frozen=True)
class Run:
    """One run of a verb.

    Attributes:
        arguments: Names of files of the fixture.
        options: The option that it is about, and others that it needs; a path for the name of a file.
        has_effect: Returns True if the option has its effect, from the report and the output.
        without: Options of a run for comparison.
        is_less: Returns True if the report differs from that of the run for comparison as it must.
    """

    arguments: tuple[str, ...]
    options: Mapping[str, object]
    has_effect: Callable[[Any, Mapping[str, Any]], bool] = lambda report, file: True
    without: Mapping[str, object] = field(default_factory=dict)
    is_less: Callable[[Any, Any], bool] | None = None


def keeps_less(report: Any, other: Any) -> bool:
    return bool(report["retained"] < other["retained"])


def is_worse(report: Any, other: Any) -> bool:
    return bool(report["error"] > other["error"])


def has_rank_1(report: Any, file: Mapping[str, Any]) -> bool:
    return set(file["ranks"]) == {"1"}


RANK_2 = {"base": "base", "rank": 2}
APPROXIMATE = {"to": "diffusers", "approximate": True}
RUNS: dict[tuple[str, str], Run] = {
    ("resize", "rank"): Run(("lora",), {"rank": 1}, has_rank_1),
    ("resize", "energy"): Run(("lora",), {"energy": 0.5}, without={"rank": 2}, is_less=keeps_less),
    ("resize", "error"): Run(("lora",), {"error": 0.7}, without={"rank": 2}, is_less=keeps_less),
    ("resize", "others"): Run(("lokr",), {"others": "lora", "rank": 1}, has_rank_1),
    ("resize", "base"): Run(("dora",), {"base": "base", "others": "lora", "rank": 1}, has_rank_1),
    ("resize", "seed"): Run(("lora",), {"seed": 3, "rank": 1}, has_rank_1),
    ("extract", "base"): Run(("fused",), {"base": "base", "rank": 1}, has_rank_1),
    ("extract", "rank"): Run(("fused",), {"base": "base", "rank": 1}, without=RANK_2, is_less=is_worse),
    ("extract", "energy"): Run(("fused",), {"base": "base", "energy": 0.5}, without=RANK_2, is_less=is_worse),
    ("extract", "error"): Run(("fused",), {"base": "base", "error": 0.7}, without=RANK_2, is_less=is_worse),
    ("extract", "noise_aware"): Run(
        ("fused",), {"base": "base", "noise_aware": True}, lambda r, file: r["error"] < 0.01
    ),
    ("extract", "targets"): Run(
        ("fused",),
        {"base": "base", "targets": "*attn1.to_q", "rank": 1},
        lambda r, file: {name.rpartition(".attn1.")[2] for name in file["modules"]} == {"to_q"},
    ),
    ("extract", "rest"): Run(
        ("tuned",), {"base": "base", "rest": True, "rank": 1}, lambda r, file: "full" in file["kinds"]
    ),
    ("extract", "seed"): Run(("fused",), {"base": "base", "seed": 3, "rank": 1}, has_rank_1),
    ("fuse", "take_out"): Run(("fused", "lora"), {"take_out": True}, lambda r, file: r["difference"] is None),
    ("fuse", "original"): Run(
        ("fused", "lora"), {"take_out": True, "original": "base"}, lambda r, file: r["difference"] < 1e-6
    ),
    ("fuse", "other_base"): Run(("base", "foreign"), {"other_base": True}, lambda r, file: r["modules"] > 0),
    ("convert", "base"): Run(
        ("lora",), {"to": "cloneofsimo", "base": "base"}, lambda r, file: file["format"] == "cloneofsimo"
    ),
    ("convert", "dtype"): Run(
        ("lora",), {"to": "kohya", "dtype": "float16"}, lambda r, file: set(file["dtypes"]) == {"float16"}
    ),
    ("convert", "recommended"): Run(
        ("lora",),
        {"to": "kohya", "recommended": "0.5"},
        lambda r, file: read_bundle(Path(r["files"][0]["file"])).card.recommended == "0.5",
    ),
    ("convert", "approximate"): Run(("lokr",), APPROXIMATE, lambda r, file: set(file["kinds"]) == {"lora"}),
    ("convert", "rank"): Run(("lokr",), {**APPROXIMATE, "rank": 1}, has_rank_1),
    ("convert", "energy"): Run(
        ("lokr",),
        {**APPROXIMATE, "energy": 0.3},
        without=APPROXIMATE,
        is_less=lambda report, other: report["approximation"]["retained"] < other["approximation"]["retained"],
    ),
}
OF_MODELS = {("convert", name) for name in ("tokenizer", "config", "without_tokenizer", "drop_unknown")}
OF_MODELS |= {("fuse", name) for name in ("rounding", "seed")}
"""Options of whole models, which `test_files_cli.py` converts, and `test_quantized_models_cli.py` rounds."""


def options_of(verb: str) -> dict[str, str]:
    """Returns the options of a verb's parser, without arguments, to their flags."""
    command: Any = typer.main.get_command(app)
    return {one.name: one.opts[0] for one in command.commands[verb].params if one.param_type_name == "option"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    base = load_base(str(write_untrained_base(folder / "base", "small-sd")))
    for seed, kind in enumerate(("lora", "lokr", "dora")):
        generator = torch.Generator().manual_seed(seed)
        fresh = create_adapter(base, ["*attn1*"], kind, 2, generator=generator)
        moved = {}
        for name, delta in fresh.modules.items():
            factors = delta.factors().items()
            moved[name] = delta.with_factors(
                {n: f + 0.1 * torch.randn(f.shape, generator=generator) for n, f in factors}
            )
        write_adapter(folder / f"{kind}.safetensors", Adapter(moved, fresh.base, fresh.fingerprint))
    write_adapter(folder / "foreign.safetensors", Adapter(moved, fresh.base, "0" * 64))
    norm = base.get_module("unet.conv_norm_out")
    full = Adapter({"unet.conv_norm_out": FullDelta(torch.ones_like(norm.weight), torch.ones_like(norm.bias))}, "sd")
    write_adapter(folder / "norm.safetensors", full)
    lora = folder / "lora.safetensors"
    say("fuse", folder / "base", lora, "-o", folder / "fused", home=folder)
    say("fuse", folder / "base", lora, folder / "norm.safetensors", "-o", folder / "tuned", home=folder)
    return folder


def path_of(files: Path, name: str) -> Path:
    return files / name if (files / name).is_dir() else files / f"{name}.safetensors"


def report_of(verb: str, run: Run, options: Mapping[str, object], files: Path, output: Path) -> Any:
    flags = options_of(verb)
    arguments: list[object] = [path_of(files, name) for name in run.arguments]
    for name, value in options.items():
        arguments += [flags[name], *([] if value is True else [files / "base" if value == "base" else value])]
    return json.loads(say(verb, *arguments, "-o", output, "--json", home=files))


def test_every_option_of_the_verbs_has_a_run() -> None:
    listed = {(verb, name) for verb in VERBS for name in options_of(verb) if name not in (*SHARED, "help")}
    assert listed == RUNS.keys() | OF_MODELS


@pytest.mark.parametrize(("verb", "option"), RUNS)
def test_every_option_of_the_verbs_has_its_effect(verb: str, option: str, files: Path, tmp_path: Path) -> None:
    run, is_adapter = RUNS[verb, option], verb != "fuse"
    assert option in run.options
    output = tmp_path / ("out.safetensors" if is_adapter else "out")
    report = report_of(verb, run, run.options, files, output)
    assert run.has_effect(report, inspect(output) if is_adapter else {})
    if run.is_less is not None:
        assert run.is_less(report, report_of(verb, run, run.without, files, tmp_path / "other.safetensors"))


@pytest.mark.parametrize("verb", ["resize", "fuse", "convert"])
def test_what_an_option_allows_is_refused_without_it(verb: str, files: Path, tmp_path: Path) -> None:
    refused = {
        "resize": (("lokr",), ("--rank", 1), "others"),
        "fuse": (("base", "foreign"), (), "allow another one"),
        "convert": (("lokr",), ("--to", "diffusers"), "cannot hold"),
    }
    names, options, text = refused[verb]
    arguments = [path_of(files, name) for name in names]
    done = loraline_here(verb, *arguments, *options, "-o", tmp_path / "out", home=files)
    assert (done.returncode, text in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", sorted({*METHODS, *CHECKPOINT_METHODS}))
def test_a_merge_of_files_that_do_not_exist_names_the_file(method: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    done = loraline_here("merge", missing, missing, "-m", method, "-o", tmp_path / "out.safetensors", home=tmp_path)
    assert done.returncode == 1
    assert "the file does not exist" in done.stderr
    assert str(missing) in done.stderr
