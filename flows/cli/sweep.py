"""Defines the verb `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.matrix import Parameters, Selected
from flows.cli.output import Json
from flows.cli.pipeline import RunnerName
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from flows.sweep import SweepResult
    from tasks.sweep.spec import TrialRecord


def add_verbs(app: typer.Typer) -> None:
    """Adds the verb."""
    add_verb(app, Access.WRITE, sweep)


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="Pipeline file with a section `sweep`.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Value to set in the file, such as sweep.trials=40."),
    ] = None,
    given: Parameters = None,
    selected: Selected = None,
    runner: RunnerName = None,
    as_json: Json = False,
) -> None:
    """Search settings of a pipeline, and register the best trial; finished trials are not repeated."""
    from rich.console import Console

    from flows.cli.display import show_run
    from flows.cli.output import print_facts, print_json
    from flows.cli.stopping import stoppable
    from flows.prefect import configure_prefect
    from flows.runners import read_runner
    from flows.spec import parse_parameters
    from flows.summary import summarize
    from flows.sweep import run_sweep
    from flows.sweep_file import load_sweep
    from tasks.sweep.search import require_optuna

    loaded = load_sweep(spec, changes or (), parameters=parse_parameters(given or ()), names=selected or ())
    require_optuna()
    home = open_home()
    settings = read_runner(home, runner)
    configure_prefect(home)
    console = Console(stderr=as_json)
    with stoppable(), show_run(list(loaded.spec.steps), console):
        result = run_sweep(
            loaded,
            home,
            lambda record: console.print(_describe(record), markup=False, highlight=False),
            runner=settings,
        )
    if as_json:
        versions = {name: registered.to_json() for name, registered in result.pipeline.versions.items()}
        trials = [record.model_dump(mode="json") for record in result.trials]
        print_json({"best": result.best.number, "trials": trials, "versions": versions, "page": result.page})
    else:
        _print_trials(result)
        print_facts([*summarize(result.spec, home, result.pipeline), ("sweep", result.page)])
    if result.pipeline.refusals:
        raise typer.Exit(1)


def _describe(record: TrialRecord) -> str:
    value = f" {record.value:.6g}" if record.value is not None else ""
    return f"trial {record.number}: {record.state}{value}{f' ({record.why})' if record.why else ''}"


def _print_trials(result: SweepResult) -> None:
    from flows.cli.output import print_table
    from tasks.operations.changes import show_value

    paths = list(result.best.values)
    rows = [
        (
            f"{record.number}{' best' if record is result.best else ''}",
            record.state,
            "" if record.value is None else f"{record.value:.6g}",
            *(show_value(record.values[path]) for path in paths),
            f"{record.size / 1024:.1f}" if record.size else "",
            f"{record.seconds:.1f}" if record.size else "",
        )
        for record in result.trials
    ]
    print_table(("trial", "state", "value", *paths, "KiB", "seconds"), rows)
