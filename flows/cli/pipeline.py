"""Defines the verbs of pipelines: init, train, schema, plan, run, adopt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.completion import complete_steps
from flows.cli.matrix import Overrides, Parameters, Selected, SpecPath, for_each, load_selected
from flows.cli.output import Json
from flows.cli.plan_output import cost_to_json, planned_to_json, print_costs, print_costs_of_pipelines, print_plan
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.result import PipelineResult
    from flows.spec import PipelineSpec
    from registry.home import Home

Forced = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STEP", help="Step to run even if it is cached.", autocompletion=complete_steps),
]
Only = Annotated[list[str] | None, typer.Option("--only", metavar="STEP", help="Step to run, without any other.")]
From = Annotated[list[str] | None, typer.Option("--from", metavar="STEP", help="Step to run, with everything after.")]
To = Annotated[list[str] | None, typer.Option("--to", metavar="STEP", help="Step to run, with everything it needs.")]

_BASE = "Base model: tiny, a hub id, a diffusers folder or a checkpoint file. Its family has the training defaults."

RunnerName = Annotated[
    str | None,
    typer.Option(
        "--runner",
        metavar="NAME",
        help="Task runner: {flows.runners:runners}.  [default: that of the home, else threads]",
    ),
]

Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        min=1,
        metavar="N",
        help="Maximum trainings per device at the same time.  [default: 1 on a GPU; on a CPU by its cores]",
    ),
]


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.NONE, init, schema)
    add_verb(app, Access.READ, plan)
    add_verb(app, Access.WRITE, train, run, adopt)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
    base: Annotated[str | None, typer.Option(help=f"{_BASE}  [default: tiny, or that of --from]")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Settings of another trainer: sd-scripts (TOML, JSON or script), ai-toolkit (YAML, JSON), OneTrainer "
            "(JSON), diffusers (script).",
        ),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Dataset file of sd-scripts, with --from.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of images, with --from.  [default: that of the file]")
    ] = None,
) -> None:
    """Create a folder with a commented pipeline file and a folder for your images."""
    if source is not None:
        _init_from(folder, source, dataset, base, images)
        return
    from flows.template import write_template
    from tasks.errors import SpecError

    for option, value in (("--dataset", dataset), ("--images", images)):
        if value is not None:
            raise SpecError(f"{option} is {str(value)!r}", where=option, remedy="give the settings file with --from")
    path = write_template(folder, base or "tiny")
    print(f"Wrote {path}. Put images into {folder / 'images'}, then: loraline run {path}")


def _init_from(folder: Path, source: Path, dataset: Path | None, base: str | None, images: Path | None) -> None:
    from flows.cli.output import print_table
    from flows.coming_from.write import convert_settings

    converted = convert_settings(folder, source, dataset=dataset, base=base, images=images)
    if converted.dropped:
        print(f"Not carried over from {converted.trainer}:")
        print_table(("option", "value", "reason"), [(name, str(value), why) for name, value, why in converted.dropped])
    folders = ", ".join(map(str, converted.images))
    print(f"Wrote {converted.path}. Images: {folders}. Next: loraline plan {converted.path}")


def train(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images.")],
    trigger: Annotated[
        str | None, typer.Option(help="Trigger word of the concept, such as sks. Default with --auto: sks.")
    ] = None,
    class_word: Annotated[
        str | None, typer.Option("--class", help="Class of the concept, such as star. Default with --auto: thing.")
    ] = None,
    base: Annotated[str, typer.Option(help=_BASE)] = "tiny",
    name: Annotated[str | None, typer.Option(help="Adapter name. Default: the trigger.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N", help="Number of training steps, or '10 epochs'. Default: 300.")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Let the training choose rank, learning rate, steps and layers.")
    ] = False,
    init: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Adapter to start from: NAME@REF or a file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", help="Pipeline file to write. Default: NAME.yaml beside IMAGES.")
    ] = None,
) -> None:
    """Write a pipeline file for a folder of images, and run it."""
    from flows.template import read_steps, words_of, write_pipeline

    trigger, class_word = words_of(trigger, class_word, auto=auto)
    length = read_steps(steps) if steps is not None else None
    path = write_pipeline(
        images, trigger, class_word, base=base, name=name, steps=length, init=init, output=output, auto=auto
    )
    print(f"Wrote {path}. To change anything, edit it and run: loraline run {path}")
    run(path)


def schema(
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Output file.")] = None,
) -> None:
    """Print the JSON Schema of pipeline files, for editors."""
    from flows.cli.output import print_json
    from flows.schema import pipeline_schema
    from lora_engine.files import atomic_write, canonical_json

    if output is None:
        print_json(pipeline_schema())
    else:
        atomic_write(output, canonical_json(pipeline_schema()))
        print(f"Wrote {output}. First line of a pipeline file: # yaml-language-server: $schema={output}")


def plan(
    spec: SpecPath,
    changes: Overrides = None,
    given: Parameters = None,
    selected: Selected = None,
    force: Forced = None,
    only: Only = None,
    begin: From = None,
    end: To = None,
    as_json: Json = False,
) -> None:
    """Show what a run would do and why; run nothing."""
    from flows.cost import estimate_costs
    from flows.plan import plan_pipeline, plan_pipelines
    from flows.selection import Selection
    from lora_engine.errors import EngineError
    from registry.errors import RegistryError

    pipelines = load_selected(spec, changes, given, selected)
    forced = {loaded.name: _check_force(force, loaded) for loaded in pipelines}
    selection = Selection(only or (), begin or (), end or ())
    home = open_home()
    try:
        found = plan_pipelines(pipelines, home, force=force or (), selection=selection, download=False)
        plans = {plan.name: plan for plan in found}
    except (EngineError, RegistryError, OSError):
        plans = {}  # each is planned on its own, so that those without an error are shown
    estimates = dict(zip(plans, estimate_costs(plans.values(), home), strict=True))

    def plan_one(loaded: PipelineSpec) -> tuple[Any, bool]:
        planned = plans.get(loaded.name) or plan_pipeline(
            loaded, home, force=forced[loaded.name], selection=selection, download=False
        )
        costs = estimates[loaded.name] if loaded.name in estimates else estimate_costs([planned], home)[0]
        if as_json:
            return [planned_to_json(step) | cost_to_json(step, costs) for step in planned.steps], True
        print_plan(planned)
        if loaded.cell is None:
            print_costs(costs)
        if any(step.adoption for step in planned.steps):
            print(f"`loraline adopt {spec}` takes the adoptable results over; then their steps do not run.")
        return None, True

    for_each(pipelines, plan_one, as_json=as_json)
    if pipelines[0].cell is not None and not as_json:
        print_costs_of_pipelines(estimates)


def adopt(
    spec: SpecPath,
    changes: Overrides = None,
    given: Parameters = None,
    selected: Selected = None,
    as_json: Json = False,
) -> None:
    """Take over results of earlier releases whose steps have the same revision and inputs; run nothing."""
    from flows.pipeline import adopt_results

    pipelines = load_selected(spec, changes, given, selected)
    home = open_home()

    def adopt_one(loaded: PipelineSpec) -> tuple[Any, bool]:
        adopted = adopt_results(loaded, home)
        if as_json:
            return [planned_to_json(step) for step in adopted.steps], True
        print_plan(adopted)
        return None, True

    for_each(pipelines, adopt_one, as_json=as_json)


def run(
    spec: SpecPath,
    changes: Overrides = None,
    given: Parameters = None,
    selected: Selected = None,
    force: Forced = None,
    concurrency: Concurrency = None,
    only: Only = None,
    begin: From = None,
    end: To = None,
    runner: RunnerName = None,
    as_json: Json = False,
) -> None:
    """Run a pipeline, or those of a matrix: every step that is not cached, with lineage."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.stopping import stoppable
    from flows.pipeline import run_pipeline
    from flows.prefect import configure_prefect
    from flows.runners import read_runner, runners
    from flows.selection import Selection

    pipelines = load_selected(spec, changes, given, selected, download=True)
    forced = {loaded.name: _check_force(force, loaded) for loaded in pipelines}
    home = open_home()
    settings = read_runner(home, runner)
    configure_prefect(home)
    if concurrency is not None:
        pipelines = tuple(replace(loaded, concurrency=concurrency) for loaded in pipelines)
    selection = Selection(only or (), begin or (), end or ())
    finished: Mapping[str, PipelineResult | BaseException] = {}
    if len(pipelines) > 1 and runners[settings.type].isolated:
        from flows.matrix import run_pipelines

        names = [f"{loaded.name}/{step}" for loaded in pipelines for step in loaded.steps]
        with stoppable(), show_run(names, Console(stderr=as_json, force_terminal=False)):
            finished = run_pipelines(pipelines, home, settings, force=force or (), selection=selection)

    def run_one(loaded: PipelineSpec) -> tuple[Any, bool]:
        result = finished.get(loaded.name)
        if result is None:
            with stoppable(), show_run(list(loaded.steps), Console(stderr=as_json)):
                result = run_pipeline(loaded, home, force=forced[loaded.name], selection=selection, runner=settings)
        if isinstance(result, BaseException):
            raise result
        if not as_json:
            _print_summary(loaded, home, result)
            return None, not result.refusals
        outcomes = {name: {"ref": outcome.ref, "cached": outcome.cached} for name, outcome in result.outcomes.items()}
        versions = {name: registered.to_json() for name, registered in result.versions.items()}
        shown = {"changed": result.changed, "outcomes": outcomes, "versions": versions, "skipped": result.skipped}
        return shown, not result.refusals

    for_each(pipelines, run_one, as_json=as_json)


def _check_force(force: list[str] | None, spec: PipelineSpec) -> frozenset[str]:
    from tasks.errors import SpecError

    unknown = set(force or ()) - set(spec.steps)
    if unknown:
        raise SpecError(f"unknown step {sorted(unknown)[0]!r}", where="--force", allowed=", ".join(spec.steps))
    return frozenset(force or ())


def _print_summary(spec: PipelineSpec, home: Home, result: PipelineResult) -> None:
    from flows.cli.output import print_facts
    from flows.summary import summarize

    print()
    print_facts(summarize(spec, home, result))
