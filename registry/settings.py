"""Where the parts of a home are kept that need not lie in its folder: `loraline.yaml` there, or the environment."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

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
    path = home / NAME
    try:
        written = yaml.safe_load(path.read_bytes()) or {}
        settings = Settings.model_validate(written)
    except FileNotFoundError:
        settings = Settings()
    except (yaml.YAMLError, ValidationError) as error:
        raise HomeError(
            f"the settings cannot be read ({error})",
            where=str(path),
            allowed=", ".join(Settings.model_fields),
            remedy="mend or remove the file",
        ) from error
    named = {field: os.environ[name] for field, name in VARIABLES.items() if os.environ.get(name)}
    return settings.model_copy(update=named)
