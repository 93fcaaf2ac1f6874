"""What the doctor asks of the machine: which file system a file is on, whether a database server answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from registry.store.database import name_of

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        about: What.
        level: `broken` keeps something from working.
        found: What it is.
        remedy: What to do; empty where nothing is to be done.
    """

    about: str
    level: Level
    found: str
    remedy: str = ""


def probe_database(about: str, url: str, *, patience: int = 3) -> Finding:
    """Whether a server of databases answers within seconds.

    Args:
        about: How the finding is called.
        url: SQLAlchemy URL.
        patience: Seconds.
    """
    engine = create_engine(url, connect_args={"connect_timeout": patience})
    try:
        with engine.connect() as connection:
            version = connection.execute(text("SHOW server_version")).scalar()
    except SQLAlchemyError as error:
        first = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        remedy = "start the server, or correct the URL in loraline.yaml or the environment"
        return Finding(about, "broken", f"{name_of(url)}: {first}", remedy)
    finally:
        engine.dispose()
    return Finding(about, "ok", f"{name_of(url)}, PostgreSQL {version}")


def file_system_of(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The kind of the file system that a file is, or would be, on; empty where this machine does not tell.

    Args:
        path: The file.
        mounts: The list of what is mounted, as Linux gives it.
    """
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    kinds = {}
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        kinds[place.replace("\\040", " ")] = kind
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if str(folder) in kinds:
            return kinds[str(folder)]
    return ""
