"""Reads embedding files of every known program, and writes the formats that need no pickle."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lora_engine.errors import AdapterError
from lora_engine.files import FilePath, is_file_name, write_within
from lora_engine.finite import check_finite
from lora_engine.formats.embeddings import FIRST, SECOND, Embedding, can_be_key, embeddings_in
from lora_engine.formats.pickles import is_pickled, read_pickle
from lora_engine.formats.safetensors_io import LIMITS, Reader, read_safetensors, write_safetensors
from lora_engine.lazy_torch import torch
from lora_engine.registries import Registry

if TYPE_CHECKING:
    from torch import Tensor

TOKEN, COMPONENT = "loraline.token", "loraline.component"
"""Metadata keys of the token and the text encoder, for files that cannot store them otherwise."""
_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_FORBIDDEN = re.compile(r'[<>:"|?*]')  # in file names on Windows
_KOHYA = {FIRST: "clip_l", SECOND: "clip_g"}

EmbeddingContent: TypeAlias = "tuple[Mapping[str, Tensor], Mapping[str, str]]"
"""Tensors and metadata of a file."""
EmbeddingLayout: TypeAlias = "Callable[[Embedding], Mapping[str, EmbeddingContent]]"
"""From an embedding to file name (without suffix), tensors and metadata of each of its files."""
embedding_forms: Registry[EmbeddingLayout] = Registry("embedding format")


def read_embeddings(path: FilePath) -> list[Embedding]:
    """Returns the embeddings of a file, or of all embedding files in a folder, sorted by token.

    Supports A1111's `.pt`, kohya's `.safetensors` and `.pt` (`emb_params`; `clip_l` and `clip_g` of SDXL), diffusers'
    `learned_embeds.bin` and `.safetensors`, and cloneofsimo's `.ti.pt`.

    Args:
        path: A `.safetensors`, `.pt` or `.bin` file, or a folder. A sandboxed process reads `.pt` and `.bin`.

    Raises:
        AdapterError: There are no embeddings, broken ones, or two of one token for the same text encoder.
    """
    path = Path(path)
    if not path.is_dir():
        embeddings = embeddings_of_file(path)
        if embeddings is None:
            raise AdapterError(
                "unknown format of a textual-inversion embedding",
                where=str(path),
                allowed="A1111's string_to_param, emb_params, clip_l and clip_g, or a tensor for each token",
                remedy="give the path of the right file",
            )
        return embeddings
    lists = (embeddings_of_file(file) for file in sorted(path.glob(f"*{_SUFFIX}")))
    return join_embeddings(embedding for entries in lists if entries for embedding in entries)


def embeddings_of_file(path: Path, read: Reader = read_safetensors) -> list[Embedding] | None:
    """Returns the embeddings of a file that holds only embeddings, or None for any other file.

    Args:
        path: The file.
        read: Reads a `.safetensors` file.

    Raises:
        AdapterError: The file cannot be read, or an embedding is broken; names the file.
    """
    stem = path.name.removesuffix(path.suffix).removesuffix(".ti") or path.name
    if path.is_file() and is_pickled(path):
        return _parse(path, read_pickle(path), stem, "")
    tensors, metadata = read(path, LIMITS)
    return _parse(path, tensors, metadata.get(TOKEN, stem), metadata.get(COMPONENT, ""))


def write_embeddings(
    folder: FilePath, embeddings: Sequence[Embedding], form: str = "kohya", *, license_expression: str | None = None
) -> list[Path]:
    """Writes embeddings as separate files; the same embeddings give the same bytes.

    Args:
        folder: Output folder. In kohya's form the file name is the token, which A1111 uses as the trigger.
        embeddings: The embeddings.
        form: Name in `embedding_forms`. A1111 reads kohya's; its own `.pt` is a pickle and is not written.
        license_expression: License for the headers; None states none.

    Returns:
        The written files.

    Raises:
        AdapterError: As `embedding_contents`; nothing is written.
        SettingsError: No such form.
    """
    return write_contents(folder, embedding_contents(embeddings, form), license_expression)


def write_contents(
    folder: FilePath, contents: Mapping[str, EmbeddingContent], license_expression: str | None = None
) -> list[Path]:
    """Writes what `embedding_contents` returned, and returns the files."""
    folder = Path(folder)
    stated = {"modelspec.license": license_expression} if license_expression else {}
    with write_within(folder):
        for name, (tensors, metadata) in contents.items():
            write_safetensors(folder / f"{name}{_SUFFIX}", tensors, {**metadata, **stated})
    return [folder / f"{name}{_SUFFIX}" for name in contents]


def check_token_files(folder: Path, contents: Mapping[str, EmbeddingContent], adapter: Path | None) -> None:
    """Checks that the files of tokens replace no adapter and no embedding of another one; writes nothing.

    Programs find an embedding by the name of its file, so it cannot have another name.

    Args:
        folder: The folder of the files.
        contents: See `embedding_contents`.
        adapter: The file of the adapter that they come with; None for tokens alone. If it exists, they belong to an
            earlier export, and are replaced with a warning.

    Raises:
        AdapterError: Names the file.
    """
    for stem, (tensors, _) in contents.items():
        place = folder / f"{stem}{_SUFFIX}"
        if adapter is not None and place.name.lower() == adapter.name.lower():
            raise AdapterError(
                f"the embedding {stem!r} and the adapter have the same file name",
                where=str(place),
                allowed="another name for the file of the adapter",
                remedy="choose another output, or a format that holds tokens in the same file, such as onetrainer",
            )
        if not place.exists() or _holds(place, tensors):
            continue
        if adapter is not None and not adapter.exists():
            raise AdapterError(
                f"the file {place.name!r} exists and holds something else than this embedding",
                where=str(place),
                allowed="a folder without a file of this name, or with the same embedding",
                remedy="choose another folder, or delete the file",
            )
        _log.warning("%s is replaced: it held something else than this embedding", place)


def _holds(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    try:
        stored = read_safetensors(path)[0]
    except AdapterError:
        return False
    return stored.keys() == tensors.keys() and all(
        stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor) for name, tensor in tensors.items()
    )


def embedding_contents(embeddings: Sequence[Embedding], form: str) -> dict[str, EmbeddingContent]:
    """Returns the name (without suffix) of each file that `write_embeddings` writes, with its content.

    Raises:
        AdapterError: Two tokens have the same file name, one cannot be that of a file, or the form cannot hold one;
            or a value is NaN, infinite or beyond its dtype.
        SettingsError: No such form.
    """
    layout = embedding_forms[form]
    files: dict[str, EmbeddingContent] = {}
    for embedding in embeddings:
        for name, content in layout(embedding).items():
            stem = name if form != "diffusers" or len(embeddings) == 1 else f"{name}.{_file_name(embedding.token)}"
            if not is_file_name(f"{stem}{_SUFFIX}"):
                problem, allowed = f"{stem[:80]!r} cannot be the name of a file", "a shorter token, without slashes"
                where = f"embedding {embedding.token!r}"
                raise AdapterError(problem, where=where, allowed=allowed, remedy="rename the token")
            if stem.lower() in {existing.lower() for existing in files}:
                problem = f"the embedding {embedding.token!r} has the same file name as another one"
                raise AdapterError(problem, where=stem, remedy="rename one of the tokens")
            check_finite(content[0], f"{stem}{_SUFFIX}")
            files[stem] = content
    return files


def join_embeddings(embeddings: Iterable[Embedding]) -> list[Embedding]:
    """Joins the vectors that several files hold for a token into one embedding; sorts by token.

    Raises:
        AdapterError: A token occurs twice for the same text encoder.
    """
    vectors: dict[str, dict[str, Tensor]] = {}
    for embedding in embeddings:
        parts = vectors.setdefault(embedding.token, {})
        if not parts.keys().isdisjoint(embedding.vectors):
            problem = f"the token {embedding.token!r} occurs twice for one text encoder"
            raise AdapterError(problem, allowed="one embedding for each token", remedy="remove one of them")
        parts |= embedding.vectors
    return [Embedding(token, parts) for token, parts in sorted(vectors.items())]


def _parse(path: Path, content: object, token: str, component: str) -> list[Embedding] | None:
    try:
        return embeddings_in(content, token, component)
    except AdapterError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise error.at(where) from error


def _file_name(token: str) -> str:
    return _FORBIDDEN.sub("", token) or "embedding"


def _kohya(embedding: Embedding) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    names = {FIRST: "emb_params"} if list(embedding.vectors) == [FIRST] else _KOHYA
    unknown = [name for name in embedding.vectors if name not in names]
    if unknown:
        problem, where = f"kohya's format has no name for {unknown[0]!r}", f"embedding {embedding.token!r}"
        raise AdapterError(problem, where=where, allowed=", ".join(_KOHYA), remedy="choose another format")
    tensors = {names[name]: tensor for name, tensor in embedding.vectors.items()}
    return {_file_name(embedding.token): (tensors, {TOKEN: embedding.token})}


def _diffusers(embedding: Embedding) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    # Like diffusers' examples: `learned_embeds` and `learned_embeds_2`, with one tensor each, named after the token.
    if not can_be_key(embedding.token):
        problem, where = "a tensor of this name is no token in diffusers' format", f"embedding {embedding.token!r}"
        allowed = "a name without dots that is no part of a file, or one in angle brackets"
        raise AdapterError(problem, where=where, allowed=allowed, remedy="rename the token")
    return {
        f"learned_embeds{name.removeprefix(FIRST)}": (
            {embedding.token: tensor if embedding.count > 1 else tensor[0]},
            {COMPONENT: name, "format": "pt"},
        )
        for name, tensor in embedding.vectors.items()
    }


embedding_forms.add("kohya", _kohya)
embedding_forms.add("diffusers", _diffusers)
