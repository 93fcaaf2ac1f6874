"""Reads and writes the settings of a home: `loraline.yaml` in it, or environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_engine.documents import read_document
from lora_engine.errors import did_you_mean
from lora_engine.files import atomic_write
from registry.errors import HomeError
from registry.store.redaction import redact

NAME = "loraline.yaml"
VARIABLES = {"store": "LORALINE_STORE_URL", "database": "LORALINE_DATABASE_URL", "mlflow": "LORALINE_MLFLOW_URL"}
"""Setting -> environment variable that overrides it in every home that a process opens."""


class Settings(BaseModel):
    """Locations outside the home; None keeps the part in the folder of the home. And how its runs execute.

    Attributes:
        store: fsspec URL of the folder or bucket that holds the blobs, such as `s3://bucket/loraline`.
        database: SQLAlchemy URL of the registry's own database, such as `postgresql+psycopg://host/loraline`.
        mlflow: SQLAlchemy URL of MLflow's database.
        concurrency_limit: Name of a global concurrency limit of the Prefect server, of which every step that uses a
            model holds a slot; None uses none.
        runner: The task runner of runs; not read here.
        datasets: Folders below which the studio may change captions; None means the folder of a home `.loraline`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str | None = None
    database: str | None = None
    mlflow: str | None = None
    concurrency_limit: str | None = None
    runner: dict[str, Any] | None = None
    datasets: tuple[str, ...] | None = None


def read_settings(home: Path) -> Settings:
    """Returns the settings of a home: those of its file, overridden by environment variables.

    Raises:
        HomeError: The file is not YAML, or has an unknown key or a value of another type.
    """
    overrides = {field: os.environ[name] for field, name in VARIABLES.items() if os.environ.get(name)}
    return read_file(home).model_copy(update=overrides)


def read_file(home: Path) -> Settings:
    """Returns the settings in the home's `loraline.yaml`; the defaults where there is no such file.

    Raises:
        HomeError: As `read_settings`.
    """
    path, names, remedy = home / NAME, ", ".join(Settings.model_fields), "correct or remove the file"
    where = str(path)
    try:
        document = read_document(path, HomeError, allowed=names, optional=True)
        return Settings.model_validate(document.data)
    except HomeError as error:
        # Without what the problem quotes.
        where, problem = error.where, error.problem.partition("'")[0].strip()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        key, where = ".".join(map(str, first["loc"])), document.where(first["loc"])
        problem = f"{key}: the value is not {'a mapping' if key == 'runner' else 'text'}"
        if first["type"] == "extra_forbidden":
            problem = f"unknown setting {redact(key)!r}"
            remedy = did_you_mean(key, Settings.model_fields, remedy)
    # The message has no values, and no cause, which would quote them: a value may be a password.
    raise HomeError(f"the settings cannot be read: {problem}", where=where, allowed=names, remedy=remedy)


def write_file(home: Path, settings: Settings) -> None:
    """Writes the settings to the home's `loraline.yaml`."""
    atomic_write(home / NAME, yaml.safe_dump(settings.model_dump(exclude_none=True)).encode())
