"""What is stated about a picture: whose it is, on what basis and how long it may be used; what its file gives away.

Statements only: nothing here judges them, and no file is read here.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Basis = Literal["own", "licence", "consent", "tdm"]
Scope = Literal["train", "commercial"]
Evidence = Literal[
    "a1111-parameters",
    "comfyui-prompt",
    "comfyui-workflow",
    "digital-source-type-trained-algorithmic-media",
    "digital-source-type-composite-with-trained-algorithmic-media",
]
Line = Annotated[str, Field(min_length=1, max_length=200)]


class OptOut(BaseModel):
    """What a check for opt-outs (ai.txt, TDMRep, robots.txt, a list) found, as it was noted when the picture was taken.

    Attributes:
        tool: What checked.
        checked: On which day.
        result: `clear`, or `opted-out` where the owner reserves the right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: Line
    checked: date
    result: Literal["clear", "opted-out"]


class Rights(BaseModel):
    """What is stated about one picture; what is not stated is None, which is no statement either way.

    Attributes:
        owner: Who owns it.
        license: Its licence: an SPDX identifier, or as Hugging Face writes it.
        rights: On what basis it is used: `own` work, a `licence`, a `consent`, or the exception for text and data
            mining (`tdm`).
        person: Whether it shows a person.
        scope: What the basis covers: `train`ing alone, or `commercial` use of the result too.
        expires: The last day on which it may be used.
        revocable: Whether the consent can be withdrawn.
        source: Where it was taken from.
        opt_out: The check for opt-outs.
        ai_generated: Whether its owner says that it was generated.
        evidence: Signs of generation that its file carried. None were seen where it is empty; that proves nothing.
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
    evidence: tuple[Evidence, ...] = ()
