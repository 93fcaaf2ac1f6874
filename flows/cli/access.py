"""Defines the verbs on users: actor show, actor sign, and endorse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import Expect, Json, Reason, Ref
from flows.cli.verbs import Access, add_verb, open_home

actor_app = typer.Typer(help="Show the current user, and sign a value that establishes one.", no_args_is_help=True)


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(actor_app, Access.READ, show_actor, name="show")
    add_verb(actor_app, Access.WRITE, sign_actor, name="sign")
    app.add_typer(actor_app, name="actor")
    add_verb(app, Access.WRITE, endorse)


def show_actor(as_json: Json = False) -> None:
    """Show who you are to this home, how that was established, and your roles."""
    from flows.cli.output import print_facts, print_json
    from tasks.operations.access import describe_actor

    report = describe_actor(open_home())
    if as_json:
        actor = {"name": str(report.actor), **report.actor.record()}
        print_json(actor | {"accepted": report.accepted, "roles": list(report.roles), "has_roles": report.has_roles})
        return
    roles = ", ".join(report.roles) or ("none" if report.has_roles else "policy.yaml has no roles: all is allowed")
    print_facts(
        [
            ("user", str(report.actor)),
            ("established by", report.actor.established),
            *report.actor.facts.items(),
            ("accepted", "yes" if report.accepted else "no (identity.accept in policy.yaml)"),
            ("roles", roles if report.accepted else ""),
        ]
    )


def sign_actor(
    name: Annotated[str, typer.Argument(metavar="USER", help="User to establish, such as ci-nightly.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private key from `loraline keys new`.")],
    expires: Annotated[str, typer.Option(metavar="TIME", help="Validity, such as 30m, 8h, 7d; at most 366d.")] = "8h",
) -> None:
    """Print a value for LORALINE_SIGNED_ACTOR that establishes a user in this home. Keep it secret."""
    from flows.cli.records import read_passphrase
    from tasks.operations.access import sign_for_actor
    from tasks.operations.maintenance import parse_time

    print(sign_for_actor(open_home(), name, key, read_passphrase(key), parse_time(expires)))


def endorse(
    ref: Ref,
    alias: Annotated[str, typer.Option("--for", metavar="ALIAS", help="Alias that the version may have.")],
    reason: Reason,
    expect: Expect = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take your endorsement back.")] = False,
    as_json: Json = False,
) -> None:
    """Endorse a version for an alias: an approval that the alias's policy may need. Moves no alias."""
    from flows.cli.governance import open_versions, print_event
    from registry.refs import split_ref
    from registry.versions.endorsement import endorse as endorse_version

    name, version = split_ref(ref)
    event = endorse_version(open_versions(), name, version, alias, reason=reason, expect=expect, withdraw=withdraw)
    outcome = "endorsement withdrawn" if withdraw else "endorsed"
    print_event(event, as_json, f"{event.name}@{event.after}: {outcome} for {alias} by {event.actor}")
