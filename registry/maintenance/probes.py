"""Probes the machine for the doctor: the file system of a path, and the response of a database server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from registry.store.database import name_of, parse_url
from registry.store.redaction import redact

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Args:
        about: What was checked.
        level: `broken` means that something cannot work.
        found: The state.
        remedy: The fix; empty if none is needed.
    """

    about: str
    level: Level
    found: str
    remedy: str = ""


def probe_database(about: str, url: str, *, timeout: int = 3) -> Finding:
    """Checks that a database server responds within the timeout.

    Args:
        about: Name of the finding.
        url: SQLAlchemy URL.
        timeout: Timeout in seconds.
    """
    engine = create_engine(parse_url(url), connect_args={"connect_timeout": timeout})
    try:
        with engine.connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar()
    except SQLAlchemyError as error:
        message = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        message = redact(message, url)
        remedy = "start the server, or correct the URL in loraline.yaml or the environment"
        return Finding(about, "broken", f"{name_of(url)}: {message}", remedy)
    finally:
        engine.dispose()
    return Finding(about, "ok", f"{name_of(url)}, PostgreSQL {version}")


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Returns the type of the file system of a path; empty if the machine does not report it.

    Args:
        path: The file; may be missing.
        mounts: Linux's table of mounts.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    kinds = {}
    for line in lines:
        _, mount_point, kind, *_ = line.split(" ")
        kinds[mount_point.replace("\\040", " ")] = kind
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if str(folder) in kinds:
            return kinds[str(folder)]
    return ""
