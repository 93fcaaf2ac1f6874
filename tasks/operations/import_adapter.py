"""Imports an adapter file as a version: validates it and keeps its original bytes.

The file is untrusted: it is copied first, and only the copy is read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import AdapterError
from lora_engine.files import is_present, sha256_file
from registry import event_log, queries
from registry.entities import FOREIGN, AdapterVersion, ArtifactRef, check_alias, check_name
from registry.home import Home
from registry.lineage.rows import record_contents
from registry.policy.actors import establish_actor
from registry.policy.license_terms import NO_ASSERTION
from registry.policy.licenses import read_licenses
from registry.versions.guard import require_permission
from registry.versions.late_revocations import add_parents
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions
from tasks.content import record_file_contents
from tasks.entries import to_record, use_kinds
from tasks.errors import SpecError
from tasks.operations.import_findings import ImportFindings, judge_import
from tasks.operations.verb_run import REVISION, describe_verb, verb_run
from tasks.steps.register import flatten

if TYPE_CHECKING:
    from lora_engine.formats import Bundle, Card


@dataclass(frozen=True)
class ImportRequest:
    """The user's statements about a file to import.

    Args:
        name: The name to register.
        base: Its base: a published architecture, or a name for `resolve_base`.
        license: An identifier or alias of the license table, or `NOASSERTION`.
        trigger: The trigger word; None keeps that of the file.
        alias: The alias to request; None requests none.
        override: True imports although the license is looser than what the file was made from allows, or although the
            content resembles a registered one; the inherited terms still hold.
        reason: Why; required by `override`, and stored in the log.
        recommended: Weights that the card recommends, as in a tag after the name; None keeps those of the file.
    """

    name: str
    base: str
    license: str
    trigger: str | None = None
    alias: str | None = None
    override: bool = False
    reason: str = ""
    recommended: str | None = None

    @property
    def statements(self) -> dict[str, Any]:
        """The statements about the file, without how they were accepted."""
        stated = {name: getattr(self, name) for name in ("name", "base", "license", "trigger", "alias")}
        return stated | ({"recommended": self.recommended} if self.recommended else {})


@dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    Args:
        version: The version.
        format: Format of the file.
        original: Name -> digest of the original files.
        artifact: The artifact with the original files.
        is_new: False if the same bytes with the same statements were a version already.
        refused: Why the requested alias was refused; empty if it was not.
        parents: What the file was made from, as far as the registry knows.
        similar: `name@version` -> similarity of registered adapters with similar content, if nothing else was found.
        warnings: What the file states otherwise than the user.
    """

    version: AdapterVersion
    format: str
    original: Mapping[str, str]
    artifact: ArtifactRef
    is_new: bool
    refused: str = ""
    parents: tuple[str, ...] = ()
    similar: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def inspect_file(file: Path) -> dict[str, Any]:
    """Returns the header facts of a file: format, kinds, `card` with license, trigger and base, digests of its `files`.

    Raises:
        AdapterError: The file is no valid adapter.
    """
    from lora_engine.formats import inspect

    if not is_present(file):
        raise AdapterError("the file does not exist", where=str(file), remedy="check the path")
    return inspect(file)


def check_license(home: Home, license: str) -> str:  # noqa: A002 (the name of the field)
    """Returns the identifier of a license in the table, an SPDX expression of such identifiers, or `NOASSERTION`.

    Raises:
        SpecError: A license is neither in the table nor `NOASSERTION`.
    """
    if license == NO_ASSERTION:
        return license
    table = read_licenses(home.path)
    known = table.normalize(license)
    if known is None:
        raise SpecError(
            f"the license {license[:80]!r} is not in the table",
            where="--license",
            allowed=f"{', '.join(entry.id for entry in table.licenses)}; several with AND, OR, WITH and parentheses",
            remedy=f"add it to {home.path / 'licenses.yaml'}, or use {NO_ASSERTION}, which keeps it from production",
        )
    return known


