"""The verbs on files: inspect, validate, convert, merge, generate. The engine is imported inside each verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Json

File = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter file (or a PEFT folder).")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")]
Format = Annotated[str, typer.Option(metavar="FORMAT", help="loraline, kohya, diffusers, peft, comfyui.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (inspect, validate, convert, merge, generate):
        app.command()(verb)


def inspect(file: File, as_json: Json = False) -> None:
    """Say what an adapter file is: format, kinds, modules, ranks, card."""
    from flows.cli.output import print_facts, print_json
    from lora_engine.formats import inspect as describe

    facts = describe(file)
    if as_json:
        print_json(facts)
        return
    print_facts(
        (name, value if not isinstance(value, dict) else ", ".join(map(str, value))) for name, value in facts.items()
    )


def validate(
    file: File, base: Annotated[str | None, typer.Option(help="Check names and shapes against this base too.")] = None
) -> None:
    """Check an adapter file's structure; exit code 1 if it is not whole."""
    from flows.engine import open_adapter

    adapter, _ = open_adapter(file, base)
    print(f"{file}: whole. {len(adapter.modules)} modules.")


def convert(
    file: File,
    to: Format,
    output: Output,
    base: Annotated[str | None, typer.Option(help="The base, where the file does not name its modules.")] = None,
) -> None:
    """Write an adapter in another format."""
    from flows.engine import open_adapter
    from lora_engine.files import sha256_file
    from lora_engine.formats import write_adapter

    adapter, card = open_adapter(file, base)
    for path in write_adapter(output, adapter, format=to, card=card):
        print(f"{path}  sha256 {sha256_file(path)}")


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="A[:w] B[:w] ...", help="Adapter files, each with its weight.")
    ],
    output: Output,
    method: Annotated[str, typer.Option("-m", "--method", help="concatenate (exact).")] = "concatenate",
) -> None:
    """Merge adapters into one that does what they do together."""
    from flows.engine import parse_weighted
    from lora_engine.merging.files import merge_files

    files, weights = zip(*(parse_weighted(text) for text in adapters), strict=True)
    merge_files(files, weights, output, method=method)
    print(output)


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
    from flows.engine import draw
    from tasks.progress import StepEvent, publish

    with show_run(["generate"], Console()):
        publish(StepEvent("generate", "started"))
        pictures = draw(
            prompt, output, home_path(), base=base, count=count, seed=seed, steps=steps, guidance=guidance, size=size
        )
        publish(StepEvent("generate", "completed"))
    for path in pictures:
        print(path)
