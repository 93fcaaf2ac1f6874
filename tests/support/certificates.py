"""Writes a root certificate and one that it issued for signing content."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True)
class Signer:
    """Files of a certificate for signing content.

    Attributes:
        chain: The certificate.
        key: Its private key.
        root: The certificate that issued it.
    """

    chain: Path
    key: Path
    root: Path


def write_signer(folder: Path, *, days: int = 30, ocsp: str | None = None) -> Signer:
    """Writes the files (ECDSA P-256) and returns their paths.

    Args:
        folder: The folder for the files.
        days: Days until the signer's certificate expires; it has been valid for 2 days.
        ocsp: Address that says whether the signer's certificate is revoked; None states none.
    """
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root_name, name = _name("Test root"), _name("Test signer")
    root = _builder(root_name, root_name, root_key, is_root=True).sign(root_key, hashes.SHA256())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = _builder(name, root_name, key, is_root=False, days=days).add_extension(usage, critical=False)
    if ocsp is not None:
        place = x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(ocsp))
        leaf = leaf.add_extension(x509.AuthorityInformationAccess([place]), critical=False)
    signed = leaf.add_extension(issuer, critical=False).sign(root_key, hashes.SHA256())
    signer = Signer(folder / "chain.pem", folder / "key.pem", folder / "root.pem")
    signer.chain.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    signer.root.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    signer.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return signer


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_root: bool, days: int = 30
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    used = {"key_cert_sign", "crl_sign"} if is_root else {"digital_signature"}
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage in used for usage in _USAGES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
