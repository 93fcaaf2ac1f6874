"""Textual-inversion embeddings: the canonical `Embedding`, and the tensors that programs keep one in.

Knows tensors, names and metadata; which files hold embeddings is in `embedding_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.formats.validate import validate_tensors

FIRST, SECOND, THIRD = "text_encoder", "text_encoder_2", "text_encoder_3"
BUNDLE = "bundle_emb."
EMBED_FLAG = "<embed>"
"""What cloneofsimo's metadata say of a token that is a tensor of the file."""
# What programs call the vectors of a text encoder.
_COMPONENTS = {"clip_l": FIRST, "clip_g": SECOND, FIRST: FIRST, SECOND: SECOND, THIRD: THIRD}
_PLAIN = "emb_params"
_T5 = ("t5", "t5xxl")
_NO_TOKENS = ("weight", "bias", "alpha")
_PARTS = (*_COMPONENTS, _PLAIN, *_T5)
_BUNDLED = re.compile(
    rf"{re.escape(BUNDLE)}(?P<token>.+?)\."
    rf"(?P<part>string_to_param\..+|{'|'.join(_PARTS)})"
)
_MAX_TOKEN, _MAX_VECTORS, _MAX_WIDTH = 128, 1024, 1 << 16
# The width of CLIP-G, in a file that holds vectors of one width and does not say of which encoder.
_WIDTH_OF_SECOND = 1280
_AGAIN = "save or download the embedding again"


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word that was learned as vectors of the text encoders' input.

    Attributes:
        token: What is written in a prompt.
        vectors: Text encoder (`text_encoder`, `text_encoder_2`) to its vectors `[n, width]`, float, finite; `n` is the
            same for all encoders. Kept sorted by name.
    """

    token: str
    vectors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        two = {name: tensor[None] if tensor.dim() == 1 else tensor for name, tensor in sorted(self.vectors.items())}
        object.__setattr__(self, "vectors", MappingProxyType(two))
        self._check()

    def __eq__(self, other: object) -> bool:
        """Whether token and vectors are the same, bit for bit with their dtypes."""
        if not isinstance(other, Embedding):
            return NotImplemented
        same = self.token == other.token and list(self.vectors) == list(other.vectors)
        return same and all(
            tensor.dtype == other.vectors[name].dtype and torch.equal(tensor, other.vectors[name])
            for name, tensor in self.vectors.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """How many vectors the token stands for."""
        return next(iter(self.vectors.values())).shape[0]

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors by text encoder."""
        return {name: tensor.shape[1] for name, tensor in self.vectors.items()}

    def _check(self) -> None:
        where = f"embedding {self.token[:80]!r}"
        if not 0 < len(self.token) <= _MAX_TOKEN or not self.token.isprintable() or self.token != self.token.strip():
            allowed = f"1 to {_MAX_TOKEN} printable characters, with no space at the ends"
            raise AdapterError("the token is not fit to be one", where=where, allowed=allowed, remedy="name it anew")
        if any(part in self.token for part in ("/", "\\", "..")):
            problem, allowed = "the token reads like a path", "a token without slash, backslash or double dot"
            raise AdapterError(problem, where=where, allowed=allowed, remedy="name it anew")
        for name, tensor in self.vectors.items():
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
    """Does nothing for embeddings whose vectors fit the text encoders of a base.

    Args:
        embeddings: The embeddings.
        names: The base's module names; as a mapping to weight shapes, the widths are looked up in it.

    Raises:
        AdapterError: The base has no such text encoder, or one of another width.
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
                    allowed=", ".join(f"{wide} for {part}" for part, wide in sorted(widths.items())),
                    remedy="name the base that the embedding was made for",
                )


def take_embeddings(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[Embedding]]:
    """The tensors of an adapter's file that are the adapter, and the embeddings that lie among them.

    Read are bundles (`bundle_emb.<token>.clip_l`, of LyCORIS, A1111 and OneTrainer; ours) and cloneofsimo's literal
    tokens, which its metadata mark.

    Raises:
        AdapterError: A broken embedding, or one in a form that has no meaning here.
    """
    rest: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if metadata.get(key) == EMBED_FLAG:
            found.setdefault(key, {})[FIRST] = tensor
            continue
        if not key.startswith(BUNDLE):
            rest[key] = tensor
            continue
        bundled = _BUNDLED.fullmatch(key)
        if bundled is None:
            raise AdapterError(
                "this part of a bundled embedding is not known",
                where=f"tensor {key!r}",
                allowed=", ".join([*_PARTS, "string_to_param.*"]),
                remedy="leave output embeddings out when you save the adapter",
            )
        found.setdefault(bundled["token"], {})[bundled["part"]] = tensor
    return rest, [Embedding(token, _by_component(parts)) for token, parts in sorted(found.items())]


def embed(form: str, embeddings: Iterable[Embedding]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embeddings as tensors (and metadata) among those of an adapter; what `take_embeddings` takes out again.

    Args:
        form: `bundle` (ours), `clip` (the bundles of OneTrainer, LyCORIS and A1111) or `tokens` (cloneofsimo).
        embeddings: The embeddings.

    Raises:
        AdapterError: The form cannot hold one.
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
            tensors[f"{BUNDLE}{embedding.token}.{part}"] = tensor
    return tensors, metadata


def embeddings_in(content: object, token: str, component: str = "") -> list[Embedding] | None:
    """The embeddings of a file of embeddings alone; None where it is of no form of these.

    Args:
        content: A dict of tensors, or what a `.pt` holds: A1111's, kohya's (`emb_params`, `clip_l` and `clip_g`),
            diffusers' and cloneofsimo's (`{token: vectors}`).
        token: What an embedding is called whose file does not say so.
        component: The text encoder, where it is known from the file's metadata.
    """
    if not isinstance(content, Mapping) or not content:
        return None
    known = content.get("string_to_param")
    if isinstance(known, Mapping):
        name = content.get("name")
        vectors = [value for value in known.values() if isinstance(value, Tensor)]
        if len(vectors) != 1:
            problem, where = f"there are {len(vectors)} tensors in it", "'string_to_param'"
            raise AdapterError(problem, where=where, allowed="one", remedy=_AGAIN)
        return [Embedding(name if isinstance(name, str) and name else token, {_encoder(vectors[0], ""): vectors[0]})]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) != len(content):
        return None
    if set(tensors) <= set(_PARTS):
        return [Embedding(token, _by_component(tensors))]
    # Any name without dots may be a token; several in one file are taken for tokens only where they look like some.
    marked = all(key.startswith("<") and key.endswith(">") for key in tensors)
    name, tensor = next(iter(tensors.items()))
    is_token = len(tensors) == 1 and "." not in name and name not in _NO_TOKENS and tensor.dim() in (1, 2)
    if marked or is_token:
        return [Embedding(key, {_encoder(value, component): value}) for key, value in sorted(tensors.items())]
    return None


def _by_component(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, tensor in parts.items():
        # FLUX has T5 beside CLIP-L, Stable Diffusion 3 beside CLIP-L and CLIP-G.
        t5 = THIRD if "clip_g" in parts else SECOND
        component = t5 if part in _T5 else _COMPONENTS.get(part) or _encoder(tensor, "")
        if component in found:
            problem = f"the vectors of {component} are there twice"
            raise AdapterError(problem, where=f"tensor {part!r}", allowed="once", remedy=_AGAIN)
        found[component] = tensor
    return found


def _encoder(tensor: Tensor, component: str) -> str:
    return component or (SECOND if tensor.shape[-1:] == (_WIDTH_OF_SECOND,) else FIRST)
