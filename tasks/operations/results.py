"""Records what verbs on files made from registered adapters, so that a later import of the result finds its parents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lora_engine.errors import EngineError
from lora_engine.files import is_present, sha256_bytes, sha256_file
from registry.context import RegistryContext
from registry.entities import RESULT, ArtifactRef, FileEntry
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.content import UNKNOWN_INPUTS, find_holders, find_result_sizes, has_weights
from registry.lineage.rows import read_artifacts
from registry.policy.rights import inherited_license
from registry.store.tables import ExecutionRow
from registry.store.trees import encode_tree
from registry.versions.versions import Versions
from tasks.content import find_sources, read_contents, record_file_contents
from tasks.operations.promote import find_version
from tasks.operations.verb_run import REVISION, describe_verb, verb_run

if TYPE_CHECKING:
    from lora_engine.formats.codec import Names
    from lora_engine.formats.content import AdapterContent

_log = logging.getLogger(__name__)
FileStamp = tuple[int, int, int]


class VerbRecorder:
    """Records one verb: `add_source` for each input, then `record` for the files that it wrote.

    Args:
        home: The home; None if there is none, and then nothing is recorded.
        verb: The verb.
        output: The file or folder that the verb writes.
    """

    def __init__(self, home: Home | None, verb: str, output: Path) -> None:
        self._home, self._verb, self._output = home, verb, output
        self._before = _stamps(output)
        self._sources: dict[str, ArtifactRef] = {}
        self._unknown: set[str] = set()

    def add_source(self, text: str, path: Path) -> None:
        """Adds an input of the verb if the registry knows it: by name, bytes, content, or a parent in its header.

        Args:
            text: The argument: `NAME@REF`, or a file.
            path: The file to read.
        """
        if self._home is None:
            return
        try:
            with closing(Versions(self._home)) as versions:
                if not is_present(text) and "@" in text:
                    self.add_artifact(find_version(versions, text).artifact)
                    return
                self._add_known(versions, path)
        except RegistryError as error:
            if not is_present(text):
                raise
            _log.warning("%s is not looked up in the registry: %s", path, error)

    def license_of(self, text: str) -> str | None:
        """Returns the license that files made of one adapter must state; None for a file, whose header states it.

        Args:
            text: The argument: `NAME@REF`, or a file.
        """
        if self._home is None or is_present(text):
            return None
        with closing(Versions(self._home)) as versions:
            return inherited_license(versions, find_version(versions, text).artifact)

    def add_artifact(self, ref: ArtifactRef) -> None:
        """Adds an artifact as an input."""
        self._sources[ref.sha256] = ref

    def add_model(self, path: Path) -> None:
        """Adds a whole model as an input if a verb made it from adapters; reads it only if its size is that of one."""
        if self._home is None or not path.exists():
            return
        with closing(Versions(self._home)) as versions, versions.lineage.database.read() as session:
            sizes = find_result_sizes(session)
            files = [file for file in _files_of(path) if file.stat().st_size in sizes and has_weights(file.name)]
            holders = find_holders(session, {sha256_file(file) for file in files})
            for ref in read_artifacts(session, holders, kind=RESULT).values():
                self.add_artifact(ref)

    def _add_known(self, versions: Versions, path: Path) -> None:
        listed = _files_of(path)
        files = {str(file): sha256_file(file) for file in listed if has_weights(file.name)}
        contents = read_contents(listed, path if path.is_dir() else None)
        sources = find_sources(versions, files, contents, _recipe_of(path))
        if not sources.parents:
            self._unknown |= set(files.values())
        with versions.lineage.database.read() as session:
            for ref in read_artifacts(session, sources.parents).values():
                self.add_artifact(ref)

    def record(
        self, settings: Mapping[str, Any], names: Names | None = None, *, is_model: bool = False
    ) -> ArtifactRef | None:
        """Records the files that the verb wrote as made from its known inputs; returns None if it knows none.

        Args:
            settings: What the log shows of the verb.
            names: The base's modules, for formats that need them.
            is_model: True for whole models, which are known by their bytes alone.
        """
        if self._home is None or not self._sources:
            return None
        if self._home.read_only:
            _log.warning(
                "%s cannot be written, so it does not know what %s was made from", self._home.path, self._output
            )
            return None
        written = [path for path, stamp in _stamps(self._output).items() if self._before.get(path) != stamp]
        with closing(Versions(self._home)) as versions:
            folder = self._output if self._output.is_dir() else None
            contents = [] if is_model else read_contents(written, folder, names)
            unknown = sorted(self._unknown)
            return record_result(versions, self._verb, self._sources, written, contents, settings, unknown=unknown)


def recorder_of(home: Path, verb: str, output: Path) -> VerbRecorder:
    """Returns the recorder of a verb; one that records nothing if the home does not exist."""
    opened = Home.open_to_read(home)
    return VerbRecorder(opened if opened.exists else None, verb, output)


def record_result(
    context: RegistryContext,
    verb: str,
    sources: Mapping[str, ArtifactRef],
    written: Sequence[Path],
    contents: Sequence[AdapterContent],
    settings: Mapping[str, Any],
    *,
    unknown: Sequence[str] = (),
) -> ArtifactRef | None:
    """Records files outside of the store as the result of a step that was run by a verb.

    Their bytes are not stored. The same files from the same sources are recorded once.

    Args:
        context: The registry.
        verb: Name of the step.
        sources: Digest -> artifact that the files were made from.
        written: The files.
        contents: What the adapters in them do.
        settings: Settings of the step.
        unknown: Digests of the input files that the registry does not know.

    Returns:
        The artifact that describes the files; None if none of them has weights.
    """
    files = {path: FileEntry(sha256_file(path), path.stat().st_size) for path in sorted(written)}
    entries = {f"{index}/{path.name}": entry for index, (path, entry) in enumerate(files.items())}
    if not any(map(has_weights, entries)):
        return None
    output = ArtifactRef(
        RESULT, sha256_bytes(encode_tree(RESULT, entries)), sum(entry.size for entry in entries.values())
    )
    if _is_recorded(context, output, sources):
        return output
    lineage = context.lineage
    with verb_run(lineage, verb, {"verb": verb, **settings}) as run:
        execution = describe_verb(
            run,
            verb,
            verb,
            # No pipeline may find the result as a cached one: its bytes are not in the store.
            [verb, REVISION, sorted(sources), run.id],
            settings={"settings": dict(settings), **({UNKNOWN_INPUTS: list(unknown)} if unknown else {})},
            inputs={f"sources.{index}": sources[digest] for index, digest in enumerate(sorted(sources))},
            output=output,
        )
        lineage.log_execution(execution, contents=entries)
    record_file_contents(context, output, contents)
    return output


def _is_recorded(context: RegistryContext, output: ArtifactRef, sources: Mapping[str, ArtifactRef]) -> bool:
    with context.lineage.database.read() as session:
        ids = list(session.scalars(select(ExecutionRow.id).where(ExecutionRow.output == output.sha256)))
    found = context.lineage.executions(ids=ids)
    return any({ref.sha256 for ref in step.inputs.values()} >= sources.keys() for step in found)


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _recipe_of(path: Path) -> Mapping[str, Any]:
    from lora_engine.formats import inspect

    try:
        recipe = inspect(path)["card"]["recipe"]
    except EngineError:
        return {}
    return recipe if isinstance(recipe, Mapping) else {}


def _stamps(output: Path) -> dict[Path, FileStamp]:
    """Returns the identity of each file of an output, which every atomic write changes."""
    if not output.exists():
        return {}
    status = {path: path.stat() for path in _files_of(output)}
    return {path: (entry.st_ino, entry.st_mtime_ns, entry.st_size) for path, entry in status.items()}
