"""Who acts: what the log of events writes behind `actor`."""

from __future__ import annotations

import getpass
import os
import socket


def current_user() -> str:
    """Who acts, for the log: LORALINE_ACTOR, or `user@host` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return os.environ.get("LORALINE_ACTOR") or f"{user}@{socket.gethostname()}"
