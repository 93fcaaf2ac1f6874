"""Identifies the current user, whom the event log records as `actor`, and the version of this program."""

from __future__ import annotations

import getpass
import os
import socket
from importlib.metadata import PackageNotFoundError, version


def current_user() -> str:
    """Returns LORALINE_ACTOR, or `user@host` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return os.environ.get("LORALINE_ACTOR") or f"{user}@{socket.gethostname()}"


def program_version() -> str:
    """Returns the version of this program; `unknown` if it is not installed."""
    try:
        return version("loraline")
    except PackageNotFoundError:
        return "unknown"
