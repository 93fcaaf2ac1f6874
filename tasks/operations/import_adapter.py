"""`import_adapter`: somebody else's file becomes a version, validated in full, with its own bytes kept beside.

The file is untrusted: it is copied first and only the copy is read, as `lora_engine.formats` reads every file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json, sha256_bytes
from registry import queries
from registry.entities import AdapterVersion, ArtifactRef, Execution, RunStatus, check_alias, check_name, now
from registry.home import Home
from registry.identity import current_user
from registry.lineage.record import record_contents
from registry.policy.licenses import read_licenses
from registry.versions.versions import Versions
from tasks.environment import describe_environment
from tasks.errors import SpecError
from tasks.steps.register import flatten

if TYPE_CHECKING:
    from lora_engine.formats import Bundle, Card

FOREIGN = "foreign"
"""The kind of artifact that keeps a file as it came."""
NO_ASSERTION = "NOASSERTION"
_REVISION = "1"


@dataclass(frozen=True)
class ImportRequest:
    """What the person says of a file.

    Args:
        name: The name to register under.
        base: The base that it is for: a published architecture, or a name for `resolve_base`.
        license: An identifier or alias of the table of licences, or `NOASSERTION`.
        trigger: The word that calls it; None leaves what the file says.
        alias: An alias to ask for.
    """

    name: str
    base: str
    license: str
    trigger: str | None = None
    alias: str | None = None


@dataclass(frozen=True)
class ImportResult:
    """What came of it.

    Args:
        version: The version.
        format: What the file was.
        original: Digests of the files as they came.
        artifact: Where their bytes are kept.
        is_new: False where the same bytes with the same statements were a version already.
        refused: Why it did not get the alias that was asked for.
    """

    version: AdapterVersion
    format: str
    original: Mapping[str, str]
    artifact: ArtifactRef
    is_new: bool
    refused: str = ""


def inspect_file(file: Path) -> dict[str, Any]:
    """What a file says of itself: format, kinds, `card` with licence, trigger and base, digests of its `files`.

    Raises:
        AdapterError: It is no adapter, or not whole.
    """
    from lora_engine.formats import inspect

    if not file.exists():
        raise AdapterError("there is no such file", where=str(file), remedy="check the path")
    return inspect(file)


def check_license(home: Home, license: str) -> str:  # noqa: A002 (what it is called everywhere)
    """The identifier of a licence as the table has it.

    Raises:
        SpecError: It is not in the table, and not said to be unknown either.
    """
    if license == NO_ASSERTION:
        return license
    table = read_licenses(home.path)
    found = table.find(license)
    if found is None:
        raise SpecError(
            f"the licence {license[:80]!r} is not in the table",
            where="--license",
            allowed=", ".join(each.id for each in table.licenses),
            remedy=f"add it to {home.path / 'licenses.yaml'}, or say {NO_ASSERTION}, which keeps it from production",
        )
    return found.id


def import_adapter(home: Home, file: Path, wish: ImportRequest) -> ImportResult:
    """Registers a foreign adapter; the same bytes with the same statements are the same version.

    Args:
        home: Where all state lives.
        file: A file of any format, or a PEFT folder.
        wish: What the person says of it.

    Raises:
        AdapterError: It is no adapter, not whole, not finite, or not for that base.
        BaseModelError: No such base.
        SpecError: A licence that is not known.
        RegistryError: It cannot be registered.
    """
    check_name(wish.name)
    if wish.alias is not None:
        check_alias(wish.alias)
    wish = replace(wish, license=check_license(home, wish.license))
    facts = inspect_file(file)
    versions = Versions(home)
    try:
        with tempfile.TemporaryDirectory(dir=home.work) as name:
            copy, out = Path(name) / "original", Path(name) / "out"
            _copy(file, facts["files"], copy)
            foreign = versions.store.put(FOREIGN, copy)
            original = {path: entry.sha256 for path, entry in versions.store.files(foreign).items()}
            bundle = _read(copy if file.is_dir() else copy / file.name, wish, original, str(facts["format"]))
            _write(out, bundle)
            artifact = versions.store.put("adapter", out)
        return _register(versions, wish, facts, bundle.card, foreign, artifact, original)
    finally:
        versions.close()


def _copy(file: Path, names: Mapping[str, str], folder: Path) -> None:
    """Copies what was recognised, and nothing else that may lie there."""
    source = file if file.is_dir() else file.parent
    for relative in names:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target)


def _read(path: Path, wish: ImportRequest, original: Mapping[str, str], form: str) -> Bundle:
    """The adapter, checked against its base, with a card that says where it comes from."""
    from lora_engine.adapters import Adapter
    from lora_engine.bases.structure import base_module_shapes
    from lora_engine.formats import Bundle, Card, read_bundle, read_embeddings

    shapes = base_module_shapes(wish.base)
    label, family, fingerprint = _describe_base(wish.base)
    if form == "embedding":
        from lora_engine.formats.embeddings import check_widths

        words = tuple(read_embeddings(path))
        check_widths(words, shapes)
        bundle = Bundle(Adapter({}, family, fingerprint), Card(), words)
    else:
        bundle = read_bundle(path, shapes)
    adapter = bundle.adapter
    told = {"family": (adapter.base, family), "base model": (adapter.fingerprint, fingerprint)}
    for noun, (theirs, ours) in told.items():
        if theirs and ours and theirs != ours:
            raise AdapterError(
                f"the file says that it is for {noun} {theirs!r}, and --base is {ours!r}",
                where=path.name,
                remedy="name the base that it was made for",
            )
    imported = {"format": form, "files": sorted(original.values())}
    imported |= {"assumed": bundle.assumptions} if bundle.assumptions else {}
    card = _card(bundle.card, wish, label, fingerprint or adapter.fingerprint, imported)
    return Bundle(
        replace(adapter, base=family, fingerprint=fingerprint or adapter.fingerprint), card, bundle.embeddings
    )


def _describe_base(base: str) -> tuple[str, str, str | None]:
    from lora_engine.bases.families import families
    from lora_engine.bases.published import published
    from lora_engine.bases.source import resolve_base

    if base in published:
        return base, families[published[base].family].adapters, None
    source = resolve_base(base)
    return source.label, families[source.family].adapters, source.fingerprint()


def _card(card: Card, wish: ImportRequest, label: str, fingerprint: str | None, imported: Mapping[str, Any]) -> Card:
    stated = {"license": wish.license} | ({"trigger": wish.trigger} if wish.trigger else {})
    # What is said here takes the place of what the header said of the same.
    replaced = {"modelspec.license", *(["modelspec.trigger_phrase"] if wish.trigger else [])}
    made = {"made": card.recipe} if card.recipe else {}
    return card.model_copy(
        update={
            **stated,
            "title": card.title or wish.name,
            "base": label,
            "base_fingerprint": fingerprint,
            "recipe": {"imported": imported, "parents": [f"base:{label}"], **made},
            "extra": {key: text for key, text in card.extra.items() if key not in replaced},
        }
    )


def _write(out: Path, bundle: Bundle) -> None:
    from lora_engine.formats import write_adapter

    path = out / "adapter.safetensors"
    write_adapter(path, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)


def _register(
    versions: Versions,
    wish: ImportRequest,
    facts: Mapping[str, Any],
    card: Card,
    foreign: ArtifactRef,
    artifact: ArtifactRef,
    original: Mapping[str, str],
) -> ImportResult:
    with versions.lineage.database.read() as session:
        row = queries.find_identical(session, wish.name, artifact, None)
        is_new = row is None
    run_id = _record(versions, wish, card, (foreign, artifact), original) if is_new else None
    version = versions.register(
        wish.name,
        artifact,
        run_id=run_id,
        card=card.model_dump(mode="json"),
        parents=card.recipe["parents"],
        alias_request=wish.alias,
        params=flatten(card.recipe),
        actor=current_user(),
    )
    if is_new:
        details = {"license": wish.license, "base": card.base, "files": dict(original), "format": facts["format"]}
        with versions.lineage.database.write() as session:
            queries.log_event(
                session,
                "import",
                actor=current_user(),
                reason="imported from a file",
                version=version,
                details=details,
            )
    return ImportResult(
        version, str(facts["format"]), original, foreign, is_new, _refusal(versions, version, wish.alias)
    )


def _refusal(versions: Versions, version: AdapterVersion, alias: str | None) -> str:
    if alias is None or alias in version.aliases:
        return ""
    with versions.lineage.database.read() as session:
        events = queries.read_events(session, version.name, alias)
    refusals = [event.reason for event in events if event.action == "refuse" and event.after == version.version]
    return refusals[-1] if refusals else "another version took it since"


def _record(
    versions: Versions,
    wish: ImportRequest,
    card: Card,
    made: tuple[ArtifactRef, ArtifactRef],
    original: Mapping[str, str],
) -> str:
    """Records the import as a run with one step, which took the file as it came."""
    (foreign, artifact), lineage, said = made, versions.lineage, vars(wish)
    fingerprint = {"fingerprint": card.base_fingerprint} if card.base_fingerprint else {}
    run = lineage.start_run("import", {"name": wish.name, "import": said})
    status: RunStatus = "FAILED"
    try:
        lineage.record(
            Execution(
                id=uuid4().hex,
                run_id=run.id,
                step="import",
                uses="import",
                revision=_REVISION,
                key=sha256_bytes(canonical_json(["import", _REVISION, said, foreign.sha256])),
                settings={"settings": said, "files": dict(original), "base": {"label": card.base, **fingerprint}},
                inputs={"file": foreign},
                output=artifact,
                environment=describe_environment(),
                started_at=run.started_at,
                ended_at=now(),
            ),
            contents=versions.store.files(artifact),
        )
        # So that a walk can start at the digest of the file as it came.
        with lineage.database.write() as session:
            record_contents(session, foreign, versions.store.files(foreign))
        status = "COMPLETED"
    finally:
        lineage.finish_run(run.id, status)
    return run.id
