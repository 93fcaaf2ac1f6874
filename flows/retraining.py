"""Defines the settings of scheduled retraining: the section `retraining` of a pipeline file. Imports no Prefect."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class CheckSettings(BaseModel):
    """What is checked after a promotion. The alias, the bytes and the exports are always checked.

    Attributes:
        after: Delay between the promotion and the check; seconds, up to 3600.
        sample: True draws one image with the promoted adapter, which must be finite and not flat.
        prompt: The prompt of this image; None means the adapter's trigger word.
        steps: Denoising steps of this image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 0.0
    sample: bool = True
    prompt: Annotated[str | None, Field(min_length=1, max_length=2000)] = None
    steps: Annotated[int, Field(ge=1, le=200)] = 4


class RetrainingSettings(BaseModel):
    """What a scheduled run does with a new version after it was staged, and what a training starts from.

    Attributes:
        release: `none` leaves it staged, `ask` waits for an approval, `automatic` promotes it if its policy allows it.
        alias: The alias to promote to.
        approval_timeout: Hours until a request for approval expires, up to a year.
        start: `scratch`, or `warm`: trainings of registered adapters start from the version that has the alias.
        check: The check after the promotion.
        rollback: True rolls the alias back if the check fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    release: Literal["none", "ask", "automatic"] = "none"
    alias: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")] = "production"
    approval_timeout: Annotated[float, Field(gt=0, le=8760, allow_inf_nan=False)] = 72.0
    start: Literal["scratch", "warm"] = "scratch"
    check: CheckSettings = CheckSettings()
    rollback: bool = True
