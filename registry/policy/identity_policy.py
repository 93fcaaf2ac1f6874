"""Settings of `identity` in policy.yaml: which actors count, whose tokens, and whose signatures."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.identity import ActorSource

_Name = Annotated[str, Field(min_length=1, max_length=1_000)]


class OidcPolicy(BaseModel):
    """The issuer of OpenID Connect tokens that a home trusts.

    Attributes:
        issuer: The claim `iss` of its tokens.
        audience: The claim `aud` that a token must have.
        keys: File beside policy.yaml with the issuer's public keys (JSON Web Key Set); needs no network.
        jwks_url: Address of these keys instead, read once per process.
        claim: The claim that names the actor. A token with `email` must also have `email_verified: true`.
        leeway: Seconds by which clocks may differ, 0 to 300.
        session_hours: Hours for which a process keeps the actor of a token that was valid when it was first used, 0 to
            168: a training outlasts the tokens of most issuers. 0 verifies the expiry at each use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: _Name
    audience: _Name
    keys: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,100}$")] | None = None
    jwks_url: Annotated[str, Field(pattern=r"^https://[^\s]{1,1000}$")] | None = None
    claim: Literal["sub", "email"] = "sub"
    leeway: int = Field(default=30, ge=0, le=300)
    session_hours: float = Field(default=24.0, ge=0, le=168, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if (self.keys is None) == (self.jwks_url is None):
            raise ValueError("set either `keys`, a file beside policy.yaml, or `jwks_url`")
        return self


class IdentityPolicy(BaseModel):
    """Which actors count.

    Attributes:
        accept: Ways to establish an actor that may change the registry.
        oidc: The trusted issuer of tokens; None trusts none.
        signers: Name of a trusted key (`keys/NAME.pub`) -> patterns of the actors that it may sign for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accept: Annotated[tuple[ActorSource, ...], Field(min_length=1)] = ("declared", "os", "oidc", "signed", "token")
    oidc: OidcPolicy | None = None
    signers: dict[_Name, Annotated[tuple[_Name, ...], Field(min_length=1, max_length=1_000)]] = Field(
        default_factory=dict
    )
