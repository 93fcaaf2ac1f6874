"""The command line: parses, calls, prints; nothing else. Heavy imports live inside the verbs.

`main` is the one place where an error becomes a message and an exit code: 0 only where the whole job succeeded, 1 for
a job that failed or was refused, 2 for a command or a file that cannot be used, 130 for one that was interrupted.
"""

from __future__ import annotations

import sys

import typer

import flows.cli.files as files_verbs
import flows.cli.governance as rights_verbs
import flows.cli.history as history_verbs
import flows.cli.lineage as lineage_verbs
import flows.cli.pipeline as line_verbs
import flows.cli.records as record_verbs
import flows.cli.upkeep as upkeep_verbs
import flows.cli.versions as version_verbs
import flows.cli.weights as algebra_verbs

app = typer.Typer(
    name="loraline",
    help="The production line for LoRA adapters of diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_MODULES = (
    line_verbs,
    version_verbs,
    lineage_verbs,
    files_verbs,
    algebra_verbs,
    history_verbs,
    record_verbs,
    rights_verbs,
    upkeep_verbs,
)
for _module in _MODULES:
    _module.add_verbs(app)


def start() -> None:
    """Runs the console script `loraline`, in a process of its own."""
    from lora_engine.lean import hide_optional

    hide_optional()
    main()


def main() -> None:
    """Runs the command in `sys.argv` and ends with its exit code."""
    from flows.cli.output import explain
    from lora_engine.errors import EngineError, InterruptedRun
    from registry.errors import RegistryError

    try:
        app(standalone_mode=True)
    except (InterruptedRun, KeyboardInterrupt) as error:
        explain(error)
        sys.exit(130)
    except (EngineError, RegistryError, OSError) as error:
        explain(error)
        sys.exit(2 if type(error).__name__ == "SpecError" else 1)
