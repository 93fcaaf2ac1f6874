"""Settings of the best checkpoint and of early stopping, and the mark of settings that may be `auto`. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.catalog.kinds import Lora
from lora_engine.settings import AddedLater
from lora_engine.training.specs.lengths import Steps

if TYPE_CHECKING:
    from lora_engine.training.spec import TrainSettings

AUTO = "auto"
"""Value of a setting that the training chooses."""
RANK_PREFIXES = (1, 2, 4, 8, 16, 32)
"""Ranks that `rank: auto` chooses from."""

ChoiceScore = Literal["validation_loss", "dvar"]


class BestCheckpoint(BaseModel):
    """Keeps the best of several steps, stops when they no longer improve, and then lowers the rate to 0.

    Attributes:
        by: Score of a step. `validation_loss` is the loss on held-out images at fixed noise and timesteps; from 8
            groups of independent images on, half of them is left for the evaluation. `dvar` stops when the loss on the
            training images at fixed noise no longer varies (Voronov et al. 2023), and keeps the last step. `auto` is
            `validation_loss` from 6 held-out images on, else `dvar`.
        every: Steps between candidates, or epochs; None is a twentieth of the steps.
        patience: Candidates in a row without an improvement that end the training; 0 never ends it early.
        min_delta: Smallest decrease of the score that is an improvement.
        anneal: Share of all steps, at the end, in which the rate falls to 0. After an early stop it is as many steps as
            give this share. 0 keeps `schedule` and stops at once.
        max_memorized: Largest share of what was learned of the training images that does not carry over to the
            held-out ones: 1 - the fall of their loss over the fall of the loss of training images. A candidate above it
            is not kept and is no improvement. None allows every candidate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["auto"] | ChoiceScore = "auto"
    every: Steps | None = None
    patience: int = Field(default=3, ge=0, le=1_000)
    min_delta: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    anneal: Annotated[float, Field(ge=0.0, le=0.9, allow_inf_nan=False)] = 0.2
    max_memorized: Annotated[float | None, AddedLater(), Field(ge=0.0, le=1.0, allow_inf_nan=False)] = None

    @model_validator(mode="after")
    def _a_limit_needs_held_out_images(self) -> BestCheckpoint:
        if self.by == "dvar" and self.max_memorized is not None:
            raise ValueError("max_memorized compares with held-out images, which by: dvar does not use; leave one out")
        return self


@dataclass(frozen=True)
class OrAuto:
    """Marks a setting that may be `auto`: `rank: Annotated[int, Field(ge=1), OrAuto()]`.

    A training replaces `auto` by a value before its first step.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns the schema of the setting, with `auto` beside its values and its own messages for others."""
        from pydantic_core import core_schema

        def validate(value: Any, inner: Callable[[Any], Any]) -> Any:
            return value if value == AUTO else inner(value)

        plain = core_schema.plain_serializer_function_ser_schema(lambda value: value)
        return core_schema.no_info_wrap_validator_function(validate, handler(source), serialization=plain)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        """Returns the JSON Schema: that of the setting, or the text `auto`."""
        return {"anyOf": [handler(schema), {"const": AUTO, "type": "string"}]}


def check_choice(settings: TrainSettings) -> None:
    """Checks that `best_checkpoint` and the automatic settings fit the others.

    Raises:
        ValueError: They do not; says what to change.
    """
    choice = settings.best_checkpoint or (BestCheckpoint() if settings.is_auto("steps") else None)
    optimizer = settings.rates.optimiser
    if choice is not None and settings.then:
        raise ValueError("best_checkpoint decides where the steps end, so `then` cannot add others; leave one out")
    if choice is not None and choice.anneal and settings.schedule.name != "constant":
        raise ValueError(
            f"schedule is {settings.schedule.name!r}, but best_checkpoint.anneal lowers the rate at the end; leave "
            "schedule out, or set anneal to 0"
        )
    if choice is not None and choice.anneal and optimizer.averages:
        raise ValueError(f"optimizer {optimizer.name!r} replaces a falling rate; set best_checkpoint.anneal to 0")
    if settings.is_auto("learning_rate") and optimizer.finds_rate:
        raise ValueError(f"optimizer {optimizer.name!r} finds the rate itself; set learning_rate to 1.0")
    if settings.is_auto("rank"):
        if choice is not None and choice.max_memorized is not None:
            raise ValueError("best_checkpoint.max_memorized compares one rank; set rank, or leave max_memorized out")
        if settings.alpha is not None or settings.overrides:
            raise ValueError("rank auto keeps the scale of all ranks at 1; leave alpha and overrides out")
        if settings.kind != Lora():
            raise ValueError("rank auto cuts the factors of plain LoRA; choose kind lora without options")
        if settings.rank_dropout:
            raise ValueError("rank auto trains prefixes of the ranks; leave rank_dropout out")
    if settings.automatic and not settings.method.has_adapter:
        raise ValueError(
            f"method {settings.method.name!r} trains no adapter, so {' and '.join(settings.automatic)} cannot be auto"
        )
