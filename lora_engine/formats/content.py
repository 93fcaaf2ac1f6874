"""Identifies what an adapter does, whatever the format, the header or the container of its file.

`content_of` gives digests, which are equal for equal content, and a sketch, whose cosine shows similar content.

The digest of a module is the SHA-256 of its kind in export form, of alpha, and of each factor: name, shape without
trailing ones, values as little-endian float32 (float64 if float32 cannot hold them). A LoRA has no alpha there: its
scale is folded into `up`, as formats without alpha do. The digest of the adapter is the SHA-256 of all canonical module
names with the digests of their modules, without modules of no effect. Base, card and dtype are not part of it.

The sketch is a random projection (Johnson and Lindenstrauss 1984) of the weight differences to `SIZE` numbers. Each
module is multiplied from both sides by `PROBES` pairs of random signs. The signs are output of SHAKE-128 (FIPS 202), so
they are the same on every machine and in every release.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import shake_128
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_engine.adapters import Delta, DoraDelta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats.embeddings import Embedding
from lora_engine.formats.transformers.names import folded_lora

if TYPE_CHECKING:
    from lora_engine.formats.files import Bundle

SIZE = 256
"""Numbers of a sketch. The cosine of unrelated contents has a standard deviation of at most 1/8."""
PROBES = 64
_BLOCK = 4096
_SLOTS = SIZE // PROBES


@dataclass(frozen=True)
class AdapterContent:
    """What an adapter file holds, without its container.

    Attributes:
        deltas: Digest of all modules; None if no module has an effect.
        embeddings: Digests of the learned tokens' vectors, whatever the tokens are called; sorted.
        sketch: `SIZE` numbers, of norm 1; None if there is nothing to project.
    """

    deltas: str | None
    embeddings: tuple[str, ...] = ()
    sketch: tuple[float, ...] | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Returns digest -> `deltas` or `embedding`."""
        own = {self.deltas: "deltas"} if self.deltas else {}
        return {**dict.fromkeys(self.embeddings, "embedding"), **own}


def content_of(bundle: Bundle) -> AdapterContent:
    """Returns the digests and the sketch of what an adapter file holds."""
    modules = {name: _plain(delta) for name, delta in bundle.adapter.modules.items()}
    effective = {name: delta for name, delta in modules.items() if not _is_zero(delta)}
    digests = [[name, sha256_bytes(b"\0".join(_parts(delta)))] for name, delta in sorted(effective.items())]
    return AdapterContent(
        sha256_bytes(canonical_json(digests)) if digests else None,
        tuple(sorted({_embedding_digest(embedding) for embedding in bundle.embeddings})),
        _sketch(effective, () if effective else bundle.embeddings),
    )


