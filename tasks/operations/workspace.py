"""A home for the time of one piece of work, that has nothing in common with the user's."""

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
    """An empty home, removed at the end unless it is to be kept.

    Args:
        keep: Where it is to stay; must not exist, or be empty.

    Raises:
        FileExistsError: There is something there.
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise FileExistsError(17, "there is something here already", str(keep))
    folder = Path(tempfile.mkdtemp(prefix="loraline-")) if keep is None else keep
    # They would send what is built here to where the user's homes keep their bytes and records.
    elsewhere = {name: os.environ.pop(name) for name in VARIABLES.values() if name in os.environ}
    try:
        yield Home.open(folder)
    finally:
        os.environ.update(elsewhere)
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
