"""Defines the verbs on documents of versions (card, records, sign, verify) and on the keys for signing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import Json, Ref
from flows.cli.verbs import Access, add_verb, open_home

if TYPE_CHECKING:
    from registry.documents.keys import PublicKey

_VARIABLE = "LORALINE_KEY_PASSPHRASE"

keys_app = typer.Typer(help="Create, trust and list keys for signing.", no_args_is_help=True)


def add_verbs(app: typer.Typer) -> None:
    """Adds this module's verbs to the command."""
    add_verb(app, Access.READ, card, records, verify)
    add_verb(app, Access.WRITE, sign)
    add_verb(keys_app, Access.WRITE, new_key, name="new")
    add_verb(keys_app, Access.WRITE, trust)
    add_verb(keys_app, Access.READ, list_keys, name="list")
    app.add_typer(keys_app, name="keys")


def card(
    ref: Ref,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Output file, .md or .html. Default: standard output."),
    ] = None,
) -> None:
    """Print the model card of a version, or write it to a file."""
    from tasks.operations.documents import read_model_card, write_card

    if output is None:
        print(read_model_card(open_home(), ref, html=False).decode(), end="")
        return
    write_card(open_home(), ref, output)
    print(output)


def records(
    ref: Ref,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Output folder.")],
    with_adapter: Annotated[bool, typer.Option(help="Include the registered adapter file.")] = False,
    as_json: Json = False,
) -> None:
    """Write all documents of a version: model card, provenance, bill of materials, signature."""
    from flows.cli.output import print_json
    from tasks.operations.documents import write_documents

    written = write_documents(open_home(), ref, output, with_adapter=with_adapter)
    if as_json:
        print_json(written)
        return
    for entry in written:
        print(f"{entry['file']}  sha256 {entry['sha256']}")


def sign(
    ref: Ref,
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private key from `loraline keys new`.")],
    as_json: Json = False,
) -> None:
    """Sign a version: its adapter file and all documents. Reads LORALINE_KEY_PASSPHRASE or prompts for it."""
    from flows.cli.output import print_json
    from tasks.operations.documents import sign_version

    version, signature = sign_version(open_home(), ref, key, read_passphrase(key))
    if as_json:
        print_json({"version": version.ref, "key": signature.key, "digests": signature.digests})
        return
    print(f"{version.ref} is signed with key {signature.key[:16]}")
    for file, digest in sorted(signature.digests.items()):
        print(f"{file}  sha256 {digest}")


