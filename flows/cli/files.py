"""Defines the verbs on files: inspect, validate, convert, generate. Each verb imports the engine itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.output import BASE_HELP, Approximate, Dtype, Energy, Json, Output, Rank, home_path
from flows.cli.verbs import Access, add_verb

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
    add_verb(app, Access.READ, convert, generate)


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
    as_json: Json = False,
) -> None:
    """Convert an adapter or a whole model to another format."""
    from flows.cli.output import print_json
    from lora_engine.checkpoints import is_checkpoint
    from lora_engine.files import is_present
    from tasks.operations.adapter_files import checkout_adapter, convert_adapter, convert_model
    from tasks.operations.inspect_files import module_shapes_of
    from tasks.operations.results import recorder_of

    if is_present(file) and is_checkpoint(Path(file)):
        result = convert_model(
            Path(file),
            output,
            to,
            architecture=base,
            config=config,
            tokenizer=tokenizer,
            without_tokenizer=without_tokenizer,
        )
    else:
        approximation = {"rank": rank, "energy": energy} if approximate else None
        recorder = recorder_of(home_path(), "convert", output)
        with checkout_adapter(file, home_path(), recorder) as path:
            result = convert_adapter(path, output, to, base=base, dtype=dtype, approximation=approximation)
            recorder.record({"to": to, "dtype": dtype}, module_shapes_of(base))
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


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help='Prompt, such as "a red zorb <lora:name@production:0.7>".')
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder for the images.")],
    base: Annotated[str, typer.Option(help="Base model: tiny, a hub id or a diffusers folder.")] = "tiny",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of images.")] = 4,
    seed: Annotated[int, typer.Option(help="Random seed of the first image; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 3.0,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    sampler: Annotated[
        str | None, typer.Option(help="Sampler, such as euler_a or 'DPM++ 2M Karras'. Default: the base's own.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Image size in pixels per side. Default: the base's own.")] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(min=1, help="Layer of the CLIP text encoders from the last. Default: that of the training."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another autoencoder: a folder or a hub id.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "-x", metavar="AXIS", help="Grid: seed, steps, guidance, sampler or a word of the prompt, =A,B,C."
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option("-y", metavar="NAME=A,B", help="Second axis of the grid.")] = None,
    animated: Annotated[bool, typer.Option("--gif", help="Write the first row of the grid as a GIF, too.")] = False,
) -> None:
    """Generate images with the adapters that the prompt names, or a grid of images."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import home_path
    from lora_engine.errors import SettingsError
    from lora_engine.inference.grid import parse_axis
    from tasks.operations.images import DrawRequest, draw, draw_grid
    from tasks.progress import StepEvent, publish

    request = DrawRequest(
        prompt, base, negative, count, seed, steps, guidance, size, sampler=sampler, clip_skip=clip_skip, vae=vae
    )
    axes = [parse_axis(text) for text in (columns, rows) if text is not None]
    if columns is None and (rows is not None or animated):
        raise SettingsError("a grid needs its first axis", remedy="set -x")
    with show_run(["generate"], Console()):
        publish(StepEvent("generate", "started"))
        if axes:
            images = draw_grid(request, axes, output, home_path(), animated=animated)
        else:
            images = draw(request, output, home_path())
        publish(StepEvent("generate", "completed"))
    for path in images:
        print(path)
