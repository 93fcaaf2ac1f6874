"""Defines the verbs that watch a home: status and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flows.queued import QueuedRun
    from registry.policy.conditions import AliasState
    from tasks.operations.status import AdapterSummary, RunState, StepStatus


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.READ, status, metrics)


def status(
    name: Annotated[str | None, typer.Argument(help="Adapter to show. Default: all.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=0, help="Number of ended runs to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show runs, adapters, and aliases with who moved them and their policies. Exit code 1 if a policy is not met."""
    from flows.cli.output import print_json
    from flows.queued import read_queued
    from tasks.operations.status import read_aliases, read_status, summarize_adapters

    home = open_home()
    runs, adapters = read_status(home, limit, name), summarize_adapters(home, name)
    aliases, lockouts = read_aliases(home, name)
    queued = read_queued()
    if as_json:
        shown = {"runs": [state.to_json() for state in runs], "adapters": adapters, "aliases": aliases}
        print_json({**shown, "lockouts": lockouts, "queued": queued})
    else:
        if not runs:
            print("no runs")
        for state in runs:
            _print_run(state)
        _print_queued(queued)
        _print_adapters(adapters)
        _print_aliases(aliases, lockouts)
    if any(state.reasons for state in aliases):
        raise typer.Exit(1)


def metrics(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="File to write, such as loraline.prom.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print counts of versions, aliases, runs and steps in the text format of Prometheus."""
    from flows.cli.output import print_json
    from lora_engine.files import atomic_write
    from tasks.operations.metrics import read_metrics, render_metrics

    found = read_metrics(open_home())
    if as_json:
        samples = [sample for metric in found for sample in metric.samples]
        print_json([{"name": name, "labels": labels, "value": value} for name, labels, value, *_ in samples])
    elif output is None:
        typer.echo(render_metrics(found), nl=False)
    else:
        atomic_write(output, render_metrics(found).encode())


def _print_queued(queued: Sequence[QueuedRun] | None) -> None:
    from flows.cli.output import print_table

    rows = [(run.name, run.deployment, run.state, f"{run.due:%Y-%m-%d %H:%M:%S}") for run in queued or ()]
    if rows:
        print_table(("queued run", "deployment", "state", "due (UTC)"), rows)


def _print_adapters(adapters: Sequence[AdapterSummary]) -> None:
    from flows.cli.output import print_table

    rows = [
        (adapter.name, f"@{adapter.version}", f"{adapter.created_at:%Y-%m-%d %H:%M}", adapter.gates, adapter.versions)
        for adapter in adapters
    ]
    if rows:
        print_table(("adapter", "latest", "registered (UTC)", "gates", "versions"), rows)


def _print_aliases(aliases: Sequence[AliasState], lockouts: Mapping[str, str]) -> None:
    from flows.cli.output import print_table

    columns = ("alias", "version", "since (UTC)", "by", "because", "policy", "reason")
    rows = []
    for state in aliases:
        since = f"{state.since:%Y-%m-%d %H:%M}" if state.since else ""
        moved = (f"{state.name}@{state.alias}", state.version, since, state.actor)
        for reason in state.reasons or (_overridden(state.overridden),):
            rows.append((*moved, state.moved_because, "NOT MET" if state.reasons else "met", reason))
    if rows:
        print_table(columns, rows)
    for problem in lockouts.values():
        print(f"Nobody can use a policy: {problem}")


def _overridden(reasons: Sequence[str]) -> str:
    return f"against: {'; '.join(reasons)}" if reasons else ""


def _print_run(state: RunState) -> None:
    from flows.cli.output import print_facts, print_table

    run = state.run
    ended = f", ended {run.ended_at:%Y-%m-%d %H:%M:%S}" if run.ended_at else ""
    crashed = f"  process {run.pid} on {run.host} is gone" if run.status == "CRASHED" else ""
    print(f"{run.name}  {run.id[:8]}  {run.status}  started {run.started_at:%Y-%m-%d %H:%M:%S}{ended} (UTC){crashed}")
    rows = [(step.name, step.uses, step.state, _progress(step), _values(step)) for step in state.steps]
    if rows:
        print_table(("step", "uses", "state", "progress", "values"), rows)
    facts: list[tuple[str, object]] = [("warning", f"{s.name}: {text}") for s in state.steps for text in s.warnings]
    for step in state.steps:
        if step.samples and step.state == "running":
            facts.append(("samples", step.samples[max(step.samples)][0].rpartition("/")[0]))
    for version in state.versions:
        aliases = f"  {', '.join(version.aliases)}" if version.aliases else ""
        facts.append(("version", f"{version.ref}  gates: {version.gate_status}{aliases}"))
    print_facts(facts)
    print()


def _progress(step: StepStatus) -> str:
    return f"{step.done}/{step.total}" if step.total else ""


def _values(step: StepStatus) -> str:
    from flows.cli.display import format_values

    return step.text or format_values(step.values)
