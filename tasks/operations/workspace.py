"""Provides a temporary home that is independent of the user's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.home import Home
from registry.settings import VARIABLES


@contextmanager
def workspace(keep: Path | None) -> Iterator[Home]:
    """Yields an empty home, and removes it at the end unless `keep` is given.

    Args:
        keep: Folder of a home to keep; must be empty or not exist. None means a temporary folder.

    Raises:
        FileExistsError: The folder is not empty.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise FileExistsError(17, "the folder is not empty", str(keep))
    folder = Path(tempfile.mkdtemp(prefix="loraline-")) if keep is None else keep
    # These variables would direct this home to the user's store and databases.
    variables = {name: os.environ.pop(name) for name in VARIABLES.values() if name in os.environ}
    try:
        yield Home.open(folder)
    finally:
        os.environ.update(variables)
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
