"""Verifies JSON Web Tokens: OpenID Connect tokens of an issuer, and values that a trusted key of the home signed.

PyJWT verifies signature and times. Only asymmetric algorithms are allowed: `none`, and HS256 with the public key as its
secret, are refused. No message has a part of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.documents import parse_json
from registry.documents.keys import PublicKey, fingerprint, read_private_key, trusted_keys
from registry.entities import now
from registry.errors import IdentityError
from registry.home import Home
from registry.identity import Actor, check_actor_name
from registry.policy.identity_policy import IdentityPolicy, OidcPolicy
from registry.policy.roles import matches_any

if TYPE_CHECKING:
    from types import ModuleType

_ALGORITHMS = ("RS256", "ES256", "EdDSA")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
"""Curve of a signing key -> the algorithm of its signatures."""
_SIGNER = "loraline-actor"
"""Issuer of signed values: a token of another purpose that the same key signed is none."""
MAX_TOKEN = 16 << 10
"""Bytes of the longest token that is read."""
_MAX_KEYS = 1 << 20
_PATIENCE = 10
"""Seconds to wait for the keys of an issuer."""
LONGEST_VALIDITY = 366 * 86_400
"""Seconds for which a signed value is valid at most."""
_PROBLEMS = {
    "ExpiredSignatureError": "it has expired",
    "ImmatureSignatureError": "it is not valid yet; compare the clocks",
    "InvalidAudienceError": "it is meant for another audience",
    "InvalidIssuerError": "it is of another issuer",
    "InvalidSignatureError": "its signature is not valid",
    "InvalidAlgorithmError": f"its algorithm is not one of {', '.join(_ALGORITHMS)}",
    "InvalidIssuedAtError": "its time of issue is not valid",
    "InvalidSubjectError": "its subject is not text",
    "InvalidJTIError": "its id is not text",
}


def verify_oidc(home: Home, policy: OidcPolicy | None, token: str) -> Actor:
    """Returns the actor of an OpenID Connect token.

    Args:
        home: The home, whose folder has the keys of the issuer.
        policy: The trusted issuer; None refuses every token.
        token: The token.

    Raises:
        IdentityError: The token is not valid here; says why.
    """
    where = "LORALINE_OIDC_TOKEN"
    if policy is None:
        raise IdentityError(
            "the home trusts no issuer of tokens",
            where=where,
            remedy="set `identity: {oidc: ...}` in policy.yaml (see docs/access.md), or unset the variable",
        )
    header = _read_header(token, where)
    key = _issuer_key(home, policy, header, where)
    claims = _decode(token, key.key, [str(header["alg"])], policy.audience, policy.issuer, policy.leeway, where)
    name = str(claims.get(policy.claim) or "")
    if policy.claim == "email" and claims.get("email_verified") is not True:
        raise IdentityError("the token's issuer did not verify its email", where=where, remedy="use the claim `sub`")
    facts = {"issuer": policy.issuer, "subject": str(claims.get("sub", ""))[:1_000]}
    facts |= {"token": str(claims["jti"])[:200]} if claims.get("jti") else {}
    return Actor(check_actor_name(name, f"the claim {policy.claim!r} of {where}"), "oidc", facts)


def sign_actor(
    home: Home, policy: IdentityPolicy, home_id: str, name: str, key: Path, passphrase: bytes | None, seconds: float
) -> str:
    """Returns a signed value that establishes an actor in one home for a time.

    Args:
        home: The home.
        policy: Says for which actors the key may sign.
        home_id: Id of the home; see `registry.policy.actors.read_home_id`.
        name: The actor.
        key: PEM file of the private key.
        passphrase: Passphrase of the key; None means unencrypted.
        seconds: For how long it is valid; more than 0, at most `LONGEST_VALIDITY`.

    Raises:
        SignatureError: The key cannot be used.
        IdentityError: The key is not trusted, or may not sign for this actor; or the name or time is not valid.
    """
    if not 0 < seconds <= LONGEST_VALIDITY:
        raise IdentityError(f"invalid validity {seconds:g} s", where="--expires", allowed="more than 0 s, at most 366d")
    private = read_private_key(key, passphrase)
    own = fingerprint(private.public_key())
    _trusted_signer(home, policy, own, check_actor_name(name, "NAME"), str(key))
    issued = now()
    claims = {"iss": _SIGNER, "aud": home_id, "sub": name, "iat": issued, "exp": issued + timedelta(seconds=seconds)}
    jwt, algorithm = _jwt("`loraline actor sign`"), _CURVES[private.curve.name]
    return str(jwt.encode(claims, private, algorithm=algorithm, headers={"kid": own}))


def verify_signed(home: Home, policy: IdentityPolicy, home_id: str, value: str) -> Actor:
    """Returns the actor of a signed value.

    Args:
        home: The home, whose trusted keys count.
        policy: Says for which actors a key may sign.
        home_id: Id of the home.
        value: The value that `sign_actor` returned.

    Raises:
        IdentityError: The value is not valid here; says why.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    where = "LORALINE_SIGNED_ACTOR"
    header = _read_header(value, where)
    own = str(header.get("kid", ""))
    trusted = next((key for key in trusted_keys(home) if key.fingerprint == own), None)
    if trusted is None:
        raise _untrusted(where)
    public: Any = load_pem_public_key(trusted.path.read_bytes())
    claims = _decode(value, public, [_CURVES[public.curve.name]], home_id, _SIGNER, 0, where)
    name = check_actor_name(str(claims.get("sub", "")), where)
    signer = _trusted_signer(home, policy, own, name, where)
    return Actor(name, "signed", {"key": own, "key_name": signer.name})


