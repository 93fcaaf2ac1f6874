"""Finds the current user, whom the event log records as `actor`."""

from __future__ import annotations

import getpass
import os
import socket


def current_user() -> str:
    """Returns LORALINE_ACTOR, or `user@host` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return os.environ.get("LORALINE_ACTOR") or f"{user}@{socket.gethostname()}"
