"""The verbs of the algebra: merge, resize, extract, fuse. The engine is imported inside each verb."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.cli.output import Json, home_path

Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")]
Weighted = Annotated[
    list[str], typer.Argument(metavar="A[:w] ...", help="Adapter files or NAME@REF, each with its weight.")
]
Rank = Annotated[int | None, typer.Option(min=1, help="The rank, or beside one of the others the largest.")]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep, up to 1.")]
Error = Annotated[float | None, typer.Option(help="Largest relative error, below 1.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn by chance.")]


_METHODS = (
    "Of adapters: concatenate (exact, the default), linear, interpolate, svd, slerp, model-stock, geometric-median, "
    "ties, dare, dare-ties, della, magnitude-prune, learned. Of whole models: weighted-sum (the default), "
    "add-difference, ties."
)


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (merge, resize, extract, fuse):
        app.command()(verb)


def merge(
    models: Annotated[
        list[str], typer.Argument(metavar="A[:w] B[:w] ...", help="Adapters, or whole models, each with its weight.")
    ],
    output: Output,
    method: Annotated[str, typer.Option("-m", "--method", help=_METHODS)] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Of the method, such as density=0.3.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, for kinds and methods that read its weights.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="A captioned dataset, for method learned.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Merge adapters into one that does what they do together, or whole models of one kind."""
    from lora_engine.checkpoints import is_checkpoint
    from tasks.operations.adapter_files import checkout_adapters, parse_settings

    options = parse_settings(settings or [])
    with checkout_adapters(models, home_path()) as found:
        files, weights = [file for file, _ in found], [weight for _, weight in found]
        if is_checkpoint(files[0]):
            from lora_engine.streaming import merge_checkpoints

            done = merge_checkpoints(files, weights, output, method=method or "weighted-sum", options=options)
            _say(asdict(done), f"{output}: {done.tensors} tensors merged, {done.kept} kept.", as_json=as_json)
            return
        from lora_engine.merging.files import merge_files

        report = merge_files(
            files,
            weights,
            output,
            method=method or "concatenate",
            options=options,
            seed=seed,
            base=base,
            dataset=dataset,
        )
    _say(report.as_json(), f"{output}: {_kept(report)}", as_json=as_json)


def resize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    others: Annotated[
        Literal["refuse", "keep", "lora"], typer.Option(help="What becomes of modules that are not LoRA.")
    ] = "refuse",
    base: Annotated[str | None, typer.Option(help="The base, where names or kinds need it.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write an adapter at another rank: of each module the best approximation that there is."""
    from tasks.operations.adapter_files import resize_adapter

    told = resize_adapter(file, output, base=base, rank=rank, energy=energy, error=error, others=others, seed=seed)
    _say(told, f"{output}: {told['retained']:.4%} of the squared norm is kept.", as_json=as_json)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model: a folder, a file or a hub id.")],
    output: Output,
    base: Annotated[str, typer.Option(help="The model that it was tuned from, in the same layout.")],
    rank: Rank = None,
    energy: Energy = None,
    error: Error = None,
    noise_aware: Annotated[bool, typer.Option(help="Leave out what rounding explains; enough by itself.")] = False,
    targets: Annotated[list[str] | None, typer.Option(help="Presets or patterns; all layers by default.")] = None,
    rest: Annotated[bool, typer.Option(help="Take norms and biases too.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the adapter that leads from a base to a model that was tuned from it."""
    from rich.console import Console

    from flows.cli.display import show_run
    from lora_engine.formats import Card, write_adapter
    from lora_engine.streaming import extract as extract_adapter
    from tasks.operations.adapter_files import model_path
    from tasks.progress import StepEvent, publish

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
        publish(StepEvent("extract", "completed"))
    line = f"{output}: {len(adapter.modules)} modules, relative error {report.error:.4f}."
    if report.left_out:
        line += f" {len(report.left_out)} tensors that may differ are not in it, such as {report.left_out[0]}."
    _say(asdict(report), line, as_json=as_json)


def fuse(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model: a folder, a single file, or a hub id.")],
    adapters: Weighted,
    output: Output,
    take_out: Annotated[bool, typer.Option(help="Take adapters out again that were fused in.")] = False,
    original: Annotated[str | None, typer.Option(help="With --take-out: the model before, to compare with.")] = None,
    other_base: Annotated[bool, typer.Option(help="Allow adapters that were made for another base.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model with adapters in its weights, tensor by tensor; everything else keeps its bytes."""
    from lora_engine.streaming import fuse as fuse_in
    from lora_engine.streaming import unfuse
    from tasks.operations.adapter_files import checkout_adapters, model_path

    with checkout_adapters(adapters, home_path()) as found:
        if take_out:
            before = None if original is None else model_path(original)
            report = unfuse(model_path(base), found, output, base=before, allow_other_base=other_base)
        else:
            report = fuse_in(model_path(base), found, output, allow_other_base=other_base)
    line = f"{output}: {report.modules} modules changed, {report.tensors} tensors; the base is {report.fingerprint}."
    if report.difference is not None:
        line += f" Largest difference to the original: {report.difference:.3g}."
    _say(asdict(report), line, as_json=as_json)


def _kept(report: Any) -> str:
    kinds = {entry.kind for entry in report.modules.values()}
    kept = f"{len(report.modules)} modules ({', '.join(sorted(kinds))})"
    return kept if report.retained == 1.0 else f"{kept}, {report.retained:.4%} of the squared norm is kept."


def _say(value: dict[str, Any], line: str, *, as_json: bool) -> None:
    from flows.cli.output import print_json

    if as_json:
        print_json(value)
    else:
        print(line)
