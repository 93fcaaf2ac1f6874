"""Lists the paths that this process creates, changes or deletes, with an audit hook."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES: Mapping[str, Sequence[tuple[int, int | None]]] = {
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.symlink": ((1, 2),),
    "os.link": ((1, 3),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),),
}
"""Event -> positions of its paths, each with that of the folder's descriptor."""


class Listener:
    """Lists the paths that this process creates, changes or deletes while it listens; cannot be removed."""

    def __init__(self) -> None:
        self.paths: list[Path] | None = None
        sys.addaudithook(self._listen)

    @contextmanager
    def listen(self) -> Iterator[list[Path]]:
        self.paths = paths = []
        try:
            yield paths
        finally:
            self.paths = None

    def _listen(self, event: str, values: tuple[Any, ...]) -> None:
        if self.paths is None:
            return
        if event == "open" and isinstance(values[2], int) and values[2] & _WRITING and not isinstance(values[0], int):
            self.paths.append(Path(os.fsdecode(values[0])).resolve())
        elif event == "sqlite3.connect" and "mode=ro" not in str(values[0]) and str(values[0]) != ":memory:":
            self.paths.append(Path(str(values[0]).removeprefix("file://").partition("?")[0]).resolve())
        for path, folder in _CHANGES.get(event, ()):
            if not isinstance(values[path], int):
                descriptor = None if folder is None else values[folder]
                start = Path() if descriptor in (None, -1) else Path(f"/proc/self/fd/{descriptor}")
                # A rename or a deletion does not follow a link, but the folders above it do.
                whole = start / os.fsdecode(values[path])
                self.paths.append(whole.parent.resolve() / whole.name)


@cache
def shared_listener() -> Listener:
    """Returns the listener of this process, because audit hooks cannot be removed."""
    return Listener()
