"""Reads what an adapter was trained on and chosen by, from the `training.json` beside it. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lora_engine.data.manifest import Digest
from lora_engine.documents import read_json_object
from lora_engine.errors import DataError

MAX_STEPS = 10_000_000
_Record = TypeVar("_Record", bound=BaseModel)


class Chosen(BaseModel):
    """The choice of a checkpoint.

    Attributes:
        candidates: Steps of the checkpoints that were compared.
        step: Step of the chosen one.
        by: Name of the score.
        on: Digests of the images that they were scored on.
        score: Score of the chosen one on these images; too good, because it was chosen by it.
        leave_one_out: Mean score of each image under the checkpoint that the other images choose; None if there are
            too few images.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    candidates: tuple[Annotated[int, Field(ge=0, le=MAX_STEPS)], ...] = Field(alias="from", min_length=1)
    step: int = Field(ge=0, le=MAX_STEPS)
    by: str = Field(max_length=200)
    on: tuple[Digest, ...]
    score: FiniteFloat | None = None
    leave_one_out: FiniteFloat | None = None

    def describe(self) -> str:
        """Returns the sentence of the report: chosen among how many, and the unbiased figure."""
        figure = "" if self.leave_one_out is None else f": {self.by} {self.leave_one_out:.4g} (leave-one-out)"
        return f"chosen among {len(self.candidates)} on these images{figure}"


class TrainingRecord(BaseModel):
    """The parts of `training.json` that an evaluation reads.

    Attributes:
        trained_on: Digests of the training images.
        chosen: The choice of the checkpoint; None if the last one was kept.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    trained_on: tuple[str, ...] = ()
    chosen: Chosen | None = None


def read_training_record(adapter: Path) -> TrainingRecord:
    """Returns the record of an adapter's training, from the `training.json` beside it; an empty one without a file.

    Raises:
        DataError: The file exists and cannot be read.
    """
    path = (adapter if adapter.is_dir() else adapter.parent) / "training.json"
    return read_record(TrainingRecord, path, remedy="train again")


def read_record(model: type[_Record], path: Path, *, remedy: str) -> _Record:
    """Reads a record from a JSON file; without a file, one that has nothing set.

    Raises:
        DataError: The file exists and cannot be read.
    """
    if not path.exists():
        return model()
    try:
        return model.model_validate(read_json_object(path, DataError, remedy=remedy))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{key[:200]}: {first['msg']}", where=str(path), remedy=remedy) from None
