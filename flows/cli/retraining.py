"""Defines the verbs of scheduled retraining: approve, deployments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.matrix import Parameters, Selected, SpecPath
from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, home_path, open_home


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.NONE, deployments)
    add_verb(app, Access.READ, approve)


def approve(
    ref: Annotated[str, typer.Argument(metavar="NAME@REF", help="name@version or name@alias; a name means staging.")],
    reason: Annotated[str, typer.Option(help="Reason, stored in the log.")],
    reject: Annotated[bool, typer.Option("--reject", help="Reject the version instead.")] = False,
    expect: Annotated[
        str | None,
        typer.Option(metavar="VERSION|DIGEST", help="Number or sha256 of the reviewed version; refuse any other."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Approve or reject a version for which a scheduled run waits; the run then promotes it."""
    from flows.approving import decide_waiting
    from flows.cli.output import print_json

    decision: Literal["approve", "reject"] = "reject" if reject else "approve"
    version, run, answer = decide_waiting(open_home(), ref, decision, reason, expect=expect)
    facts = {"version": version.ref, "sha256": version.sha256, "alias": run.request.alias, "run": run.name}
    if as_json:
        print_json(facts | {"decision": answer.decision, "actor": answer.actor, "flow_run": str(run.id)})
    else:
        done = "Rejected" if reject else "Approved"
        print(
            f"{done} {version.ref} for {run.request.alias}. The run {run.name} continues as soon as a worker is free."
        )


def deployments(
    spec: SpecPath,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Prefect file to write, or to update if it exists.")
    ],
    cron: Annotated[
        str | None, typer.Option(metavar="CRON", help="Schedule, such as '0 3 * * *'.  [default: no schedule]")
    ] = None,
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone of the schedule.")] = "UTC",
    work_pool: Annotated[str, typer.Option("--work-pool", metavar="POOL", help="Work pool of the runs.")] = "local",
    selected: Selected = None,
    given: Parameters = None,
    paused: Annotated[bool, typer.Option("--paused", help="Write the schedules as inactive.")] = False,
    as_json: Json = False,
) -> None:
    """Write one Prefect deployment per pipeline of a file, for `prefect deploy`."""
    from flows.cli.output import print_json
    from flows.deployments import DeploymentOptions, write_deployments
    from flows.spec import load_pipelines, parse_parameters

    values = parse_parameters(given or ())
    pipelines = load_pipelines(spec, parameters=values, names=selected or (), download=False)
    options = DeploymentOptions(cron, timezone, work_pool, str(home_path()), values, not paused)
    written = write_deployments(spec, pipelines, output, options)
    if as_json:
        print_json({"file": str(output), "deployments": written})
    else:
        print(f"Wrote {len(written)} to {output}: {', '.join(written[:8])}{' ...' if len(written) > 8 else ''}")
        print(f"Next: prefect --no-prompt deploy --all --prefect-file {output}")