def verify(
    ref: Annotated[
        str, typer.Argument(metavar="NAME@REF|PATH", help="name@version, name@alias; with --key a folder or file.")
    ],
    signed: Annotated[bool, typer.Option("--signed", help="Require a signature.")] = False,
    key: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.pub", help="Verify an exported folder or file with this key, without a home."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify a version: bytes, structure, documents, signature, policy. Exit code 1 if anything is wrong."""
    from dataclasses import asdict

    from flows.cli.output import print_json, print_table
    from tasks.operations.documents import verify_version

    if key:
        _verify_path(Path(ref), key, as_json)
        return
    _refuse_path(ref)
    result = verify_version(open_home(), ref, must_be_signed=signed)
    if as_json:
        print_json(asdict(result) | {"holds": result.holds})
    else:
        by = f"signed with the key {', '.join(result.signers)}"
        uncovered = f"; not covered: {', '.join(result.unsigned)}; sign again" if result.unsigned else ""
        valid = {
            "bytes": f"sha256 {result.sha256}",
            "structure": "valid adapter",
            "records": "complete, for this file",
            "signature": f"{by}{uncovered}" if result.signed_by else "not signed",
        }
        rows = []
        for check, summary in valid.items():
            findings = getattr(result, check)
            rows += [(check, "WRONG", finding) for finding in findings] or [(check, "ok", summary)]
        for alias, reasons in result.policy.items():
            rows += [(f"policy of {alias}", "WRONG", reason) for reason in reasons] or [
                (f"policy of {alias}", "ok", "met")
            ]
        print_table(("check", "", result.version), rows)
    if not result.holds:
        raise typer.Exit(1)


def _refuse_path(ref: str) -> None:
    from tasks.errors import SpecError

    if "@" not in ref and os.sep in ref:
        raise SpecError(
            f"{ref!r} is a path", where="verify", allowed="NAME@REF, or a path with --key FILE.pub for each signer"
        )


def _verify_path(path: Path, keys: list[Path], as_json: bool) -> None:
    from dataclasses import asdict

    from flows.cli.output import print_json, print_table
    from tasks.operations.verify_files import verify_files

    result = verify_files(path, keys)
    if as_json:
        print_json(asdict(result) | {"holds": result.holds})
    else:
        rows = [("WRONG", finding) for finding in result.findings]
        rows += [("ok", f"signed with the key {name}") for name in result.signed_by]
        rows += [("ok", f"{file}  sha256 {digest}") for file, digest in sorted(result.signed.items())]
        rows += [("note", note) for note in result.notes]
        print_table(("", f"{result.folder}: {result.version or 'no valid signature'}"), rows)
    if not result.holds:
        raise typer.Exit(1)


def new_key(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Private key to write; the public key goes to FILE.pub.")
    ],
    without_passphrase: Annotated[bool, typer.Option(help="Write the private key unencrypted.")] = False,
    days: Annotated[int | None, typer.Option(min=1, help="Validity in days. Default: unlimited.")] = None,
    trust_it: Annotated[bool, typer.Option("--trust", help="Trust the key in this home.")] = False,
) -> None:
    """Create a key pair for signing (ECDSA, P-256) on this machine."""
    from datetime import timedelta

    from registry.documents.keys import make_key, trust_key
    from registry.entities import now

    secret = None
    if not without_passphrase:
        secret = os.environ.get(_VARIABLE) or typer.prompt(
            "Passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
    home = open_home() if trust_it else None
    until = None if days is None else (now() + timedelta(days=days)).date()
    key = make_key(file, secret.encode() if secret else None, valid_until=until)
    print(f"{file}  private: keep it secret")
    print(f"{key.path}  public: key {key.fingerprint[:16]}{_until(key)}")
    if home is not None:
        print(f"{trust_key(home, key.path).path}  trusted here")


def trust(file: Annotated[Path, typer.Argument(metavar="FILE.pub", help="Public key in PEM.")]) -> None:
    """Trust a public key in this home; signatures with its private key then verify."""
    from registry.documents.keys import trust_key

    key = trust_key(open_home(), file)
    print(f"{key.path}  trusted: key {key.fingerprint[:16]}{_until(key)}")


def list_keys(as_json: Json = False) -> None:
    """List the public keys that this home trusts. Remove a key's file to stop trusting it."""
    from flows.cli.output import print_json, print_table
    from registry.documents.keys import trusted_keys

    keys = trusted_keys(open_home())
    if as_json:
        listed = [(key, None if key.valid_until is None else key.valid_until.isoformat()) for key in keys]
        print_json([{"name": key.name, "key": key.fingerprint, "valid_until": until} for key, until in listed])
        return
    rows = [(key.name, key.fingerprint[:16], key.valid_until, "EXPIRED" if key.has_expired() else "") for key in keys]
    print_table(("name", "key", "valid until", ""), rows)


def read_passphrase(key: Path) -> bytes | None:
    """Returns the passphrase of an encrypted key from the environment or a prompt; None for an unencrypted key."""
    from registry.documents.keys import is_encrypted

    if not is_encrypted(key):
        return None
    # Never from an option: other users see the command lines of processes.
    passphrase = os.environ.get(_VARIABLE) or typer.prompt("Passphrase", hide_input=True, err=True)
    return str(passphrase).encode()


def _until(key: PublicKey) -> str:
    return f", valid until {key.valid_until}" if key.valid_until else ""
