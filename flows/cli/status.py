"""Defines the verb `status`: shows the runs in progress, the latest results, and the aliases with their policies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json, open_home
from flows.cli.verbs import Access, add_verb

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from registry.policy.conditions import AliasState
    from tasks.operations.status import RunState, StepStatus


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verb to the command."""
    add_verb(app, Access.READ, status)


def status(
    name: Annotated[str | None, typer.Argument(help="Adapter to show. Default: all.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=0, help="Number of ended runs to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show running steps, the latest results, and aliases with their policies. Exit code 1 if a policy is not met."""
    from flows.cli.output import print_json
    from tasks.operations.status import read_aliases, read_status

    home = open_home()
    runs = read_status(home, limit, name)
    aliases, lockouts = read_aliases(home, name)
    if as_json:
        print_json({"runs": [state.to_json() for state in runs], "aliases": aliases, "lockouts": lockouts})
    else:
        if not runs:
            print("no runs")
        for state in runs:
            _print_run(state)
        _print_aliases(aliases, lockouts)
    if any(state.reasons for state in aliases):
        raise typer.Exit(1)


def _print_aliases(aliases: Sequence[AliasState], lockouts: Mapping[str, str]) -> None:
    from flows.cli.output import print_table

    rows = [
        (f"{state.name}@{state.alias}", state.version, "NOT MET" if state.reasons else "met", reason)
        for state in aliases
        for reason in state.reasons or (_overridden(state.overridden),)
    ]
    if rows:
        print_table(("alias", "version", "policy", "reason"), rows)
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
