"""Completes names in a shell: pipeline files, pipelines, steps and adapters. Imports nothing before it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def complete_files(incomplete: str) -> list[str]:
    """Returns the YAML and JSON files, and the folders, whose paths begin with a text."""
    start = Path(incomplete)
    folder = start if incomplete.endswith("/") or not incomplete else start.parent
    names: list[str] = []
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            shown = str(path) + ("/" if path.is_dir() else "")
            if shown.startswith(incomplete) and not path.name.startswith("."):
                names += [shown] if path.is_dir() or path.suffix.lower() in (".yaml", ".yml", ".json") else []
    return names


def complete_steps(ctx: Any, incomplete: str) -> list[str]:
    """Returns the steps of the pipeline file on the command line that begin with a text."""
    return sorted({name for name in _steps(ctx) if name.startswith(incomplete)})


def complete_pipelines(ctx: Any, incomplete: str) -> list[str]:
    """Returns the pipelines of the file on the command line that begin with a text."""
    with suppress(Exception):  # a file that is not valid completes nothing
        from flows.spec import pipeline_names

        return [name for name in pipeline_names(_file(ctx)) if name.startswith(incomplete)]
    return []


def complete_adapters(incomplete: str) -> list[str]:
    """Returns `name@version` and `name@alias` of the registered adapters that begin with a text."""
    with suppress(Exception):  # a home that cannot be read completes nothing
        from flows.cli.verbs import home_path
        from registry.home import Home
        from registry.versions.versions import Versions

        home = Home.open_to_read(home_path())
        if home.exists:
            versions = Versions(home)
            try:
                return sorted(ref for ref in _refs(versions) if ref.startswith(incomplete))
            finally:
                versions.close()
    return []


def _file(ctx: Any) -> Path:
    """Returns the pipeline file on the command line; the parser does not know it before an option has its value."""
    return Path(ctx.params.get("spec") or ctx.args[0])


def _steps(ctx: Any) -> Iterator[str]:
    with suppress(Exception):  # a file that is not valid completes nothing
        from flows.spec import read_unexpanded

        yield from read_unexpanded(_file(ctx)).data["steps"]


def _refs(versions: Any) -> Iterator[str]:
    for version in versions.list():
        yield version.ref
        yield from (f"{version.name}@{alias}" for alias in version.aliases)
