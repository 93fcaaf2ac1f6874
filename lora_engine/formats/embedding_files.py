"""Files of embeddings: reading every program's, and writing those that can be written without a pickle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.formats.embeddings import FIRST, SECOND, Embedding, embeddings_in
from lora_engine.formats.pickles import is_pickled, read_pickle
from lora_engine.formats.safetensors_io import read_safetensors, write_safetensors
from lora_engine.registries import Registry

TOKEN, COMPONENT = "loraline.token", "loraline.component"
"""Metadata keys: the token and the text encoder of a file that has no other place for them."""
SUFFIX = ".safetensors"
_FORBIDDEN = re.compile(r'[<>:"|?*]')  # in file names on Windows
_KOHYA = {FIRST: "clip_l", SECOND: "clip_g"}

Layout = Callable[[Embedding], Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]]
"""From an embedding to file name (without suffix), tensors and metadata of each of its files."""
embedding_forms: Registry[Layout] = Registry("embedding format")


def read_embeddings(path: Path) -> list[Embedding]:
    """The embeddings of a file, or of all files of embeddings of a folder, sorted by token.

    Read are A1111's `.pt`, kohya's `.safetensors` and `.pt` (`emb_params`; `clip_l` and `clip_g` of SDXL), diffusers'
    `learned_embeds.bin` and `.safetensors`, and cloneofsimo's `.ti.pt`.

    Args:
        path: A `.safetensors`, `.pt` or `.bin` file, or a folder. A `.pt` is read by a process that can do no harm.

    Raises:
        AdapterError: No embeddings, broken ones, or two of one token that contradict each other.
    """
    if not path.is_dir():
        found = embeddings_of_file(path)
        if found is None:
            raise AdapterError(
                "the file is of no known form of a textual-inversion embedding",
                where=str(path),
                allowed="A1111's string_to_param, emb_params, clip_l and clip_g, or a tensor for each token",
                remedy="name the right file",
            )
        return found
    lists = (embeddings_of_file(file) for file in sorted(path.glob(f"*{SUFFIX}")))
    return join_embeddings(embedding for found in lists if found for embedding in found)


def embeddings_of_file(path: Path) -> list[Embedding] | None:
    """The embeddings of a file of embeddings alone, or None for another file.

    Raises:
        AdapterError: It cannot be read, or an embedding is broken; names the file.
    """
    stem = path.name.removesuffix(path.suffix).removesuffix(".ti") or path.name
    if path.is_file() and is_pickled(path):
        return _named(path, read_pickle(path), stem, "")
    tensors, metadata = read_safetensors(path)
    return _named(path, tensors, metadata.get(TOKEN, stem), metadata.get(COMPONENT, ""))


def write_embeddings(folder: Path, embeddings: Sequence[Embedding], form: str = "kohya") -> list[Path]:
    """Writes embeddings as files of their own; the same embeddings give the same bytes.

    Args:
        folder: Where they go. In kohya's form a file is called as the token, which is how A1111 knows it.
        embeddings: The embeddings.
        form: Name among `embedding_forms`. A1111 reads kohya's; its own `.pt` is a pickle and is not written.

    Returns:
        The files.

    Raises:
        AdapterError: Two tokens would have the same file.
        SettingsError: No such form.
    """
    layout = embedding_forms[form]
    files: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] = {}
    for embedding in embeddings:
        for name, content in layout(embedding).items():
            chosen = name if form != "diffusers" or len(embeddings) == 1 else f"{name}.{_file_name(embedding.token)}"
            if chosen.lower() in {other.lower() for other in files}:
                problem = f"the embedding {embedding.token!r} would have the same file as another one"
                raise AdapterError(problem, where=chosen, remedy="rename one of the tokens")
            files[chosen] = content
    for name, (tensors, metadata) in files.items():
        write_safetensors(folder / f"{name}{SUFFIX}", tensors, metadata)
    return [folder / f"{name}{SUFFIX}" for name in files]


def join_embeddings(embeddings: Iterable[Embedding]) -> list[Embedding]:
    """One embedding for each token, of the vectors that several files hold for it, sorted by token.

    Raises:
        AdapterError: One token twice for the same text encoder.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for embedding in embeddings:
        parts = found.setdefault(embedding.token, {})
        if not parts.keys().isdisjoint(embedding.vectors):
            problem = f"the token {embedding.token!r} is there twice for one text encoder"
            raise AdapterError(problem, allowed="one embedding for each token", remedy="remove one of them")
        parts |= embedding.vectors
    return [Embedding(token, parts) for token, parts in sorted(found.items())]


def _named(path: Path, content: object, token: str, component: str) -> list[Embedding] | None:
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
        problem, where = f"kohya's form has no name for {unknown[0]!r}", f"embedding {embedding.token!r}"
        raise AdapterError(problem, where=where, allowed=", ".join(_KOHYA), remedy="choose another format")
    tensors = {names[name]: tensor for name, tensor in embedding.vectors.items()}
    return {_file_name(embedding.token): (tensors, {TOKEN: embedding.token})}


def _diffusers(embedding: Embedding) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    # As its examples write them: `learned_embeds` and `learned_embeds_2`, one tensor each, whose name is the token.
    return {
        f"learned_embeds{name.removeprefix(FIRST)}": (
            {embedding.token: tensor if embedding.count > 1 else tensor[0]},
            {COMPONENT: name, "format": "pt"},
        )
        for name, tensor in embedding.vectors.items()
    }


embedding_forms.add("kohya", _kohya)
embedding_forms.add("diffusers", _diffusers)
