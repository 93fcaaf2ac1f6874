"""Records the content of stored adapters, and finds what a file was made from: by bytes, by content, by its header."""

from __future__ import annotations

import base64
import re
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import EngineError
from registry.context import RegistryContext
from registry.entities import ArtifactRef
from registry.errors import StoreError
from registry.lineage.content import (
    find_equal,
    find_holders,
    find_imported,
    find_unknown_inputs,
    find_unrecorded,
    find_upstream,
    has_weights,
    name_artifacts,
    read_sketches,
    record_content,
)
from registry.store.snapshot import find_scratch

if TYPE_CHECKING:
    from lora_engine.formats.codec import Names
    from lora_engine.formats.content import AdapterContent

_CLAIM = re.compile(r"(?:sha256:)([0-9a-f]{64})")
_CONFIG = "adapter_config.json"
_SHOWN = 5
_TITLE = 80
_MOST_CLAIMS = 256


@dataclass(frozen=True)
class ContentSources:
    """What a file was made from, as far as the registry knows.

    Args:
        parents: Digest of an artifact -> its name: `name@version`, or a text with a digest.
        claims: Parents that the header names by digests that nothing here has, as texts.
        similar: Names of artifacts of similar content -> similarity, 0 to 1, the most similar first.
    """

    parents: Mapping[str, str]
    claims: tuple[str, ...] = ()
    similar: Mapping[str, float] | None = None


def record_contents_of_store(context: RegistryContext) -> None:
    """Records the content of every stored adapter and export that has no record yet; a read-only home stays so."""
    if context.home.read_only:
        return
    with context.lineage.database.read() as session:
        missing = find_unrecorded(session)
    for ref in missing:
        try:
            contents = _read_stored(context, ref)
        except StoreError:  # its bytes were deleted, or are damaged, which `fsck` reports
            continue
        record_file_contents(context, ref, contents)


def record_file_contents(context: RegistryContext, ref: ArtifactRef, contents: Sequence[AdapterContent]) -> None:
    """Records contents as those of an artifact."""
    digests = {digest: kind for content in contents for digest, kind in content.digests.items()}
    sketch = next((content.sketch for content in contents if content.sketch), None)
    with context.lineage.database.write() as session:
        record_content(session, ref, digests, _to_text(sketch) if sketch else None)


def read_contents(
    files: Iterable[Path], folder: Path | None = None, names: Names | None = None
) -> list[AdapterContent]:
    """Returns the contents of the adapters and learned tokens in files; skips files in which none can be read.

    Args:
        files: Files of any format.
        folder: The folder to read instead, if the files are a PEFT folder.
        names: The base's modules, for formats that need them.
    """
    paths = sorted(files)
    if folder is not None and any(path.name == _CONFIG for path in paths):
        paths = [folder]
    contents = [_read_content(path, names) for path in paths if path.is_dir() or has_weights(path.name)]
    return [content for content in contents if content is not None]


def find_sources(
    context: RegistryContext,
    files: Mapping[str, str],
    contents: Sequence[AdapterContent],
    header: Mapping[str, Any],
    *,
    least_similarity: float | None = None,
) -> ContentSources:
    """Returns what a file was made from.

    The same bytes lead to exactly the artifacts that hold them. Only if there are none, the same content leads to every
    artifact of that content, whose statements are all about it, and the header to the parents that it names by digest.

    Args:
        context: The registry.
        files: Path -> digest of the file, or of the files of a folder.
        contents: Their contents.
        header: The recipe in the header.
        least_similarity: Similar contents are searched from this similarity on, if nothing else is found; None does not
            search.
    """
    record_contents_of_store(context)
    weights = {digest for path, digest in files.items() if has_weights(path)}
    with context.lineage.database.read() as session:
        sources = set(find_holders(session, weights))
        if sources:
            stated = {digest: f"input sha256:{digest}" for digest in find_unknown_inputs(session, sources)}
        else:
            sources = find_equal(session, {digest for content in contents for digest in content.digests})
            stated = _claims(header)
        # The header of what a verb made repeats the inputs that the registry has recorded.
        further = find_upstream(session, sources) - sources
        claimed = {**find_imported(session, stated), **find_holders(session, stated)}
        known = {digest for digests in claimed.values() for digest in digests}
        parents = name_artifacts(session, sources | (claimed.keys() - further))
        similar: dict[str, float] = {}
        if least_similarity is not None and not sources:
            close = _find_similar(read_sketches(session), contents, least_similarity)
            names = name_artifacts(session, close.keys() - parents.keys())
            for artifact in sorted(names, key=lambda artifact: -close[artifact]):
                similar.setdefault(names[artifact], close[artifact])
    claims = tuple(text for digest, text in stated.items() if digest not in known)
    return ContentSources(parents, claims, dict(list(similar.items())[:_SHOWN]))


def _claims(header: Mapping[str, Any]) -> dict[str, str]:
    """Returns digest -> text of the parents in a header. Names without a digest are those of another registry."""
    stated: list[Any] = []
    recipe: Any = header
    while isinstance(recipe, Mapping):
        parents, recipe = recipe.get("parents"), recipe.get("made")  # the recipe before an import
        stated += parents if isinstance(parents, list | tuple) else ()
    claims: dict[str, str] = {}
    for text in stated[:_MOST_CLAIMS]:
        if isinstance(text, str) and (match := _CLAIM.search(text)):
            title = text[: match.start()].strip()[:_TITLE]
            claims[match[1]] = f"{title} sha256:{match[1]}".strip()
    return claims


def _find_similar(
    sketches: Iterable[tuple[str, str]], contents: Sequence[AdapterContent], least: float
) -> dict[str, float]:
    from lora_engine.formats.content import similarity

    close: dict[str, float] = {}
    for artifact, text in sketches:
        known = _from_text(text)
        for content in contents:
            if content.sketch and known and (value := similarity(content.sketch, known)) >= least:
                close[artifact] = max(value, close.get(artifact, 0.0))
    return close


def _read_stored(context: RegistryContext, ref: ArtifactRef) -> list[AdapterContent]:
    with tempfile.TemporaryDirectory(dir=find_scratch(ref.size)) as name:
        folder = Path(name) / "files"
        context.store.checkout(ref, folder)
        if ref.kind == "adapter":
            return read_contents([folder / "adapter.safetensors"])
        parts = [path for path in folder.iterdir() if path.is_dir()]
        return [
            content
            for part in parts
            for content in read_contents((path for path in part.rglob("*") if path.is_file()), part)
        ]


def _read_content(path: Path, names: Names | None) -> AdapterContent | None:
    from lora_engine.adapters import Adapter
    from lora_engine.formats import Bundle, Card, read_bundle, read_embeddings
    from lora_engine.formats.content import content_of

    try:
        return content_of(read_bundle(path, names))
    except (EngineError, OSError):
        pass
    try:
        return content_of(Bundle(Adapter({}), Card(), tuple(read_embeddings(path))))
    except (EngineError, OSError):
        return None


def _to_text(sketch: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(sketch)}e", *sketch)).decode()


def _from_text(text: str) -> tuple[float, ...] | None:
    from lora_engine.formats.content import SIZE

    try:
        return struct.unpack(f"<{SIZE}e", base64.b64decode(text))
    except (ValueError, struct.error):  # damaged, which `fsck` reports
        return None
