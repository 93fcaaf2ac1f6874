"""Defines the verbs on weights: merge, resize, extract, fuse. Each verb imports the engine itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from flows.cli.output import Json, Output
from flows.cli.verbs import Access, add_verb, home_path

_Weighted = Annotated[
    list[str],
    typer.Argument(metavar="A[:w] ...", help="Adapter files or NAME@REF, each with its weight. Default weight: 1."),
]
_Rank = Annotated[int | None, typer.Option(min=1, help="Rank; with --energy or --error the maximum rank.")]
_Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep, up to 1.")]
Error = Annotated[float | None, typer.Option(help="Maximum relative error, below 1.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
_Rounding = Annotated[
    Literal["nearest", "stochastic"],
    typer.Option(help="Rounding of whole models to narrow dtypes; stochastic keeps small changes on average."),
]


_METHODS = (
    "Method. Adapters: {lora_engine.merging.methods:METHODS}; default: concatenate, which is exact. Whole models: "
    "weighted-sum (the default), add-difference (A B:w C gives A + w (B - C)), ties (BASE A[:w] B[:w] ...)."
)


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.READ, merge, fuse, resize)
    add_verb(app, Access.NONE, extract)


def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A[:w] B[:w] ...",
            help="Adapters or whole models, each with its weight. Default: 1 for adapters, equal shares for models.",
        ),
    ],
    output: Output,
    method: Annotated[str, typer.Option("-m", "--method", help=_METHODS)] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Option of the method, such as density=0.3.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, for kinds and methods that read its weights.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME@REF|DIGEST",
            help="Images for methods that learn the weights: a folder, or the dataset of a version or with a digest.",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="Autoencoder of the training, for methods that learn the weights: a folder or a hub id."),
    ] = None,
    rounding: _Rounding = "nearest",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge adapters into one with their combined effect, or whole models of one architecture."""
    from lora_engine.errors import SettingsError
    from tasks.operations.adapter_files import parse_settings
    from tasks.operations.merge_adapters import merge_named
    from tasks.operations.model_files import are_models, merge_models

    options = parse_settings(settings or [])
    if are_models(models):
        if vae is not None:
            raise SettingsError("a merge of models reads no autoencoder", where="--vae", remedy="leave it out")
        report = merge_models(
            models,
            output,
            method=method or "weighted-sum",
            options=options,
            base=base,
            dataset=dataset,
            seed=seed,
            rounding=rounding,
        )
        line = f"{output}: {report['tensors']} tensors merged, {report['kept']} unchanged."
        _print(report, line, as_json=as_json)
        return
    if rounding != "nearest":
        raise SettingsError("a merge of adapters takes no rounding", remedy="leave out --rounding")
    merged = merge_named(
        models,
        output,
        home_path(),
        method=method or "concatenate",
        options=options,
        base=base,
        dataset=dataset,
        seed=seed,
        vae=vae,
    )
    _print(merged.as_json(), f"{output}: {_describe(merged)}", as_json=as_json)
    _print_assumed(merged.assumed, as_json=as_json)


