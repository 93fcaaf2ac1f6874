"""Defines the verbs of scheduled retraining: approve, deployments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.matrix import Parameters, Selected, SpecPath
from flows.cli.output import Json, home_path, open_home
from flows.cli.verbs import Access, add_verb

if TYPE_CHECKING:
    from flows.waiting_runs import WaitingRun
    from registry.entities import AdapterVersion


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
    from flows.approval import ApprovalAnswer
    from flows.cli.output import print_json
    from flows.waiting_runs import answer_request
    from registry.versions.promotion import require_reason

    reason = require_reason(reason, f"{ref!r} cannot be decided")
    version, run = _find_waiting(ref, expect)
    actor = _require_mover(version, run.request.alias)
    answer = ApprovalAnswer("reject" if reject else "approve", reason, actor, version.sha256)
    answer_request(run, answer)
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
    pipelines = load_pipelines(spec, parameters=values, names=selected or ())
    options = DeploymentOptions(cron, timezone, work_pool, str(home_path()), values, not paused)
    written = write_deployments(spec, pipelines, output, options)
    if as_json:
        print_json({"file": str(output), "deployments": written})
    else:
        print(f"Wrote {len(written)} to {output}: {', '.join(written[:8])}{' ...' if len(written) > 8 else ''}")
        print(f"Next: prefect --no-prompt deploy --all --prefect-file {output}")


def _find_waiting(ref: str, expect: str | None) -> tuple[AdapterVersion, WaitingRun]:
    """Returns a version and the run that waits for it.

    Raises:
        SpecError: No server is configured.
        PromotionError: No run waits for this version.
    """
    from contextlib import closing

    from flows.prefect import configure_prefect
    from flows.waiting_runs import find_waiting_runs
    from registry.errors import PromotionError
    from registry.versions.expected_version import require_expected
    from registry.versions.versions import Versions
    from tasks.operations.promote import find_version

    home = open_home()
    with closing(Versions(home)) as versions:
        version = find_version(versions, ref if "@" in ref else f"{ref}@staging")
        with versions.lineage.database.read() as session:
            require_expected(session, version, ref.partition("@")[2] or "staging", expect)
    configure_prefect(home)
    remedy = f'loraline promote {version.ref} --to production --reason "..." needs no run'
    _require_server(remedy)
    waiting = find_waiting_runs()
    for run in waiting:
        if (run.request.ref, run.request.sha256) == (version.ref, version.sha256):
            return version, run
    others = [run.request.ref for run in waiting if run.request.ref.startswith(f"{version.name}@")]
    raise PromotionError(
        f"no run waits for {version.ref}", where="approve", allowed=", ".join(others) or "none waits", remedy=remedy
    )


def _require_server(remedy: str) -> None:
    from prefect.settings import PREFECT_API_URL

    from tasks.errors import SpecError

    if not PREFECT_API_URL.value():
        raise SpecError(
            "no Prefect server is configured", where="PREFECT_API_URL", remedy=f"set PREFECT_API_URL; or: {remedy}"
        )


def _require_mover(version: AdapterVersion, alias: str) -> str:
    """Returns this process's user.

    Raises:
        Refused: The user may not move the alias; the run would refuse the answer too, later.
    """
    from contextlib import closing

    from registry.errors import Refused
    from registry.policy.actors import establish_actor
    from registry.versions.versions import Versions
    from tasks.operations.release import find_denial_of_move

    with closing(Versions(open_home())) as versions:
        user = establish_actor(versions)
        denial = find_denial_of_move(versions, version, alias, user)
    if denial:
        raise Refused(f"{alias!r} cannot be decided about", reasons=(denial,), where=alias, remedy="ask a user who may")
    return str(user)
