"""Executes a notebook in an empty folder and writes it with its outputs: `python -m tools.run_notebook IN OUT`."""

from __future__ import annotations

import sys
import tempfile

import nbformat
from nbclient import NotebookClient


def main(source: str, target: str) -> None:
    """Raises the error of the first cell that fails."""
    notebook = nbformat.read(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