def import_adapter(home: Home, file: Path, request: ImportRequest) -> ImportResult:
    """Imports an adapter file as a version; the same bytes with the same statements are the same version.

    Args:
        home: The home with all state.
        file: A file of any format, or a PEFT folder.
        request: The user's statements about it.

    The file's parents are found by its bytes, its content and its header, and their terms and revocations hold for it.

    Raises:
        AdapterError: The file is no valid adapter, has non-finite values, or is not for that base.
        BaseModelError: The base does not exist.
        Refused: The license is looser than that of a parent, or the policy refuses similar content.
        RightsError: The file, or something that it was made from, is revoked.
        SpecError: The license is not in the table.
        RegistryError: The adapter cannot be registered.
    """
    check_name(request.name)
    if request.override:
        require_reason(request.reason, "no refusal is overridden")
    if request.alias is not None:
        check_alias(request.alias)
    request = replace(request, license=check_license(home, request.license))
    from lora_engine.formats.content import content_of
    from lora_engine.inference.prompts.tags import parse_arguments

    if request.recommended is not None:
        parse_arguments(request.name, request.recommended)

    facts = inspect_file(file)
    versions = Versions(home)
    try:
        require_permission(versions, "import", name=request.name)
        with tempfile.TemporaryDirectory(dir=home.work) as name:
            copy, out = Path(name) / "original", Path(name) / "out"
            _copy(file, facts["files"], copy)
            original = {path: sha256_file(copy / path) for path in facts["files"]}
            bundle = _read(copy if file.is_dir() else copy / file.name, request, original, str(facts["format"]))
            content = content_of(bundle)
            findings = judge_import(versions, request, original, content, facts["card"], bundle.card)
            foreign = versions.store.put(FOREIGN, copy)
            _write(out, bundle)
            artifact = versions.store.put("adapter", out)
        result = _register(versions, request, facts, bundle.card, foreign, artifact, original, findings)
        record_file_contents(versions, artifact, [content])
        return result
    finally:
        versions.close()


def _copy(file: Path, names: Mapping[str, str], folder: Path) -> None:
    """Copies the recognized files and no others."""
    source = file if file.is_dir() else file.parent
    for relative in names:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target)


def _read(path: Path, request: ImportRequest, original: Mapping[str, str], form: str) -> Bundle:
    """Reads the adapter, validates it against its base, and adds the import to its card."""
    from lora_engine.adapters import Adapter
    from lora_engine.bases.structure import base_module_shapes
    from lora_engine.formats import Bundle, Card, read_bundle, read_embeddings

    shapes = base_module_shapes(request.base)
    label, family, fingerprint = _describe_base(request.base)
    if form == "embedding":
        from lora_engine.formats.embeddings import check_widths

        embeddings = tuple(read_embeddings(path))
        check_widths(embeddings, shapes)
        bundle = Bundle(Adapter({}, family, fingerprint), Card(), embeddings)
    else:
        bundle = read_bundle(path, shapes)
    adapter = bundle.adapter
    claims = {"family": (adapter.base, family), "base model": (adapter.fingerprint, fingerprint)}
    for noun, (stated, requested) in claims.items():
        if stated and requested and stated != requested:
            raise AdapterError(
                f"the file is for {noun} {stated!r}, but --base is {requested!r}",
                where=path.name,
                remedy="give the base that the adapter was trained on",
            )
    imported = {"format": form, "files": sorted(original.values())}
    imported |= {"assumed": bundle.assumptions} if bundle.assumptions else {}
    # A published name has no fingerprint; that of the header is only a claim, so the card and the rights leave it out.
    card = _card(bundle.card, request, label, fingerprint, imported)
    return Bundle(
        replace(adapter, base=family, fingerprint=fingerprint or adapter.fingerprint), card, bundle.embeddings
    )


def _describe_base(base: str) -> tuple[str, str, str | None]:
    from lora_engine.bases.source import resolve_base
    from lora_engine.families import published

    if base in published:
        return base, published[base].family, None
    source = resolve_base(base)
    return source.label, source.family, source.fingerprint()


