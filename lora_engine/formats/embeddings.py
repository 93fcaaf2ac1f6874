"""Converts textual-inversion embeddings between the canonical `Embedding` and the tensors of other programs.

It handles tensors, keys and metadata; `embedding_files` handles files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lora_engine.errors import AdapterError
from lora_engine.formats.mapped_tensor import is_tensor
from lora_engine.formats.validate import validate_tensors
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
_ENCODERS = (FIRST, SECOND, THIRD)
_BUNDLE = "bundle_emb."
EMBED_FLAG = "<embed>"
"""Value in cloneofsimo's metadata that marks a tensor as a learned token."""
# Names of a text encoder's vectors in files.
_COMPONENTS = {"clip_l": FIRST, "clip_g": SECOND, FIRST: FIRST, SECOND: SECOND, THIRD: THIRD}
_PLAIN = "emb_params"
_T5 = ("t5", "t5xxl")
_NO_TOKENS = ("weight", "bias", "alpha")
_PARTS = (*_COMPONENTS, _PLAIN, *_T5)
_BUNDLED = re.compile(
    rf"{re.escape(_BUNDLE)}(?P<token>.+?)\."
    rf"(?P<part>string_to_param\..+|{'|'.join(_PARTS)})"
)
_MAX_TOKEN, _MAX_VECTORS, _MAX_WIDTH = 128, 1024, 1 << 16
# The width of CLIP-G; identifies the encoder of vectors whose file does not name it.
_WIDTH_OF_SECOND = 1280
_AGAIN = "save or download the embedding again"


