"""Tests how an actor is established: by the system, an OpenID Connect token, a signed value or a declared name.

Tokens are signed with keys that the tests make, and are verified by PyJWT.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import pwd
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from registry.documents.keys import make_key, trust_key
from registry.entities import now
from registry.errors import IdentityError, PolicyError, Refused
from registry.home import Home
from registry.identity import current_user, os_user
from registry.maintenance.fsck import fsck
from registry.policy.actors import establish_actor, read_home_id
from registry.policy.policy_file import read_policies
from registry.policy.tokens import sign_actor
from registry.versions.deletion import withdraw
from registry.versions.promotion import promote, read_log
from registry.versions.versions import Versions

ISSUER, AUDIENCE = "https://token.example.com", "loraline"
KEYS = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
TO_JWK = {"RS256": RSAAlgorithm.to_jwk, "ES256": ECAlgorithm.to_jwk, "EdDSA": OKPAlgorithm.to_jwk}
POLICY = f"identity: {{oidc: {{issuer: '{ISSUER}', audience: {AUDIENCE}, keys: jwks.json%s}}}}\n"


@pytest.fixture
def trusting(versions: Versions) -> Versions:
    """Returns versions of a home that trusts the issuer of the tests."""
    keys = [json.loads(TO_JWK[name](key.public_key())) | {"kid": name, "alg": name} for name, key in KEYS.items()]
    (versions.home.path / "jwks.json").write_text(json.dumps({"keys": keys}))
    (versions.home.path / "policy.yaml").write_text(POLICY % "")
    return versions


def token(algorithm: str = "RS256", key: Any = None, kid: str | None = None, **claims: Any) -> str:
    """Returns a token of the issuer; a claim that is None is left out."""
    times = {"iat": now(), "exp": now() + timedelta(minutes=5)}
    values = {"iss": ISSUER, "aud": AUDIENCE, "sub": "repo:lab/adapters", "jti": "id-1", **times, **claims}
    values = {name: value for name, value in values.items() if value is not None}
    return jwt.encode(values, key or KEYS[algorithm], algorithm, headers={"kid": kid or algorithm})


def unsigned(header: dict[str, Any]) -> str:
    """Returns a token without a signature."""
    claims = jwt.decode(token(), options={"verify_signature": False})
    parts = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims))
    return f"{'.'.join(parts)}."


def signed_with_public_key() -> str:
    """Returns a token of HS256 whose secret is the public key: a verifier that trusts its header accepts it.

    PyJWT refuses to make one.
    """
    public = KEYS["RS256"].public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    content = unsigned({"alg": "HS256", "kid": "RS256"})
    signature = hmac.digest(public, content.rstrip(".").encode(), "sha256")
    return content + base64.urlsafe_b64encode(signature).decode().rstrip("=")


ago = {"iat": now() - timedelta(hours=2), "exp": now() - timedelta(hours=1)}
REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "expired": (lambda: token(**ago), "it has expired"),
    "not yet valid": (lambda: token(nbf=now() + timedelta(hours=1)), "not valid yet"),
    "issued in the future": (lambda: token(iat=now() + timedelta(hours=1)), "not valid yet"),
    "audience": (lambda: token(aud="other"), "another audience"),
    "issuer": (lambda: token(iss="https://evil.example.com"), "another issuer"),
    "without expiry": (lambda: token(exp=None), "no claim 'exp'"),
    "without audience": (lambda: token(aud=None), "no claim 'aud'"),
    "without subject": (lambda: token(sub=None), "no claim 'sub'"),
    "another key": (lambda: token(key=rsa.generate_private_key(65537, 2048)), "its signature is not valid"),
    "unknown key id": (lambda: token(kid="other"), "the token names the key 'other'"),
    "no signature": (lambda: unsigned({"alg": "none", "kid": "RS256"}), "the algorithm 'none'"),
    "public key as secret": (signed_with_public_key, "the algorithm 'HS256'"),
    "algorithm of another key": (lambda: token("ES256", kid="RS256"), "its key is for RS256"),
    "huge": (lambda: token(more="x" * 20_000), "at most 16384 bytes"),
    "no token": (lambda: "hello", "not a JSON Web Token"),
    "control characters": (lambda: token(sub="ada\nadmin"), "invalid name of a user"),
}


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_of_the_trusted_issuer_establishes_its_subject(algorithm, trusting, monkeypatch):
    monkeypatch.setenv("LORALINE_ACTOR", "eve")
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", token(algorithm))
    actor = establish_actor(trusting)
    assert (actor, actor.established) == ("repo:lab/adapters", "oidc")
    assert actor.facts == {"issuer": ISSUER, "subject": "repo:lab/adapters", "token": "id-1"}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_token_is_refused_and_nothing_weaker_takes_its_place(case, trusting, monkeypatch):
    make, problem = REFUSED[case]
    text = make()
    monkeypatch.setenv("LORALINE_ACTOR", "eve")
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", text)
    with pytest.raises(IdentityError, match=problem) as error:
        establish_actor(trusting)
    assert text not in str(error.value)


def test_a_token_is_read_from_a_file_and_never_recorded(trusting, register, tmp_path, monkeypatch):
    text = token(email="ann@example.com", email_verified=True)
    (tmp_path / "token").write_text(f"{text}\n")
    (trusting.home.path / "policy.yaml").write_text(POLICY % ", claim: email")
    monkeypatch.setenv("LORALINE_OIDC_TOKEN_FILE", str(tmp_path / "token"))
    register(trusting, b"1", alias_request="staging")
    (event,) = read_log(trusting)
    assert event.actor == "ann@example.com"
    assert event.details["actor"] == {
        "established": "oidc",
        "issuer": ISSUER,
        "subject": "repo:lab/adapters",
        "token": "id-1",
    }
    assert text.encode() not in trusting.home.lineage_db.read_bytes()
    assert fsck(trusting.home, grace=0, mlflow=False) == [], "the chain covers how the actor was established"


@pytest.mark.parametrize("verified", [None, False, "no"])
def test_an_email_that_the_issuer_did_not_verify_names_nobody(verified, trusting, monkeypatch):
    (trusting.home.path / "policy.yaml").write_text(POLICY % ", claim: email")
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", token(email="ann@example.com", email_verified=verified))
    with pytest.raises(IdentityError, match="did not verify its email"):
        establish_actor(trusting)


def test_a_token_that_expires_while_a_process_runs_keeps_its_actor_for_the_session(trusting, monkeypatch):
    text = token()
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", text)
    first = establish_actor(trusting)
    (trusting.home.path / "jwks.json").unlink()  # verifying it again would fail, as after its expiry
    assert establish_actor(trusting) == first
    (trusting.home.path / "policy.yaml").write_text(POLICY % ", session_hours: 0")
    with pytest.raises(IdentityError, match=r"keys cannot be read \(FileNotFoundError\)"):
        establish_actor(trusting)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"keys": []}', b"\xff", b"[" * 100_000])
def test_a_broken_set_of_keys_is_an_error_that_names_the_file(content, trusting, monkeypatch):
    (trusting.home.path / "jwks.json").write_bytes(content)
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", token())
    with pytest.raises(IdentityError, match=r"jwks\.json"):
        establish_actor(trusting)


def test_a_home_without_an_issuer_trusts_no_token_and_logs_the_refusal(versions, register, monkeypatch):
    register(versions, b"1")
    monkeypatch.setenv("LORALINE_OIDC_TOKEN", token())
    with pytest.raises(IdentityError, match="trusts no issuer"):
        withdraw(versions, "zorb", 1, reason="r")
    (event,) = read_log(versions)
    assert (event.action, event.actor, event.details["refused"]) == ("refuse", os_user(), "withdraw")
    assert versions.show("zorb", 1).state == "ACTIVE"


@pytest.mark.parametrize(
    ("identity", "problem"),
    [
        ("{oidc: {issuer: a, audience: b}}", "set either `keys`"),
        ("{oidc: {issuer: a, audience: b, keys: k.json, jwks_url: 'https://x/y'}}", "set either `keys`"),
        ("{oidc: {issuer: a, audience: b, jwks_url: 'http://x/y'}}", "identity.oidc.jwks_url"),
        ("{oidc: {issuer: a, audience: b, keys: ../k.json}}", "identity.oidc.keys"),
        ("{oidc: {issuer: a, audience: b, keys: k.json, leeway: 3600}}", "identity.oidc.leeway"),
        ("{oidc: {issuer: a, audience: b, keys: k.json, session_hours: .inf}}", "identity.oidc.session_hours"),
        ("{accept: []}", "identity.accept"),
        ("{accept: [telepathy]}", "identity.accept.0"),
    ],
)
def test_invalid_settings_of_identity_are_refused_with_their_key(identity, problem, versions):
    (versions.home.path / "policy.yaml").write_text(f"identity: {identity}\n")
    with pytest.raises(PolicyError, match=problem):
        read_policies(versions.home.path)


def test_the_user_of_the_system_is_that_of_the_user_id_whatever_the_environment_says(monkeypatch):
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(variable, "mallory")
    assert os_user() == f"{pwd.getpwuid(os.getuid()).pw_name}@{socket.gethostname()}" == current_user()
    assert current_user().established == "os"
    monkeypatch.setattr(os, "getuid", lambda: 999_999)
    assert os_user() == f"uid-999999@{socket.gethostname()}"


@pytest.mark.parametrize("name", ["a\nb", "x" * 321, " ", "\udc80"])
def test_a_declared_name_that_cannot_be_shown_is_refused(name, monkeypatch):
    monkeypatch.setenv("LORALINE_ACTOR", name)
    with pytest.raises(IdentityError, match="LORALINE_ACTOR: invalid name"):
        current_user()


def test_a_declared_actor_is_refused_where_the_policy_does_not_accept_it(versions, register, monkeypatch):
    register(versions, b"1")
    (versions.home.path / "policy.yaml").write_text("identity: {accept: [os, oidc, signed]}\n")
    promote(versions, "zorb", 1, "canary", reason="by the user of the system")
    monkeypatch.setenv("LORALINE_ACTOR", "ann@example.com")
    with pytest.raises(Refused, match=r"ann@example\.com is a declared name"):
        promote(versions, "zorb", 1, "other", reason="r")
    with pytest.raises(Refused, match="is a declared name"):
        withdraw(versions, "zorb", 1, reason="r", actor="root@host")
    with pytest.raises(Refused, match="is a declared name"):
        register(versions, b"2")
    assert [(e.action, e.details.get("refused")) for e in read_log(versions)[1:]] == [
        ("refuse", "promote"),
        ("refuse", "withdraw"),
        ("refuse", "register"),
    ]
    assert [version.version for version in versions.list()] == [1]


@pytest.fixture
def signing(versions: Versions, tmp_path: Path) -> Callable[..., str]:
    """Returns a function that signs a value with a key that the home trusts for `ci-*`."""
    trust_key(versions.home, make_key(tmp_path / "robot", None).path)
    (versions.home.path / "policy.yaml").write_text("identity: {signers: {robot: ['ci-*']}}\n")

    def make(name: str = "ci-nightly", home: Versions = versions, seconds: float = 60.0) -> str:
        with home.lineage.database.write() as session:
            home_id = read_home_id(session)
        policy = read_policies(versions.home.path).identity
        return sign_actor(versions.home, policy, home_id, name, tmp_path / "robot", None, seconds)

    return make


def test_a_signed_value_establishes_its_actor_and_the_log_names_the_key(versions, register, signing, monkeypatch):
    monkeypatch.setenv("LORALINE_SIGNED_ACTOR", signing())
    register(versions, b"1", alias_request="staging")
    (event,) = read_log(versions)
    assert (event.actor, event.details["actor"]["established"]) == ("ci-nightly", "signed")
    assert event.details["actor"]["key_name"] == "robot"


def test_a_signed_value_that_was_changed_or_expired_or_is_of_another_home_is_refused(
    versions, signing, tmp_path, monkeypatch
):
    value = signing()
    header, claims, signature = value.split(".")
    other = base64.urlsafe_b64encode(base64.urlsafe_b64decode(claims + "==").replace(b"nightly", b"release"))
    past = now() - timedelta(hours=1)
    monkeypatch.setattr("registry.policy.tokens.now", lambda: past)
    expired = signing()
    monkeypatch.undo()
    elsewhere = Versions(Home.open(tmp_path / "elsewhere"))
    foreign = signing(home=elsewhere)
    elsewhere.close()
    for text, problem in {
        f"{header}.{other.decode().rstrip('=')}.{signature}": "its signature is not valid",
        expired: "it has expired",
        foreign: "another audience",
        token(kid="x"): "not trusted here",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv("LORALINE_SIGNED_ACTOR", text)
            with pytest.raises(IdentityError, match=problem):
                establish_actor(versions)
    monkeypatch.setenv("LORALINE_SIGNED_ACTOR", value)
    assert establish_actor(versions) == "ci-nightly"
    (versions.home.path / "keys" / "robot.pub").unlink()
    with pytest.raises(IdentityError, match="not trusted here"):
        establish_actor(versions)


def test_a_key_signs_only_for_the_actors_that_the_policy_names(versions, signing, monkeypatch):
    with pytest.raises(IdentityError, match=r"may not sign for 'ann@example.com'.*robot: ci-\*"):
        signing("ann@example.com")
    monkeypatch.setenv("LORALINE_SIGNED_ACTOR", signing())
    (versions.home.path / "policy.yaml").write_text("")
    with pytest.raises(IdentityError, match="may not sign for 'ci-nightly'"):
        establish_actor(versions)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 400 * 86_400, float("nan"), float("inf")])
def test_a_signed_value_has_a_bounded_validity(seconds, signing):
    with pytest.raises(IdentityError, match="invalid validity"):
        signing(seconds=seconds)