def _card(card: Card, request: ImportRequest, label: str, fingerprint: str | None, imported: Mapping[str, Any]) -> Card:
    stated = {"license": request.license} | ({"trigger": request.trigger} if request.trigger else {})
    stated |= {"recommended": request.recommended} if request.recommended else {}
    # The user's statements replace those of the header.
    replaced = {"modelspec.license", *(["modelspec.trigger_phrase"] if request.trigger else [])}
    replaced |= {"modelspec.usage_hint"} if request.recommended else set()
    original_recipe = {"made": card.recipe} if card.recipe else {}
    return card.model_copy(
        update={
            **stated,
            "title": card.title or request.name,
            "base": label,
            "base_fingerprint": fingerprint,
            "recipe": {"imported": imported, "parents": [f"base:{label}"], **original_recipe},
            "extra": {key: text for key, text in card.extra.items() if key not in replaced},
        }
    )


def _write(out: Path, bundle: Bundle) -> None:
    from lora_engine.formats import write_adapter

    path = out / "adapter.safetensors"
    write_adapter(path, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)


def _register(
    versions: Versions,
    request: ImportRequest,
    facts: Mapping[str, Any],
    card: Card,
    foreign: ArtifactRef,
    artifact: ArtifactRef,
    original: Mapping[str, str],
    findings: ImportFindings,
) -> ImportResult:
    actor = establish_actor(versions)
    with versions.lineage.database.read() as session:
        row = queries.find_identical(session, request.name, artifact, None)
        is_new = row is None
        parents = findings.parents_of(session, artifact)
    entries = to_record(use_kinds(facts["kinds"]))
    run_id = _record(versions, request, card, (foreign, artifact), original, entries) if is_new else None
    version = versions.register(
        request.name,
        artifact,
        run_id=run_id,
        card=card.model_dump(mode="json"),
        parents=[*card.recipe["parents"], *parents],
        alias_request=request.alias,
        params=flatten(card.recipe),
        actor=actor,
    )
    details = {"license": request.license, "base": card.base, "files": dict(original), "format": facts["format"]}
    with versions.lineage.database.write() as session:
        added = () if is_new else add_parents(session, version, parents, actor)
        if is_new or added:
            event_log.log_event(
                session,
                "import",
                actor=actor,
                reason=request.reason or "imported from a file",
                version=version,
                details=details | findings.details(parents if is_new else added),
            )
    version = versions.show(version.name, version.version)
    return ImportResult(
        version,
        str(facts["format"]),
        original,
        foreign,
        is_new,
        _refusal(versions, version, request.alias),
        parents,
        findings.similar,
        findings.warnings,
    )


def _refusal(versions: Versions, version: AdapterVersion, alias: str | None) -> str:
    if alias is None or alias in version.aliases:
        return ""
    with versions.lineage.database.read() as session:
        events = event_log.read_events(session, version.name, alias)
    refusals = [event.reason for event in events if event.action == "refuse" and event.after == version.version]
    return refusals[-1] if refusals else "another version got it since"


def _record(
    versions: Versions,
    request: ImportRequest,
    card: Card,
    artifacts: tuple[ArtifactRef, ArtifactRef],
    original: Mapping[str, str],
    entries: Mapping[str, Any],
) -> str:
    """Records the import as a run with one step, whose input is the original file."""
    (foreign, artifact), lineage, statements = artifacts, versions.lineage, request.statements
    fingerprint = {"fingerprint": card.base_fingerprint} if card.base_fingerprint else {}
    settings = {"settings": statements, "files": dict(original), "base": {"label": card.base, **fingerprint}}
    with verb_run(lineage, "import", {"name": request.name, "import": statements}) as run:
        lineage.log_execution(
            describe_verb(
                run,
                "import",
                "import",
                ["import", REVISION, statements, foreign.sha256],
                settings={**settings, **entries},
                inputs={"file": foreign},
                output=artifact,
            ),
            contents=versions.store.files(artifact),
        )
        # Lets a lineage walk start at the digest of the original file.
        with lineage.database.write() as session:
            record_contents(session, foreign, versions.store.files(foreign))
    return run.id
