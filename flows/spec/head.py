"""Defines the top-level keys of a pipeline file, and a valid pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from flows.retraining import RetrainingSettings
from flows.spec.parameters import Parameter, Scalar
from flows.spec.references import MAX_PIPELINES, PARAMETER_NAME
from tasks.spec import StepSpec
from tasks.sweep.spec import SweepSettings

INHERITED = ("base", "vae", "seed", "name")
"""Top-level keys that are the defaults of the steps' keys of the same name."""


EXPANDED = ("extends", "parameters", "matrix")
"""Top-level keys that say how the file expands to pipelines; no pipeline has them."""
_LISTS = {"type": "array", "minItems": 1, "maxItems": MAX_PIPELINES}
_CELLS = {"type": "array", "maxItems": MAX_PIPELINES, "items": {"type": "object", "minProperties": 1}}
_MATRIX = {
    "anyOf": [
        {**_CELLS, "minItems": 1},
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"include": _CELLS, "exclude": _CELLS, "file": {"anyOf": [{"type": "string"}, _LISTS]}},
            "patternProperties": {f"^(?!(?:include|exclude|file)$){PARAMETER_NAME.pattern}$": _LISTS},
            "additionalProperties": False,
        },
    ]
}
"""JSON Schema of a matrix, which `flows.spec.matrix` reads."""


class Head(BaseModel):
    """A Loraline pipeline.

    Attributes:
        extends: Pipeline file that this one changes, or a list of them; paths are relative to this file.
        parameters: Name -> default, or declaration, of the values that `${name}` refers to.
        matrix: Values for many pipelines: a mapping of lists, a list of mappings, or {file: adapters.csv}.
        name: Name of the pipeline, and default name of adapters that it registers.
        base: Default base model of the steps: tiny, a hub id with @revision, a diffusers folder or a checkpoint file.
        vae: Another autoencoder for the base in the steps that use one: a folder or a hub id.
        seed: Default seed of the steps.
        description: Text for readers.
        concurrency: Maximum trainings per device at the same time; the default depends on the device.
        sweep: A search over settings of the steps, for `loraline sweep`.
        retraining: What scheduled runs do with a new version, and what its training starts from.
        steps: The steps by name; each is validated by its own class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    extends: str | Annotated[list[str], Field(min_length=1)] | None = None
    parameters: dict[str, Scalar | list[Scalar] | Parameter] = {}
    matrix: Annotated[Any, WithJsonSchema(_MATRIX)] = None
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    base: str = "tiny"
    vae: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    description: str = ""
    concurrency: int | None = Field(None, ge=1, le=1024)
    sweep: SweepSettings | None = None
    retraining: RetrainingSettings = RetrainingSettings()
    steps: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class PipelineSpec:
    """A valid pipeline.

    Args:
        name: Its name; the default name of adapters that `register` registers.
        base: Default base model of the steps.
        seed: Default seed of the steps.
        steps: The steps by name, each after its upstream steps.
        folder: The folder that relative paths in the file start from.
        source: Data of the pipeline: the file with overlays, overrides and references applied; recorded in lineage.
            Secrets are references.
        concurrency: Maximum trainings per device at the same time; None means the default of the device.
        sweep: The search over settings that the file declares; None without one.
        cell: The values of the matrix that it has; None if the file has no matrix.
        retraining: The settings of scheduled retraining.
    """

    name: str
    base: str
    seed: int
    steps: Mapping[str, StepSpec]
    folder: Path
    source: Mapping[str, Any]
    concurrency: int | None = None
    sweep: SweepSettings | None = None
    cell: Mapping[str, Any] | None = None
    retraining: RetrainingSettings = field(default_factory=RetrainingSettings)
