"""Defines the rights statements of an image: owner, license, legal basis, expiry, and evidence of generation.

Data only: nothing here evaluates them or reads a file.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Basis = Literal["own", "licence", "consent", "tdm"]
Scope = Literal["train", "commercial"]
GenerationSign = Literal[
    "a1111-parameters",
    "comfyui-prompt",
    "comfyui-workflow",
    "digital-source-type-trained-algorithmic-media",
    "digital-source-type-composite-with-trained-algorithmic-media",
]
Line = Annotated[str, Field(min_length=1, max_length=200)]


class OptOut(BaseModel):
    """The result of a check for opt-outs (ai.txt, TDMRep, robots.txt, a list) at the time of the download.

    Attributes:
        tool: Name of the tool or list.
        checked: Day of the check.
        result: `clear`, or `opted-out` if the owner reserves the right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: Line
    checked: date
    result: Literal["clear", "opted-out"]


class Rights(BaseModel):
    """The statements about one image; None means that nothing is stated.

    Attributes:
        owner: The owner.
        license: An SPDX identifier, or a license id of Hugging Face.
        rights: Legal basis of the use: `own` work, a `licence`, a `consent`, or the text and data mining exception
            (`tdm`).
        person: True if the image shows an identifiable human.
        scope: Scope of the basis: `train` for training only, or `commercial` for commercial use of the result too.
        expires: Last day of permitted use.
        revocable: True if the consent can be withdrawn.
        source: Origin of the image.
        opt_out: The check for opt-outs.
        ai_generated: True if the owner states that the image was generated.
        evidence: Evidence of generation in the file's metadata; empty proves nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: Line | None = None
    license: Line | None = None
    rights: Basis | None = None
    person: bool | None = None
    scope: Scope | None = None
    expires: date | None = None
    revocable: bool | None = None
    source: Line | None = None
    opt_out: OptOut | None = None
    ai_generated: bool | None = None
    evidence: tuple[GenerationSign, ...] = ()
