"""Defines the verbs on files: inspect, validate, convert. Each verb imports the engine itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.output import BASE_HELP, Approximate, Dtype, Energy, Json, Output, Rank
from flows.cli.verbs import Access, add_verb, home_path

File = Annotated[Path, typer.Argument(metavar="FILE", help="Adapter, embedding or whole model.")]
TargetFormat = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="Target format: {lora_engine.catalog.formats:written_formats}; for a whole model diffusers, "
        "original (or ldm) or plain, which removes quantization.",
    ),
]
_Base = Annotated[str | None, typer.Option(metavar="BASE", help=BASE_HELP)]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.NONE, inspect, validate)
    add_verb(app, Access.READ, convert)


def inspect(
    file: File,
    norms: Annotated[bool, typer.Option("--norms", help="Include the norms of the changes (adapters).")] = False,
    health: Annotated[
        bool,
        typer.Option("--health", help="Include effective ranks, dead factors and the range of float16 (adapters)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a file's format, kinds, modules, ranks, embeddings and card, or a model's architecture."""
    from flows.cli.output import print_facts, print_json, print_table
    from lora_engine.lean import collection_paused

    with collection_paused():  # most of the time is imports
        from lora_engine.checkpoints import inspect_checkpoint, is_checkpoint
        from tasks.operations.inspect_files import inspect_adapter

        facts = inspect_checkpoint(file) if is_checkpoint(file) else inspect_adapter(file, norms=norms, health=health)
    if as_json:
        print_json(facts)
        return
    by_module, examined = facts.pop("norms", {}), facts.pop("health", {})
    print_facts(
        (name, value if not isinstance(value, dict) else ", ".join(map(str, value))) for name, value in facts.items()
    )
    if by_module:
        rows = ((name, "needs the base" if norm is None else f"{norm:.4g}") for name, norm in by_module.items())
        print_table(("module", "norm of the change"), rows)
    if examined:
        _print_health(examined)


def _print_health(modules: Mapping[str, Mapping[str, Any]]) -> None:
    from flows.cli.output import print_table

    def short(value: float | None) -> str:
        return "needs the base" if value is None else f"{value:.4g}"

    print_table(
        ("module", "rank", "effective rank", "norm", "largest value", "notes"),
        (
            (
                name,
                module["rank"],
                short(module["effective_rank"]),
                short(module["norm"]),
                short(module["largest"]),
                "; ".join(module["notes"]),
            )
            for name, module in modules.items()
        ),
    )
    noted = sum(bool(module["notes"]) for module in modules.values())
    print(f"{noted} of {len(modules)} modules have notes.")


def validate(file: File, base: _Base = None, as_json: Json = False) -> None:
    """Check a file's structure, with --base also names and shapes. Exit code 1 if it is invalid."""
    from flows.cli.output import print_json
    from lora_engine.lean import collection_paused

    with collection_paused():
        from tasks.operations.inspect_files import check_file

        facts = check_file(file, base)
    if as_json:
        print_json(facts)
        return
    assumed = facts.pop("assumed", None)
    print(f"{file}: valid. {', '.join(f'{count} {noun}' for noun, count in facts.items())}.")
    if assumed:
        print(f"assumed: {assumed}")


def convert(
    file: Annotated[
        str, typer.Argument(metavar="FILE|NAME@REF", help="Adapter or whole model, or a registered adapter.")
    ],
    to: TargetFormat,
    output: Output,
    base: _Base = None,
    dtype: Dtype = None,
    approximate: Approximate = False,
    rank: Rank = None,
    energy: Energy = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with the tokenizer (whole models).")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Diffusers folder with the model's configuration (whole models).")
    ] = None,
    without_tokenizer: Annotated[bool, typer.Option(help="Omit the tokenizer (whole models).")] = False,
    drop_unknown: Annotated[
        bool, typer.Option("--drop-unknown", help="Omit tensors that the base does not have (whole models).")
    ] = False,
    recommended: Annotated[
        str | None,
        typer.Option("--recommend", metavar="W", help="Weights for prompts that give none, such as 0.8 or 0@0,1@1."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter or a whole model to another format."""
    from flows.cli.output import print_json
    from lora_engine.checkpoints import is_checkpoint
    from lora_engine.errors import SettingsError
    from lora_engine.files import is_present
    from tasks.operations.adapter_files import checkout_adapter, convert_adapter, convert_model
    from tasks.operations.inspect_files import module_shapes_of
    from tasks.operations.results import recorder_of

    if is_present(file) and is_checkpoint(Path(file)):
        if recommended is not None:
            raise SettingsError("a whole model has no weight to recommend", remedy="leave out --recommend")
        result = convert_model(
            Path(file),
            output,
            to,
            architecture=base,
            config=config,
            tokenizer=tokenizer,
            without_tokenizer=without_tokenizer,
            drop_unknown=drop_unknown,
        )
    else:
        approximation = {"rank": rank, "energy": energy} if approximate else None
        recorder = recorder_of(home_path(), "convert", output)
        with checkout_adapter(file, home_path(), recorder) as path:
            result = convert_adapter(
                path,
                output,
                to,
                base=base,
                dtype=dtype,
                approximation=approximation,
                license_expression=recorder.license_of(file),
                recommended=recommended,
            )
            stated = {"recommended": recommended} if recommended else {}
            recorder.record({"to": to, "dtype": dtype, **stated}, module_shapes_of(base))
    if as_json:
        print_json(result)
        return
    for written in result["files"]:
        print(f"{written['file']}  sha256 {written['sha256']}")
    if result.get("assumed"):
        print(f"assumed: {result['assumed']}")
    if result.get("approximation"):
        modules = result["approximation"]["modules"]
        worst = min(modules, key=modules.__getitem__)
        print(
            f"approximated: {len(modules)} modules keep {result['approximation']['retained']:.4%} of the squared norm, "
            f"at least {modules[worst]:.4%} ({worst})"
        )
