"""Defines the rights statements of an image: owner, license, legal basis, expiry, and evidence of generation.

Data only: nothing here evaluates them or reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Basis = Literal["own", "licence", "consent", "tdm"]
Scope = Literal["train", "commercial"]
GenerationSign = Literal[
    "a1111-parameters",
    "comfyui-prompt",
    "comfyui-workflow",
    "invokeai-metadata",
    "novelai-metadata",
    "c2pa-manifest",
    "c2pa-valid",
    "c2pa-untrusted",
    "c2pa-invalid",
    "c2pa-trained-algorithmic-media",
    "digital-source-type-trained-algorithmic-media",
    "digital-source-type-composite-with-trained-algorithmic-media",
]
MANIFEST: GenerationSign = "c2pa-manifest"
SIGNATURES: Mapping[GenerationSign, str] = {
    "c2pa-valid": "signature valid",
    "c2pa-untrusted": "signature untrusted: intact, by a signer who is not among the trusted ones",
    "c2pa-invalid": "signature invalid: the file was changed, or the manifest is of another one",
}
"""State of a C2PA manifest -> its description."""
PROVENANCE: frozenset[GenerationSign] = frozenset({MANIFEST, *SIGNATURES})
"""Say where an image comes from, also of photographs."""
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
        evidence: Evidence of generation in the file's metadata, and whether it has a C2PA manifest, with the state of
            its signature if that was verified; empty proves nothing.
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

    @property
    def is_generated(self) -> bool:
        """True if the owner or the file says that the image was generated; False proves nothing."""
        return bool(self.ai_generated or {*self.evidence} - PROVENANCE)

    def describe_generation(self) -> str:
        """Returns what is known of the image's generation, as `generated (a1111-parameters)`; empty for nothing."""
        signs = ["as its owner states"] if self.ai_generated else []
        signs += [sign for sign in self.evidence if sign not in PROVENANCE]
        states = [SIGNATURES[sign] for sign in self.evidence if sign in SIGNATURES]
        if MANIFEST in self.evidence and not states:
            states = ["signature not verified"]
        if self.is_generated:
            return f"generated ({', '.join([*signs, *states])})"
        return ", ".join(["content credentials (C2PA)", *states]) if MANIFEST in self.evidence else ""
