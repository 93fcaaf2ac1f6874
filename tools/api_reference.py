"""Writes the API reference: pages of what `lora_engine` and `registry` export, from their docstrings, by pdoc.

`make docs` runs `python -m tools.api_reference FOLDER` with pdoc installed. A warning of pdoc is an error.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pdoc.doc
import pdoc.render

from lora_engine.registries import Loaded, Registry

PACKAGES = ("lora_engine", "registry")


def main() -> None:
    """Writes an index, a page per package and the search index to the folder of the first argument."""
    warnings.simplefilter("error", UserWarning)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pdoc.render.configure(docformat="google", search=True)
    pages = {name: describe(name) for name in PACKAGES}
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(pdoc.render.html_module(page, pages))
    (folder / "index.html").write_text(pdoc.render.html_index(pages))
    (folder / "search.js").write_text(pdoc.render.search_index(pages))


def describe(package: str) -> pdoc.doc.Module:
    """Returns the description of the names that a package exports.

    Raises:
        SystemExit: A name has no docstring.
    """
    module = import_module(package)
    # The names are imported on first use, and pdoc reads only those that are there.
    exported = {name: getattr(module, name) for name in module.__all__}
    for value in exported.values():
        resolve_fields(value)
    page = pdoc.doc.Module(module)
    for name, value in exported.items():
        entries = value.entries if isinstance(value, Loaded) else value
        if isinstance(entries, Registry):
            lines = [f"- `{key}`: {entry.title}" for key, entry in entries.items()]
            page.members[name].docstring = "\n".join(
                [f"The registry of {entries.noun}s, a mapping by name.", "", *lines]
            )
    missing = [name for name in exported if not page.members[name].docstring]
    if missing:
        sys.exit(f"{package}: no docstring for {', '.join(missing)}. Fix: write one where it is defined.")
    return page


def resolve_fields(value: Any) -> None:
    """Resolves the annotations of a dataclass's `__init__`: inherited fields name types that its module does not."""
    if isinstance(value, type) and is_dataclass(value):
        value.__init__.__annotations__.update(get_type_hints(value))


if __name__ == "__main__":
    main()
