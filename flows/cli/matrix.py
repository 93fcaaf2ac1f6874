"""Runs a verb over the pipelines of a file; defines the verb `resolve` and the options that select pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.completion import complete_files, complete_pipelines
from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb

if TYPE_CHECKING:
    from flows.spec import PipelineSpec

SpecPath = Annotated[
    Path, typer.Argument(metavar="SPEC", help="Pipeline file, YAML or JSON.", autocompletion=complete_files)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Value to set in the pipeline, such as adapter.rank=8."),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="NAME=VALUE", help="Value of a declared parameter, such as rank=8."),
]
Selected = Annotated[
    list[str] | None,
    typer.Option(
        "--pipeline",
        metavar="NAME",
        help="Pipeline of a matrix, with * and ?.  [default: all]",
        autocompletion=complete_pipelines,
    ),
]


def add_verbs(app: typer.Typer) -> None:
    """Adds the verb."""
    add_verb(app, Access.NONE, resolve)


def resolve(
    spec: SpecPath,
    changes: Overrides = None,
    given: Parameters = None,
    selected: Selected = None,
    as_json: Json = False,
) -> None:
    """Print the pipelines of a file as they run: with overlays, parameters and matrix; secrets as references."""
    from flows.cli.output import print_json
    from lora_engine.documents import to_yaml

    pipelines = load_selected(spec, changes, given, selected)
    if as_json:
        sources = [dict(pipeline.source) for pipeline in pipelines]
        print_json(sources if _has_matrix(pipelines) else sources[0])
        return
    print("---\n".join(to_yaml(pipeline.source) for pipeline in pipelines), end="")


def load_selected(
    path: Path,
    changes: list[str] | None,
    given: list[str] | None,
    selected: list[str] | None,
    *,
    download: bool = False,
) -> tuple[PipelineSpec, ...]:
    """Returns the pipelines of a file that the options of a verb select; `download` is that of `load_pipelines`.

    Raises:
        SpecError: The file or an option is not valid.
    """
    from flows.spec import load_pipelines, parse_parameters

    parameters, names = parse_parameters(given or ()), selected or ()
    return load_pipelines(path, changes or (), parameters=parameters, names=names, download=download)


def for_each(
    pipelines: Sequence[PipelineSpec], action: Callable[[PipelineSpec], tuple[Any, bool]], *, as_json: bool
) -> None:
    """Calls an action for each pipeline; one that fails does not stop the others.

    A file without a matrix has one pipeline, whose errors are raised and whose JSON is printed alone.

    Args:
        pipelines: The pipelines.
        action: Returns a JSON value and True for success. Without `as_json`, it prints its result itself.
        as_json: True prints JSON: of a matrix, a list with name, cell, and result or error of each pipeline.

    Raises:
        typer.Exit: A pipeline failed; the exit code is 1.
    """
    from flows.cli.output import clean, print_json

    if not _has_matrix(pipelines):
        value, succeeded = action(pipelines[0])
        if as_json:
            print_json(value)
        if not succeeded:
            raise typer.Exit(1)
        return
    entries: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, pipeline in enumerate(pipelines, start=1):
        if not as_json:
            print(f"\n{clean(pipeline.name)} ({number} of {len(pipelines)}: {clean(_describe(pipeline))})", flush=True)
        entry, succeeded = _call(action, pipeline)
        entries.append({"pipeline": pipeline.name, "cell": dict(pipeline.cell or {}), **entry})
        failed += [] if succeeded else [pipeline.name]
    if as_json:
        print_json(entries)
    if failed:
        typer.echo(f"loraline: {len(failed)} of {len(pipelines)} pipelines failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _call(action: Callable[[PipelineSpec], tuple[Any, bool]], pipeline: PipelineSpec) -> tuple[dict[str, Any], bool]:
    """Returns the JSON of a pipeline and True for success; an error that is no interruption is printed."""
    from flows.cli.output import explain
    from lora_engine.errors import EngineError, InterruptedRun
    from registry.errors import RegistryError
    from registry.store.redaction import redact

    try:
        value, succeeded = action(pipeline)
    except InterruptedRun:
        raise
    except (EngineError, RegistryError, OSError) as error:
        explain(error)
        return {"error": redact(str(error) or type(error).__name__)}, False
    return {"result": value}, succeeded


def _has_matrix(pipelines: Sequence[PipelineSpec]) -> bool:
    return pipelines[0].cell is not None


def _describe(pipeline: PipelineSpec) -> str:
    from flows.spec.matrix import describe_cell

    return describe_cell(pipeline.cell or {})
