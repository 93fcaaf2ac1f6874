"""Signatures are valid with OpenSSF's package, and every kind of tampering is found."""

import base64
import json
import subprocess
import sys
from datetime import date, timedelta

import pytest
from sqlalchemy import update

from registry import event_log
from registry.documents import signing
from registry.documents.keys import fingerprint, make_key, read_private_key, read_public_key, trust_key, trusted_keys
from registry.documents.signing import (
    is_signed,
    sign,
    signature_findings,
    signed_heads,
    signers,
    uncovered,
)
from registry.documents.storage import (
    BOM,
    CARD,
    DOCUMENT_FILES,
    PROVENANCE,
    SIGNATURE,
    find_records,
    keep,
    read_version_document,
)
from registry.entities import now
from registry.errors import SignatureError
from registry.lineage.rows import record_artifacts, record_contents
from registry.store.chain import Head
from registry.store.tables import VersionRow

SECRET = b"a passphrase"


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A key pair, made once per session."""
    path = tmp_path_factory.mktemp("keys") / "release"
    make_key(path, SECRET)
    return path


@pytest.fixture
def trusted(empty_home, pair):
    """A private key whose public key the home trusts."""
    trust_key(empty_home, pair.with_name("release.pub"))
    return pair


@pytest.fixture
def signed(versions, register, trusted):
    """A version with a valid signature."""
    version = register(versions, b"weights")
    sign(versions, version, trusted, SECRET, actor="anna")
    return version


def bundle_of(versions, version):
    return json.loads(
        read_version_document(versions.store, find_records(versions.lineage, version), version, "signature.json")
    )


def put_bundle(versions, version, bundle):
    content = bundle if isinstance(bundle, bytes) else json.dumps(bundle).encode()
    ref = versions.store.put_files(SIGNATURE, {"signature.json": content})
    with versions.lineage.database.write() as session:
        keep(session, versions.store, version, SIGNATURE, ref)


def test_a_signature_is_valid_and_is_in_the_log(versions, signed, trusted):
    assert signature_findings(versions, signed) == ()
    assert [key.name for key in signers(versions, signed)] == ["release"]
    with versions.lineage.database.read() as session:
        (event,) = [event for event in event_log.read_events(session) if event.action == "sign"]
    assert (event.name, event.after, event.actor) == ("zorb", 1, "anna")
    assert event.details["digests"]["adapter.safetensors"] == signed.sha256
    assert event.details["key"] == fingerprint(read_private_key(trusted, SECRET).public_key())


def test_another_program_verifies_a_signature(versions, signed, trusted, tmp_path):
    records = find_records(versions.lineage, signed)
    for kind in (CARD, BOM, PROVENANCE):
        for file in DOCUMENT_FILES[kind]:
            versions.store.checkout_file(records[kind], file, tmp_path / "model" / file)
    versions.store.checkout_file(signed.artifact, signed.adapter_path, tmp_path / "model" / "adapter.safetensors")
    versions.store.checkout_file(records[SIGNATURE], "signature.json", tmp_path / "signature.json")
    arguments = ["verify", "key", tmp_path / "model", "--signature", tmp_path / "signature.json"]
    command = [sys.executable, "-m", "model_signing", *arguments, "--public_key", trusted.with_name("release.pub")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (tmp_path / "model" / "adapter.safetensors").write_bytes(b"weightz")
    assert subprocess.run(command, capture_output=True).returncode == 1


def test_an_unsigned_version_is_reported(versions, register, trusted):
    version = register(versions, b"weights")
    assert not is_signed(versions, version)
    assert signature_findings(versions, version) == ("it is not signed",)
    assert signers(versions, version) == ()
    assert versions.read_adapter(version) == b"weights", "a policy decides if a signature is required"


def test_flipped_byte_in_the_adapter_is_found_before_the_signature_is_checked(versions, signed):
    versions.store.blobs.path(signed.sha256).write_bytes(b"weightz")
    (finding,) = signature_findings(versions, signed)
    assert signed.sha256 in finding
    assert "adapter.safetensors" in finding


def test_adapter_that_was_replaced_in_store_and_database_alike_is_found(versions, signed):
    """An attacker with write access but without a key cannot replace the bytes."""
    other = versions.store.put_files("adapter", {"adapter.safetensors": b"weightz"})
    entry = versions.store.files(other)["adapter.safetensors"]
    with versions.lineage.database.write() as session:
        record_artifacts(session, [other])
        record_contents(session, other, versions.store.files(other))
        session.execute(update(VersionRow).values(artifact=other.sha256, sha256=entry.sha256, size=entry.size))
    replaced = versions.show("zorb")
    assert replaced.sha256 == entry.sha256
    findings = signature_findings(versions, replaced)
    assert findings[0] == f"adapter.safetensors: signed with digest {signed.sha256}, but now has {entry.sha256}"
    with pytest.raises(SignatureError, match="signed with digest"):
        versions.get("zorb")


def test_another_provenance_is_found(versions, signed):
    records = find_records(versions.lineage, signed)
    statement = json.loads(versions.store.read(records[PROVENANCE], "provenance.json"))
    statement["predicate"]["runDetails"]["builder"]["id"] = "urn:other:builder"
    ref = versions.store.put_files(PROVENANCE, {"provenance.json": json.dumps(statement).encode()})
    with versions.lineage.database.write() as session:
        keep(session, versions.store, signed, PROVENANCE, ref)
    (finding,) = signature_findings(versions, signed)
    assert finding.startswith("provenance.json: signed with digest")


def test_provenance_about_another_adapter_is_not_signed(versions, register, trusted):
    version, other = register(versions, b"weights"), register(versions, b"other")
    with versions.lineage.database.write() as session:
        keep(session, versions.store, version, PROVENANCE, find_records(versions.lineage, other)[PROVENANCE])
    with pytest.raises(SignatureError, match="describes an adapter with digest"):
        sign(versions, version, trusted, SECRET)
    assert not is_signed(versions, version)


def test_signature_of_another_version_is_invalid(versions, register, signed, trusted):
    other = register(versions, b"other")
    sign(versions, other, trusted, SECRET)
    put_bundle(versions, signed, bundle_of(versions, other))
    findings = signature_findings(versions, signed)
    assert "the signature is of zorb@2" in findings
    assert any(finding.startswith("adapter.safetensors: signed with digest") for finding in findings)
    assert signature_findings(versions, other) == ()


def test_signature_of_the_same_files_under_another_name_is_invalid(versions, register, signed, trusted):
    twin = register(versions, b"weights", name="twin")
    with versions.lineage.database.write() as session:
        records = find_records(versions.lineage, signed)
        for kind, ref in records.items():
            keep(session, versions.store, twin, kind, ref)
    assert signature_findings(versions, twin) == ("the signature is of zorb@1",)


def test_an_untrusted_key_cannot_sign_and_its_signature_is_invalid(versions, register, trusted, tmp_path, empty_home):
    version = register(versions, b"weights")
    make_key(tmp_path / "untrusted", None)
    with pytest.raises(SignatureError, match="not among the 1 trusted"):
        sign(versions, version, tmp_path / "untrusted")
    assert not is_signed(versions, version)
    trust_key(empty_home, tmp_path / "untrusted.pub")
    sign(versions, version, tmp_path / "untrusted")
    (empty_home.path / "keys" / "untrusted.pub").unlink()
    (finding,) = signature_findings(versions, version)
    assert "not among the 1 trusted public keys" in finding


def test_a_signature_of_a_removed_key_is_invalid(versions, signed, empty_home):
    (empty_home.path / "keys" / "release.pub").unlink()
    (finding,) = signature_findings(versions, signed)
    assert "not among the 0 trusted public keys" in finding
    with pytest.raises(SignatureError, match="not among the 0"):
        versions.read_adapter(signed)


def test_an_expired_key_cannot_sign_and_its_signature_is_invalid(versions, register, empty_home, tmp_path):
    version = register(versions, b"weights")
    today = now().date()
    make_key(tmp_path / "key", None, valid_until=today)
    trust_key(empty_home, tmp_path / "key.pub")
    sign(versions, version, tmp_path / "key")
    assert signature_findings(versions, version) == ()
    yesterday = (today - timedelta(days=1)).isoformat()
    public = empty_home.path / "keys" / "key.pub"
    public.write_text(public.read_text().replace(today.isoformat(), yesterday))
    (finding,) = signature_findings(versions, version)
    assert finding.endswith(f"expired on {yesterday}")
    with pytest.raises(SignatureError, match="expired"):
        sign(versions, version, tmp_path / "key")


def test_a_forged_signature_with_the_public_key_is_found(versions, signed):
    bundle = bundle_of(versions, signed)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    statement["predicate"]["resources"][0]["digest"] = "0" * 64
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    put_bundle(versions, signed, bundle)
    (finding,) = signature_findings(versions, signed)
    assert "was changed" in finding


def test_flipped_bit_in_the_signature_is_found(versions, signed):
    bundle = bundle_of(versions, signed)
    raw = bytearray(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    raw[-1] ^= 1
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(raw).decode()
    put_bundle(versions, signed, bundle)
    (finding,) = signature_findings(versions, signed)
    assert "was changed" in finding


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"not JSON",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"verificationMaterial": {"publicKey": {}}, "dsseEnvelope": {"signatures": []}}',
        b"\xff\xfe",
        b" " * (2 << 20),
    ],
    ids=["empty", "text", "list", "object", "deep", "no-signature", "bytes", "long"],
)
def test_a_broken_bundle_is_refused(versions, signed, bundle):
    put_bundle(versions, signed, bundle)
    (finding,) = signature_findings(versions, signed)
    assert "the signature cannot be read" in finding


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mediaType", "application/other"),
        ("hint", "short"),
        ("predicateType", "https://model_signing/Digests/v0.1"),
        ("algorithm", "blake3"),
    ],
)
def test_a_bundle_of_an_unknown_form_is_refused(versions, signed, field, value):
    """Includes the form before 1.0, which the package still accepts and which may omit files."""
    bundle = bundle_of(versions, signed)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    if field == "mediaType":
        bundle[field] = value
    elif field == "hint":
        bundle["verificationMaterial"]["publicKey"][field] = value
    elif field == "predicateType":
        statement[field] = value
    else:
        statement["predicate"]["resources"][0][field] = value
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    put_bundle(versions, signed, bundle)
    (finding,) = signature_findings(versions, signed)
    assert "has an unknown form" in finding


def test_damaged_bundle_is_damage(versions, signed):
    ref = find_records(versions.lineage, signed)[SIGNATURE]
    digest = versions.store.files(ref)["signature.json"].sha256
    versions.store.blobs.path(digest).write_bytes(b"{}")
    (finding,) = signature_findings(versions, signed)
    assert digest in finding


@pytest.mark.parametrize(("kind", "file"), [(CARD, "model-card.md"), (CARD, "model-card.html"), (BOM, "ml-bom.json")])
def test_another_card_or_bill_is_found(versions, signed, kind, file):
    """An attacker with write access but without a key cannot replace a document."""
    ref = find_records(versions.lineage, signed)[kind]
    files = {name: versions.store.read(ref, name) for name in versions.store.files(ref)}
    other = versions.store.put_files(kind, files | {file: files[file] + b" "})
    with versions.lineage.database.write() as session:
        keep(session, versions.store, signed, kind, other)
    (finding,) = signature_findings(versions, signed)
    assert finding.startswith(f"{file}: signed with digest")


def test_each_key_has_one_signature_and_all_must_be_valid(versions, signed, trusted, empty_home, tmp_path):
    make_key(tmp_path / "second", None)
    second = trust_key(empty_home, tmp_path / "second.pub")
    file = f"signature-{second.fingerprint[:16]}.json"
    for _ in range(2):
        sign(versions, signed, tmp_path / "second")
    ref = find_records(versions.lineage, signed)[SIGNATURE]
    assert set(versions.store.files(ref)) == {"signature.json", file, file.replace("signature", "log-head")}
    assert [key.name for key in signers(versions, signed)] == ["release", "second"]
    with versions.lineage.database.read() as session:
        events = [event for event in event_log.read_events(session) if event.action == "sign"]
    assert [event.details["file"] for event in events] == ["signature.json", file, file]
    (head,) = signed_heads(versions, signed)
    assert head == Head(events[1].seq, events[1].digest), "the newest event when the second key signed last"

    (empty_home.path / "keys" / "second.pub").unlink()
    assert signature_findings(versions, signed) == (), "one trusted key is enough"
    (empty_home.path / "keys" / "release.pub").unlink()
    assert len(signature_findings(versions, signed)) == 2
    trust_key(empty_home, tmp_path / "second.pub")
    trust_key(empty_home, trusted.with_name("release.pub"))
    files = {name: versions.store.read(ref, name) for name in versions.store.files(ref)}
    files["signature.json"] = files["signature.json"].replace(b'"keyid":""', b'"keyid":"x"')
    other = versions.store.put_files(SIGNATURE, files)
    with versions.lineage.database.write() as session:
        keep(session, versions.store, signed, SIGNATURE, other)
    (finding,) = signature_findings(versions, signed)
    assert finding == "signature.json: the signature has an unknown form"


def test_a_head_that_was_changed_is_found(versions, signed, trusted):
    sign(versions, signed, trusted, SECRET)
    ref = find_records(versions.lineage, signed)[SIGNATURE]
    files = {name: versions.store.read(ref, name) for name in versions.store.files(ref)}
    files["log-head.json"] = files["log-head.json"].replace(b'"seq":1', b'"seq":3')
    other = versions.store.put_files(SIGNATURE, files)
    with versions.lineage.database.write() as session:
        keep(session, versions.store, signed, SIGNATURE, other)
    (finding,) = signature_findings(versions, signed)
    assert finding.startswith("log-head.json: signed with digest")


def test_a_signature_of_an_earlier_release_is_valid_for_what_it_covers(versions, register, trusted, monkeypatch):
    """Releases before 0.4 signed the adapter file and the provenance only."""
    version = register(versions, b"weights")
    with monkeypatch.context() as earlier:
        earlier.setattr(signing, "_DOCUMENTS", ())
        earlier.setattr(signing, "DOCUMENT_FILES", {PROVENANCE: DOCUMENT_FILES[PROVENANCE]})
        signature = sign(versions, version, trusted, SECRET)
    assert set(signature.digests) == {"adapter.safetensors", "provenance.json"}
    assert signature_findings(versions, version) == ()
    assert uncovered(versions, version) == ("ml-bom.json", "model-card.html", "model-card.md")
    sign(versions, version, trusted, SECRET)
    assert uncovered(versions, version) == ()


def test_a_stray_file_among_the_keys_is_a_warning(versions, signed, empty_home, caplog):
    (empty_home.path / "keys" / "notes.pub").write_text("not a key")
    assert signature_findings(versions, signed) == ()
    assert versions.read_adapter(signed) == b"weights"
    assert any("notes.pub: this is not a public key" in record.getMessage() for record in caplog.records)


def test_only_the_owner_can_read_a_key_and_its_passphrase_opens_it(tmp_path):
    key = make_key(tmp_path / "key", SECRET, valid_until=date(2030, 1, 2))
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert key.valid_until == date(2030, 1, 2)
    assert fingerprint(read_private_key(tmp_path / "key", SECRET).public_key()) == key.fingerprint
    for wrong in (None, b"", b"another"):
        with pytest.raises(SignatureError, match="cannot be read"):
            read_private_key(tmp_path / "key", wrong)
    with pytest.raises(SignatureError, match="the file exists"):
        make_key(tmp_path / "key", SECRET)


def test_files_without_a_usable_key_are_refused(tmp_path, empty_home):
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    form = (pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    others = (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1()))
    contents = [b"", b"no key", *(key.public_key().public_bytes(*form) for key in others)]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pub"
        path.write_bytes(content)
        with pytest.raises(SignatureError, match=f"{number}.pub"):
            trust_key(empty_home, path)
    assert trusted_keys(empty_home) == []
    with pytest.raises(SignatureError, match=r"gone\.pub"):
        read_public_key(tmp_path / "gone.pub")


def test_another_key_does_not_take_the_name_of_a_trusted_one(tmp_path, empty_home, trusted):
    make_key(tmp_path / "release", None)
    with pytest.raises(SignatureError, match="another key 'release'"):
        trust_key(empty_home, tmp_path / "release.pub")
    assert len(trusted_keys(empty_home)) == 1
