"""The verbs of the line: init, train, plan, run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.output import Json, home_path

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult
    from flows.plan import PlannedStep
    from flows.spec import PipelineSpec
    from registry.home import Home

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The pipeline file, YAML or JSON.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one value of the file.")]
Forced = Annotated[list[str] | None, typer.Option("--force", metavar="STEP", help="Run a step even if it is cached.")]

Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        min=1,
        metavar="N",
        help="How many trainings may use one device at the same time.  [default: 1 on a GPU; on a CPU by its cores]",
    ),
]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    for verb in (init, train, plan, run):
        app.command()(verb)


def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")]) -> None:
    """Make a folder with a commented pipeline file, ready for your pictures."""
    from flows.template import write_template

    path = write_template(folder)
    print(f"Wrote {path}. Put pictures into {folder / 'images'}, then: loraline run {path}")


def train(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of pictures.")],
    trigger: Annotated[str, typer.Option(help="The word that will call the concept, such as sks.")],
    class_word: Annotated[str, typer.Option("--class", help="What the concept is, such as star.")],
    base: Annotated[str, typer.Option(help="tiny, a hub id, or a diffusers folder.")] = "tiny",
    name: Annotated[str | None, typer.Option(help="The adapter's name; the trigger by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    output: Annotated[Path | None, typer.Option("-o", help="Where to write the pipeline file.")] = None,
) -> None:
    """Write a pipeline file for a folder of pictures, and run it."""
    from flows.template import write_pipeline

    path = write_pipeline(images, trigger, class_word, base=base, name=name, steps=steps, output=output)
    print(f"Wrote {path}: edit it and `loraline run {path}` to change anything.")
    run(path)


def plan(spec: SpecPath, changes: Overrides = None, force: Forced = None, as_json: Json = False) -> None:
    """Say what a run would do, and why; run nothing."""
    from flows.cli.output import print_json, print_table
    from flows.plan import plan_pipeline
    from flows.spec import load_spec
    from registry.home import Home

    loaded = load_spec(spec, changes or ())
    planned = plan_pipeline(loaded, Home.open(home_path()), force=_known(force, loaded))
    if as_json:
        print_json([_planned(step) for step in planned.steps])
        return
    rows = [
        (step.name, step.job.kind.name, *(("cached", "") if step.cached else ("run", step.reason)))
        for step in planned.steps
    ]
    print_table(("step", "uses", "would", "because"), rows)


def run(
    spec: SpecPath,
    changes: Overrides = None,
    force: Forced = None,
    concurrency: Concurrency = None,
    as_json: Json = False,
) -> None:
    """Run a pipeline: only what has to run, everything recorded."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_json
    from flows.cli.stopping import stoppable
    from flows.pipeline import run_pipeline
    from flows.prefect import configure_prefect
    from flows.spec import load_spec
    from registry.home import Home

    loaded = load_spec(spec, changes or ())
    if concurrency is not None:
        loaded = replace(loaded, concurrency=concurrency)
    home = Home.open(home_path())
    configure_prefect(home)
    with stoppable(), show_run(list(loaded.steps), Console(stderr=as_json)):
        result = run_pipeline(loaded, home, force=_known(force, loaded))
    if as_json:
        outcomes = {name: {"ref": end.ref, "cached": end.cached} for name, end in result.outcomes.items()}
        versions = {name: registered.to_json() for name, registered in result.versions.items()}
        print_json({"changed": result.changed, "outcomes": outcomes, "versions": versions})
    else:
        _summarise(loaded, home, result)
    if result.refusals:
        raise typer.Exit(1)


def _planned(step: PlannedStep) -> dict[str, Any]:
    ref = step.outcome.ref if step.outcome else None
    return {"name": step.name, "uses": step.job.kind.name, "cached": step.cached, "reason": step.reason, "ref": ref}


def _known(force: list[str] | None, spec: PipelineSpec) -> frozenset[str]:
    from tasks.errors import SpecError

    unknown = set(force or ()) - set(spec.steps)
    if unknown:
        raise SpecError(f"--force {sorted(unknown)[0]!r} names no step", allowed=", ".join(spec.steps))
    return frozenset(force or ())


def _summarise(spec: PipelineSpec, home: Home, result: PipelineResult) -> None:
    from flows.cli.output import print_facts
    from flows.summary import summarize

    print()
    print_facts(summarize(spec, home, result))