def _trusted_signer(home: Home, policy: IdentityPolicy, own: str, name: str, where: str) -> PublicKey:
    """Returns the trusted key with a fingerprint that may sign for an actor; raises IdentityError without one."""
    matches = [key for key in trusted_keys(home) if key.fingerprint == own and not key.has_expired()]
    if not matches:
        raise _untrusted(where)
    for key in matches:
        if matches_any(name, policy.signers.get(key.name, ())):
            return key
    raise IdentityError(
        f"the key {matches[0].name!r} may not sign for {name!r}",
        where=where,
        allowed="; ".join(f"{key}: {', '.join(names[:4])}" for key, names in policy.signers.items()) or "no key",
        remedy="add the key to `identity: {signers: {KEY: [PATTERN]}}` in policy.yaml",
    )


def _untrusted(where: str) -> IdentityError:
    return IdentityError(
        "the key that signed is not trusted here, or has expired", where=where, remedy="`loraline keys trust FILE.pub`"
    )


def _read_header(token: str, where: str) -> Mapping[str, Any]:
    """Returns the header of a token, not verified."""
    if len(token.encode(errors="replace")) > MAX_TOKEN:
        raise IdentityError(f"a token of {len(token)} characters", where=where, allowed=f"at most {MAX_TOKEN} bytes")
    jwt = _jwt(where)
    try:
        header: Mapping[str, Any] = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise IdentityError("this is not a JSON Web Token", where=where, remedy="pass the token as issued") from None
    return header


def _decode(
    token: str, key: Any, algorithms: list[str], audience: str, issuer: str, leeway: int, where: str
) -> Mapping[str, Any]:
    jwt = _jwt(where)
    try:
        claims: Mapping[str, Any] = jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=audience,
            issuer=issuer,
            leeway=leeway,
            options={"require": ["exp", "iat", "aud", "iss", "sub"]},
        )
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        # The text of some errors has parts of the token.
        kind = type(error).__name__
        missing = getattr(error, "claim", "")
        problem = f"it has no claim {missing!r}" if kind == "MissingRequiredClaimError" else _PROBLEMS.get(kind, kind)
        raise IdentityError(f"the token is not valid: {problem}", where=where, remedy="get a new token") from None
    return claims


def _issuer_key(home: Home, policy: OidcPolicy, header: Mapping[str, Any], where: str) -> Any:
    """Returns the key of the issuer that the header of a token names."""
    jwt = _jwt(where)
    algorithm, kid = header.get("alg"), header.get("kid")
    if algorithm not in _ALGORITHMS:
        problem = f"the token has the algorithm {str(algorithm)[:20]!r}"
        raise IdentityError(problem, where=where, allowed=", ".join(_ALGORITHMS))
    source = policy.jwks_url or str(home.path / str(policy.keys))
    try:
        if policy.jwks_url is not None:
            keys = jwt.PyJWKClient(policy.jwks_url, timeout=_PATIENCE).get_jwk_set().keys
        else:
            with Path(source).open("rb") as file:
                content = file.read(_MAX_KEYS + 1)
            keys = jwt.PyJWKSet.from_dict(parse_json(content, source, IdentityError, max_bytes=_MAX_KEYS)).keys
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, jwt.PyJWTError) as error:
        raise IdentityError(
            f"the issuer's keys cannot be read ({type(error).__name__})",
            where=source,
            remedy="save the JSON Web Key Set of the issuer there (see docs/access.md)",
        ) from None
    matches = [key for key in keys if key.key_id == kid or (kid is None and len(keys) == 1)]
    if not matches:
        raise IdentityError(
            f"the token names the key {str(kid)[:64]!r}, which the issuer's keys do not have",
            where=source,
            remedy="save the issuer's current keys there",
        )
    if matches[0].algorithm_name != algorithm:
        problem = f"the token has the algorithm {algorithm}, and its key is for {matches[0].algorithm_name}"
        raise IdentityError(problem, where=where, remedy="get a new token")
    return matches[0]


def _jwt(what: str) -> ModuleType:
    try:
        import jwt
    except ImportError:
        raise IdentityError(
            "tokens need PyJWT, which is not installed", where=what, remedy="pip install 'loraline[oidc]'"
        ) from None
    return jwt
