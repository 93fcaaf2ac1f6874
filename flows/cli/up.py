"""Defines the verb `up`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from flows.supervision import Addresses

_MAX_PORT = 65535
_MAX_WORKERS = 64
_MAX_GRACE = 86400


def add_verbs(app: typer.Typer) -> None:
    """Adds the verb."""
    add_verb(app, Access.WRITE, up)


def up(
    port: Annotated[
        int, typer.Option(min=0, max=_MAX_PORT, help="Port of Prefect's API and page; 0 takes a free one.")
    ] = 4200,
    mlflow_port: Annotated[
        int, typer.Option(min=0, max=_MAX_PORT, help="Port of MLflow's page; 0 takes a free one.")
    ] = 5000,
    workers: Annotated[
        int, typer.Option(min=0, max=_MAX_WORKERS, help="Number of workers; each executes one run at a time.")
    ] = 1,
    pool: Annotated[
        str, typer.Option(help="Work pool of the workers; created as a process pool if missing.")
    ] = "local",
    grace: Annotated[
        int, typer.Option(min=0, max=_MAX_GRACE, help="Seconds in which runs may finish when the command stops.")
    ] = 30,
    mlflow: Annotated[bool, typer.Option(help="Start MLflow.")] = True,
    deploy: Annotated[bool, typer.Option(help="Deploy prefect.yaml of the working folder.")] = True,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="API of a Prefect server elsewhere, for which to start workers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a Prefect server, MLflow and workers on this machine, and run them until Ctrl-C or SIGTERM."""
    import signal
    import threading

    from flows.supervision import UpSettings
    from flows.up import run_services

    settings = UpSettings(server, port, mlflow_port if mlflow else None, workers, deploy, pool, grace)
    stopping = threading.Event()
    home = open_home()

    def stop(*_: object) -> None:
        if not stopping.is_set():
            report(f"Stopping: runs have {grace} s to finish.")
        stopping.set()

    def report(line: str) -> None:
        typer.echo(line, err=True)

    def announce(addresses: Addresses) -> None:
        _print(addresses, as_json=as_json)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run_services(settings, home, stopping, announce=announce, report=report)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print(addresses: Addresses, *, as_json: bool) -> None:
    import json
    import sys
    from dataclasses import asdict

    from flows.cli.output import print_facts

    if as_json:
        print(json.dumps(asdict(addresses)))  # one line: a script reads it while the command runs
    else:
        print_facts(
            [
                ("Prefect", addresses.prefect),
                ("MLflow", addresses.mlflow),
                ("workers", ", ".join(addresses.workers)),
                ("logs", addresses.logs),
                ("for other shells", f"export PREFECT_API_URL={addresses.api}"),
                ("stop", "Ctrl-C"),
            ]
        )
    sys.stdout.flush()
