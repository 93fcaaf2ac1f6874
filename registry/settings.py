"""Where the parts of a home are kept that need not lie in its folder: `loraline.yaml` there, or the environment."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_engine.files import atomic_write
from registry.errors import HomeError

NAME = "loraline.yaml"
VARIABLES = {"store": "LORALINE_STORE_URL", "database": "LORALINE_DATABASE_URL", "mlflow": "LORALINE_MLFLOW_URL"}
"""The variables of the environment that name a part's place, for every home that a process opens."""


class Settings(BaseModel):
    """The places that a home names; None keeps the part in the folder of the home.

    Attributes:
        store: fsspec URL of the folder or bucket that holds the blobs, such as `s3://bucket/loraline`.
        database: SQLAlchemy URL of the registry's own database, such as `postgresql+psycopg://host/loraline`.
        mlflow: SQLAlchemy URL of MLflow's database.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str | None = None
    database: str | None = None
    mlflow: str | None = None


def read_settings(home: Path) -> Settings:
    """The settings of a home: those of its file, each replaced by its variable of the environment where that is set.

    Raises:
        HomeError: The file is no YAML, or holds something else.
    """
    named = {field: os.environ[name] for field, name in VARIABLES.items() if os.environ.get(name)}
    return read_file(home).model_copy(update=named)


def read_file(home: Path) -> Settings:
    """The settings that the home's own file names.

    Raises:
        HomeError: As `read_settings`.
    """
    path = home / NAME
    try:
        return Settings.model_validate(yaml.safe_load(path.read_bytes()) or {})
    except FileNotFoundError:
        return Settings()
    except (yaml.YAMLError, ValidationError) as error:
        raise HomeError(
            f"the settings cannot be read ({error})",
            where=str(path),
            allowed=", ".join(Settings.model_fields),
            remedy="mend or remove the file",
        ) from error


def write_file(home: Path, settings: Settings) -> None:
    """Makes these the settings that the home's own file names."""
    atomic_write(home / NAME, yaml.safe_dump(settings.model_dump(exclude_none=True)).encode())