def resize(
    file: Annotated[str, typer.Argument(metavar="FILE|NAME@REF", help="Adapter file, or a registered adapter.")],
    output: Output,
    rank: _Rank = None,
    energy: _Energy = None,
    error: Error = None,
    others: Annotated[
        Literal["refuse", "keep", "lora"], typer.Option(help="Handling of modules that are not LoRA.")
    ] = "refuse",
    base: Annotated[str | None, typer.Option(help="Base model, if module names or kinds need it.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Resize an adapter to another rank, with the best approximation of each module."""
    from tasks.operations.adapter_files import checkout_adapter, resize_adapter
    from tasks.operations.results import recorder_of

    settings = {"rank": rank, "energy": energy, "error": error, "others": others, "seed": seed}
    recorder = recorder_of(home_path(), "resize", output)
    with checkout_adapter(file, home_path(), recorder) as path:
        report = resize_adapter(path, output, base=base, **settings)
        recorder.record(settings)
    _print(report, f"{output}: keeps {report['retained']:.4%} of the squared norm.", as_json=as_json)
    _print_assumed(report.get("assumed", ""), as_json=as_json)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Tuned model: a folder, a file or a hub id.")],
    output: Output,
    base: Annotated[str, typer.Option(help="Model that it was tuned from.")],
    rank: _Rank = None,
    energy: _Energy = None,
    error: Error = None,
    noise_aware: Annotated[bool, typer.Option(help="Drop differences that rounding explains; needs no rank.")] = False,
    targets: Annotated[list[str] | None, typer.Option(help="Target presets or patterns. Default: all layers.")] = None,
    rest: Annotated[bool, typer.Option(help="Include norms and biases.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Extract the difference of a tuned model and its base as an adapter."""
    from rich.console import Console

    from flows.cli.display import show_run
    from lora_engine.formats import Card, write_adapter
    from lora_engine.streaming import extract as extract_adapter
    from tasks.operations.adapter_files import model_path
    from tasks.operations.results import recorder_of
    from tasks.progress import StepEvent, publish

    recorder = recorder_of(home_path(), "extract", output)
    with show_run(["extract"], Console(stderr=True)):
        publish(StepEvent("extract", "started"))
        adapter, report = extract_adapter(
            model_path(tuned),
            model_path(base),
            rank=rank,
            energy=energy,
            frobenius=error,
            noise_aware=noise_aware,
            targets=targets,
            with_rest=rest,
            seed=seed,
            progress=lambda done, total, values: publish(StepEvent("extract", "progress", done, total, values)),
        )
        recipe = {"extracted": {"rank": rank, "energy": energy, "error": error, "relative_error": report.error}}
        write_adapter(output, adapter, card=Card(base=base, base_fingerprint=adapter.fingerprint, recipe=recipe))
        recorder.add_model(model_path(tuned))
        recorder.record({"rank": rank, "energy": energy, "error": error})
        publish(StepEvent("extract", "completed"))
    line = f"{output}: {len(adapter.modules)} modules, relative error {report.error:.4f}."
    if report.left_out:
        line += f" {len(report.left_out)} tensors that may differ are not included, such as {report.left_out[0]}."
    _print(asdict(report), line, as_json=as_json)


def fuse(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Base model: a folder, a single file or a hub id.")],
    adapters: _Weighted,
    output: Output,
    take_out: Annotated[bool, typer.Option(help="Remove adapters that were fused before.")] = False,
    original: Annotated[str | None, typer.Option(help="Original model to compare with (with --take-out).")] = None,
    other_base: Annotated[bool, typer.Option(help="Allow adapters of another base.")] = False,
    rounding: _Rounding = "nearest",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fuse adapters into a model's weights; all other tensors keep their bytes."""
    from lora_engine.streaming import fuse as fuse_adapters
    from lora_engine.streaming import unfuse
    from tasks.operations.adapter_files import checkout_adapters, model_path
    from tasks.operations.results import recorder_of

    recorder = recorder_of(home_path(), "fuse", output)
    with checkout_adapters(adapters, home_path(), recorder) as inputs:
        if take_out:
            before = None if original is None else model_path(original)
            report = unfuse(
                model_path(base),
                inputs,
                output,
                base=before,
                allow_other_base=other_base,
                rounding=rounding,
                seed=seed,
            )
        else:
            report = fuse_adapters(
                model_path(base), inputs, output, allow_other_base=other_base, rounding=rounding, seed=seed
            )
        recorder.add_model(model_path(base))
        recorder.record({"take_out": take_out}, is_model=True)
    line = (
        f"{output}: {report.modules} modules changed, {report.tensors} tensors; base fingerprint {report.fingerprint}."
    )
    if report.difference is not None:
        line += f" Largest difference to the original: {report.difference:.3g}."
    _print(asdict(report), line, as_json=as_json)


def _describe(report: Any) -> str:
    kinds = {entry.kind for entry in report.modules.values()}
    modules = f"{len(report.modules)} modules ({', '.join(sorted(kinds))})"
    return modules if report.retained == 1.0 else f"{modules}, keeps {report.retained:.4%} of the squared norm."


def _print_assumed(assumed: str, *, as_json: bool) -> None:
    if assumed and not as_json:  # the JSON document has it
        print(f"assumed: {assumed}")


def _print(value: dict[str, Any], line: str, *, as_json: bool) -> None:
    from flows.cli.output import print_json

    if as_json:
        print_json(value)
        return
    print(line)
    if value.get("survived") is not None:
        print(f"{value['survived']:.2%} of the change survives the rounding to the weights' dtypes.")
    if value.get("raised_scales"):
        print(f"{value['raised_scales']} scales of quantized weights were raised, because values would not fit.")
    for name, channels in value.get("common_channels", {}).items():
        print(f"{name}: the models have different input channels; used the {channels} that all have.")
    for warning in value.get("warnings", []):
        typer.echo(f"warning: {warning}", err=True)