def similarity(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the absolute cosine of two sketches, 0 to 1; a change of scale or sign leaves it at 1."""
    return min(1.0, abs(math.fsum(a * b for a, b in zip(first, second, strict=True))))


def _plain(delta: Delta) -> Delta:
    """Returns a delta in export form, with the scale of a LoRA, or of the one in a DoRA, in its factor `up`."""
    plain = delta.to_export()
    try:
        if isinstance(plain, LoraDelta):
            return folded_lora("", plain)
        if isinstance(plain, DoraDelta) and isinstance(plain.inner, LoraDelta):
            return plain.with_inner(folded_lora("", plain.inner))
    except AdapterError:  # the scaled factor overflows its dtype; no format without alpha can hold it
        pass
    return plain


def _is_zero(delta: Delta) -> bool:
    if not isinstance(delta, LoraDelta) or delta.bias is not None:
        return False
    return delta.alpha == 0 or not bool(delta.up.any()) or not bool(delta.down.any())


def _parts(delta: Delta) -> Iterator[bytes]:
    scale = getattr(delta, "inner", delta)
    is_folded = isinstance(scale, LoraDelta) and scale.scale == 1.0
    yield f"{delta.kind}:{None if is_folded or delta.alpha is None else float(delta.alpha)!r}".encode()
    for name, factor in sorted(delta.factors().items()):
        yield from _tensor_parts(name, factor)


def _tensor_parts(name: str, tensor: Tensor) -> Iterator[bytes]:
    plain = tensor.detach().cpu()
    values = plain.float()
    if plain.dtype == torch.float64 and not torch.equal(values.double(), plain):
        values = plain
    shape = list(plain.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    yield f"{name}:{shape}".encode()
    # Adding 0 turns -0 into 0.
    yield (values + 0.0).contiguous().numpy().astype(values.numpy().dtype.newbyteorder("<")).tobytes()


def _embedding_digest(embedding: Embedding) -> str:
    parts = [part for name, vectors in sorted(embedding.vectors.items()) for part in _tensor_parts(name, vectors)]
    return sha256_bytes(b"\0".join([b"embedding", *parts]))


def _sketch(modules: Mapping[str, Delta], embeddings: Sequence[Embedding]) -> tuple[float, ...] | None:
    total = torch.zeros(SIZE, dtype=torch.float64)
    for name, delta in modules.items():
        for key, up, down in _matrices(delta):
            signs, places = _assignment(f"{name}\0{key}")
            left = _probes("outputs", up.shape[0])
            values = (left @ up.float()) * (_probes("inputs", down.shape[1]) @ down.float().T)
            total.index_add_(0, places, signs * values.sum(dim=1).double())
    for embedding in embeddings:
        for key, vectors in embedding.vectors.items():
            signs, places = _assignment(f"embedding\0{key}")
            values = (_probes("outputs", len(vectors)) @ vectors.float()) * _probes("inputs", vectors.shape[1])
            total.index_add_(0, places, signs * values.sum(dim=1).double())
    norm = float(total.norm())
    return tuple((total / norm).tolist()) if norm > 0 and math.isfinite(norm) else None


def _matrices(delta: Delta) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields key, `[out, r]` and `[r, in]` of the products whose sum is the difference.

    Of kinds that depend on the base, the factors themselves are used, and of DoRA the inner delta.
    """
    inner = delta.inner if isinstance(delta, DoraDelta) else delta
    with torch.no_grad():
        if isinstance(inner, LoraDelta):
            plain = inner.without_core()
            yield "", plain.up.flatten(1).float() * plain.scale, plain.down.flatten(1)
        elif not inner.reads_base and inner.weight_shape is not None:
            dense = inner.delta_weight(torch.zeros(()).expand(inner.weight_shape)).reshape(inner.weight_shape[0], -1)
            # the shorter side is the inner dimension
            eye = torch.eye(min(dense.shape))
            yield ("", dense, eye) if dense.shape[1] <= dense.shape[0] else ("", eye, dense)
        else:
            for name, factor in sorted(inner.factors().items()):
                yield name, torch.ones(1, 1), factor.reshape(1, -1)


@lru_cache(maxsize=256)
def _probes(side: str, length: int) -> Tensor:
    """Returns random signs, `[PROBES, length]` float32; those of a smaller length are the first columns."""
    blocks = [_block(side, index) for index in range(-(-length // _BLOCK))]
    return torch.cat(blocks, dim=1)[:, :length]


@cache
def _block(side: str, index: int) -> Tensor:
    stream = shake_128(f"loraline sketch {side} {index}".encode()).digest(PROBES * _BLOCK // 8)
    octets = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (bits.reshape(PROBES, _BLOCK).float() * 2) - 1


def _assignment(key: str) -> tuple[Tensor, Tensor]:
    """Returns sign and place in the sketch of each probe of a module."""
    octets = shake_128(f"loraline sketch of {key}".encode()).digest(PROBES)
    signs = torch.tensor([1.0 if octet & 128 else -1.0 for octet in octets], dtype=torch.float64)
    return signs, torch.tensor([index * _SLOTS + octet % _SLOTS for index, octet in enumerate(octets)])
