"""Imports an adapter file as a version: validates it and keeps its original bytes.

The file is untrusted: it is copied first, and only the copy is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.files import sha256_file
from registry import event_log, queries
from registry.entities import FOREIGN, AdapterVersion, ArtifactRef
from registry.home import Home
from registry.lineage.rows import record_contents
from registry.policy.actors import establish_actor
from registry.refs import check_alias, check_name
from registry.versions.guard import require_permission
from registry.versions.late_revocations import add_parents
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions
from tasks.content import record_file_contents
from tasks.entries import to_record, use_kinds
from tasks.operations.import_findings import ImportFindings, judge_import
from tasks.operations.import_request import ImportRequest, check_license
from tasks.operations.imported_file import copy_recognized, inspect_file, read_import, write_import
from tasks.operations.verb_run import REVISION, describe_verb, verb_run
from tasks.steps.register import flatten

if TYPE_CHECKING:
    from lora_engine.formats import Card


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
            copy_recognized(file, facts["files"], copy)
            original = {path: sha256_file(copy / path) for path in facts["files"]}
            bundle = read_import(copy if file.is_dir() else copy / file.name, request, original, str(facts["format"]))
            content = content_of(bundle)
            findings = judge_import(versions, request, original, content, facts["card"], bundle.card)
            foreign = versions.store.put(FOREIGN, copy)
            write_import(out, bundle)
            artifact = versions.store.put("adapter", out)
        result = _register(versions, request, facts, bundle.card, foreign, artifact, original, findings)
        record_file_contents(versions, artifact, [content])
        return result
    finally:
        versions.close()


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
