"""The verbs on files: inspect, validate, convert, merge, generate. The engine is imported inside each verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json

File = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter, an embedding, or a whole model.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")]
Format = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="kohya, comfyui, diffusers, peft, lycoris, onetrainer, aitoolkit, cloneofsimo, loraline; "
        "a whole model: diffusers or ldm.",
    ),
]
Base = Annotated[
    str | None, typer.Option(metavar="BASE", help="sd15, sd2, sdxl, sd3, flux, tiny, a folder, or a hub id.")
]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (inspect, validate, convert, generate):
        app.command()(verb)


def inspect(file: File, as_json: Json = False) -> None:
    """Say what a file is: format, kinds, modules, ranks, embeddings, card; or a model's architecture."""
    from flows.cli.output import print_facts, print_json
    from lora_engine.checkpoints import inspect_checkpoint, is_checkpoint
    from lora_engine.formats import inspect as inspect_adapter

    facts = inspect_checkpoint(file) if is_checkpoint(file) else inspect_adapter(file)
    if as_json:
        print_json(facts)
        return
    print_facts(
        (name, value if not isinstance(value, dict) else ", ".join(map(str, value))) for name, value in facts.items()
    )


def validate(file: File, base: Base = None, as_json: Json = False) -> None:
    """Check a file's structure, with --base names and shapes too; exit code 1 if it is not whole."""
    from flows.cli.output import print_json
    from tasks.operations.adapter_files import check_file

    facts = check_file(file, base)
    if as_json:
        print_json(facts)
    else:
        print(f"{file}: whole. {', '.join(f'{count} {what}' for what, count in facts.items())}.")


def convert(
    file: File,
    to: Format,
    output: Output,
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    approximate: Annotated[bool, typer.Option(help="Write what FORMAT cannot hold as the nearest LoRA.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Of an approximation, the largest.")] = None,
    energy: Annotated[float | None, typer.Option(help="Of an approximation: share to keep, up to 1.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a whole model: a folder that has the tokenizer.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Of a whole model: a diffusers folder with the settings of its structure.")
    ] = None,
    without_tokenizer: Annotated[bool, typer.Option(help="Write a whole model without a tokenizer.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter, or a whole model, in another format."""
    from flows.cli.output import print_json
    from lora_engine.checkpoints import is_checkpoint
    from tasks.operations.adapter_files import convert_adapter, convert_model

    if is_checkpoint(file):
        done = convert_model(
            file,
            output,
            to,
            architecture=base,
            config=config,
            tokenizer=tokenizer,
            without_tokenizer=without_tokenizer,
        )
    else:
        wanted = {"rank": rank, "energy": energy} if approximate else None
        done = convert_adapter(file, output, to, base=base, dtype=dtype, approximation=wanted)
    if as_json:
        print_json(done)
        return
    for entry in done["files"]:
        print(f"{entry['file']}  sha256 {entry['sha256']}")
    if done.get("assumed"):
        print(f"assumed: {done['assumed']}")
    if done.get("approximation"):
        modules = done["approximation"]["modules"]
        worst = min(modules, key=modules.__getitem__)
        print(
            f"approximated: {len(modules)} modules keep {done['approximation']['retained']:.4%} of the squared norm, "
            f"the least {modules[worst]:.4%} ({worst})"
        )


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='Such as "a red zorb <lora:name@production:0.7>".')],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to write pictures into.")],
    base: Annotated[str, typer.Option(help="tiny, a hub id, or a diffusers folder.")] = "tiny",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many pictures.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the first picture; the others count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 3.0,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the base's own by default.")] = None,
) -> None:
    """Draw pictures with adapters that the prompt names."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import home_path
    from tasks.operations.adapter_files import draw
    from tasks.progress import StepEvent, publish

    with show_run(["generate"], Console()):
        publish(StepEvent("generate", "started"))
        pictures = draw(
            prompt, output, home_path(), base=base, count=count, seed=seed, steps=steps, guidance=guidance, size=size
        )
        publish(StepEvent("generate", "completed"))
    for path in pictures:
        print(path)
