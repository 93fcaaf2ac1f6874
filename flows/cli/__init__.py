"""Defines the command line: parses arguments, calls operations, prints results. Verbs import heavy packages themselves.

`main` turns an error into a message and an exit code: 0 if the whole job succeeded, 1 if it failed or was refused, 2 if
the command or a file cannot be used, 130 if it was interrupted.
"""

from __future__ import annotations

import sys

import typer

import flows.cli.access as access_verbs
import flows.cli.data as data_verbs
import flows.cli.delivery as delivery_verbs
import flows.cli.files as files_verbs
import flows.cli.generate as generate_verbs
import flows.cli.governance as governance_verbs
import flows.cli.history as history_verbs
import flows.cli.lineage as lineage_verbs
import flows.cli.matrix as matrix_verbs
import flows.cli.pipeline as pipeline_verbs
import flows.cli.records as record_verbs
import flows.cli.retraining as retraining_verbs
import flows.cli.revocations as revocation_verbs
import flows.cli.serve as serve_verbs
import flows.cli.status as status_verbs
import flows.cli.sweep as sweep_verbs
import flows.cli.up as up_verbs
import flows.cli.upkeep as upkeep_verbs
import flows.cli.versions as version_verbs
import flows.cli.votes as vote_verbs
import flows.cli.weights as weight_verbs

app = typer.Typer(
    name="loraline",
    help="Train, version, evaluate and release LoRA adapters of diffusion models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_MODULES = (
    pipeline_verbs,
    matrix_verbs,
    sweep_verbs,
    up_verbs,
    serve_verbs,
    retraining_verbs,
    status_verbs,
    version_verbs,
    lineage_verbs,
    data_verbs,
    files_verbs,
    weight_verbs,
    generate_verbs,
    history_verbs,
    record_verbs,
    revocation_verbs,
    governance_verbs,
    access_verbs,
    vote_verbs,
    delivery_verbs,
    upkeep_verbs,
)
for _module in _MODULES:
    _module.add_verbs(app)


def start() -> None:
    """Runs the console script `loraline`."""
    from lora_engine.lean import hide_optional

    hide_optional()
    main()


def main() -> None:
    """Runs the command in `sys.argv` and exits with its exit code."""
    from flows.cli.output import explain
    from flows.logs import configure_logs
    from lora_engine.errors import EngineError, InterruptedRun
    from registry.errors import RegistryError

    try:
        configure_logs()
        app(standalone_mode=True)
    except (InterruptedRun, KeyboardInterrupt) as error:
        explain(error)
        sys.exit(130)
    except (EngineError, RegistryError, OSError) as error:
        explain(error)
        sys.exit(2 if type(error).__name__ == "SpecError" else 1)