@dataclass(frozen=True, eq=False, repr=False)
class Embedding:
    """A learned token: vectors for the input of the text encoders.

    Attributes:
        token: The text in a prompt.
        vectors: Text encoder (`text_encoder`, `text_encoder_2`) to its vectors `[n, width]`, float, finite; `n` is the
            same for all encoders. Sorted by name.
    """

    token: str
    vectors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        matrices = {
            name: tensor[None] if tensor.dim() == 1 else tensor for name, tensor in sorted(self.vectors.items())
        }
        object.__setattr__(self, "vectors", MappingProxyType(matrices))
        self._check()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.vectors.items())
        return f"<Embedding {self.token!r}, {shapes}>"

    def __eq__(self, other: object) -> bool:
        """Returns True if token, dtypes and vectors are equal."""
        if not isinstance(other, Embedding):
            return NotImplemented
        has_same_keys = self.token == other.token and list(self.vectors) == list(other.vectors)
        return has_same_keys and all(
            tensor.dtype == other.vectors[name].dtype and torch.equal(tensor, other.vectors[name])
            for name, tensor in self.vectors.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """Number of vectors of the token."""
        return next(iter(self.vectors.values())).shape[0]

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors by text encoder."""
        return {name: tensor.shape[1] for name, tensor in self.vectors.items()}

    def _check(self) -> None:
        where = f"embedding {self.token[:80]!r}"
        if not 0 < len(self.token) <= _MAX_TOKEN or not self.token.isprintable() or self.token != self.token.strip():
            allowed = f"1 to {_MAX_TOKEN} printable characters, with no space at the ends"
            raise AdapterError("invalid token", where=where, allowed=allowed, remedy="rename the token")
        if any(part in self.token for part in ("/", "\\", "..")):
            problem, allowed = "the token looks like a path", "a token without slash, backslash or double dot"
            raise AdapterError(problem, where=where, allowed=allowed, remedy="rename the token")
        for name, tensor in self.vectors.items():
            if name not in _ENCODERS:
                problem, allowed = f"there is no text encoder {name[:80]!r}", ", ".join(_ENCODERS)
                raise AdapterError(problem, where=where, allowed=allowed, remedy=_AGAIN)
            if tensor.dim() != 2 or not 0 < tensor.shape[0] <= _MAX_VECTORS or not 0 < tensor.shape[1] <= _MAX_WIDTH:
                allowed = f"[width] or [n, width], with at most {_MAX_VECTORS} vectors"
                problem = f"the vectors of {name} have the shape {list(tensor.shape)}"
                raise AdapterError(problem, where=where, allowed=allowed, remedy=_AGAIN)
        validate_tensors({f"{self.token} of {name}": tensor for name, tensor in self.vectors.items()})
        counts = {name: tensor.shape[0] for name, tensor in self.vectors.items()}
        if len(set(counts.values())) > 1:
            problem = f"the text encoders have different numbers of vectors: {counts}"
            raise AdapterError(problem, where=where, allowed="the same number for each", remedy=_AGAIN)


def check_widths(embeddings: Iterable[Embedding], names: object) -> None:
    """Raises an error if the vectors do not fit the text encoders of a base.

    Args:
        embeddings: The embeddings.
        names: The base's module names. Widths are checked only if it is a mapping to weight shapes.

    Raises:
        AdapterError: The base has no such text encoder, or its width differs.
    """
    if not isinstance(names, Mapping):
        return
    suffix = ".text_model.embeddings.token_embedding"
    widths = {name.removesuffix(suffix): shape[1] for name, shape in names.items() if name.endswith(suffix)}
    for embedding in embeddings:
        for name, width in embedding.widths.items():
            if widths and widths.get(name) != width:
                raise AdapterError(
                    f"the vectors of {name} are {width} wide",
                    where=f"embedding {embedding.token!r}",
                    allowed=", ".join(f"{size} for {encoder}" for encoder, size in sorted(widths.items())),
                    remedy="name the base that the embedding was made for",
                )


def take_embeddings(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[Embedding]]:
    """Separates the tensors of a file into those of the adapter and the embeddings.

    Supports bundles (`bundle_emb.<token>.clip_l`, of LyCORIS, A1111 and OneTrainer, and ours) and cloneofsimo's literal
    tokens, which are marked in the metadata.

    Raises:
        AdapterError: An embedding is broken, or of an unsupported form.
    """
    rest: dict[str, Tensor] = {}
    tokens: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if metadata.get(key) == EMBED_FLAG:
            tokens.setdefault(key, {})[FIRST] = tensor
            continue
        if not key.startswith(_BUNDLE):
            rest[key] = tensor
            continue
        bundled = _BUNDLED.fullmatch(key)
        if bundled is None:
            raise AdapterError(
                "unknown part of a bundled embedding",
                where=f"tensor {key!r}",
                allowed=", ".join([*_PARTS, "string_to_param.*"]),
                remedy="save the adapter without output embeddings",
            )
        tokens.setdefault(bundled["token"], {})[bundled["part"]] = tensor
    return rest, [Embedding(token, _by_component(parts)) for token, parts in sorted(tokens.items())]


def embed(form: str, embeddings: Iterable[Embedding]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns embeddings as tensors and metadata for an adapter's file; `take_embeddings` is the inverse.

    Args:
        form: `bundle` (ours), `clip` (the bundles of OneTrainer, LyCORIS and A1111) or `tokens` (cloneofsimo).
        embeddings: The embeddings.

    Raises:
        AdapterError: The form cannot hold an embedding.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for embedding in embeddings:
        if form == "tokens":
            if list(embedding.vectors) != [FIRST] or embedding.count > 1:
                problem = f"the token has {embedding.count} vectors for {', '.join(embedding.vectors)}"
                where = f"embedding {embedding.token!r}"
                raise AdapterError(problem, where=where, allowed=f"one for {FIRST}", remedy="choose another format")
            tensors[embedding.token], metadata[embedding.token] = embedding.vectors[FIRST][0], EMBED_FLAG
            continue
        names = {FIRST: _PLAIN} if list(embedding.vectors) == [FIRST] else {FIRST: "clip_l", SECOND: "clip_g"}
        for component, tensor in embedding.vectors.items():
            part = names.get(component, component) if form == "clip" else component
            tensors[f"{_BUNDLE}{embedding.token}.{part}"] = tensor
    return tensors, metadata


def embeddings_in(content: object, token: str, component: str = "") -> list[Embedding] | None:
    """Returns the embeddings of a file that holds only embeddings; None if it has no known form of these.

    Args:
        content: A dict of tensors, or the content of a `.pt`: A1111's, kohya's (`emb_params`, `clip_l` and `clip_g`),
            diffusers' and cloneofsimo's (`{token: vectors}`).
        token: Token for an embedding whose file does not name it.
        component: The text encoder, if the file's metadata name it; else empty.
    """
    if not isinstance(content, Mapping) or not content:
        return None
    params = content.get("string_to_param")
    if isinstance(params, Mapping):
        name = content.get("name")
        vectors = [value for value in params.values() if is_tensor(value)]
        if len(vectors) != 1:
            problem, where = f"it holds {len(vectors)} tensors", "'string_to_param'"
            raise AdapterError(problem, where=where, allowed="one", remedy=_AGAIN)
        return [Embedding(name if isinstance(name, str) and name else token, {_encoder(vectors[0], ""): vectors[0]})]
    tensors = {str(key): value for key, value in content.items() if is_tensor(value)}
    if len(tensors) != len(content):
        return None
    if set(tensors) <= set(_PARTS):
        return [Embedding(token, _by_component(tensors))]
    # Any single name without dots may be a token. Several names are tokens only if all are in angle brackets.
    name, tensor = next(iter(tensors.items()))
    is_token = len(tensors) == 1 and can_be_key(name) and tensor.dim() in (1, 2)
    if all(map(_is_marked, tensors)) or is_token:
        return [Embedding(key, {_encoder(value, component): value}) for key, value in sorted(tensors.items())]
    return None


def can_be_key(token: str) -> bool:
    """Returns True if a token is read again from a file whose only tensor has its name."""
    return token not in _PARTS and (_is_marked(token) or ("." not in token and token not in _NO_TOKENS))


def _is_marked(token: str) -> bool:
    return token.startswith("<") and token.endswith(">")


def _by_component(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_component: dict[str, Tensor] = {}
    for part, tensor in parts.items():
        # T5 is the second encoder of FLUX, after CLIP-L, and the third of Stable Diffusion 3, after CLIP-L and CLIP-G.
        t5 = THIRD if "clip_g" in parts else SECOND
        component = t5 if part in _T5 else _COMPONENTS.get(part) or _encoder(tensor, "")
        if component in by_component:
            problem = f"the vectors of {component} occur twice"
            raise AdapterError(problem, where=f"tensor {part!r}", allowed="once", remedy=_AGAIN)
        by_component[component] = tensor
    return by_component


def _encoder(tensor: Tensor, component: str) -> str:
    return component or (SECOND if tensor.shape[-1:] == (_WIDTH_OF_SECOND,) else FIRST)
