"""Mutators of safetensors files: of the header as it is written, and of tensors, with a header that fits."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.mutate_bytes import MAX_SIZE, PIECES, mutate_bytes, mutate_text
from tests.fuzz.mutate_tree import mutate_tree

_TYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.uint8,
}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
_SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 65504.0, 65520.0, 3e38, 1e308, math.nan, math.inf, 257.0, 1e-8)
_SUFFIXES = (
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora.up.weight"),
    *("alpha", "scale", "dora_scale", "lora_magnitude_vector", "diff", "diff_b", "bias", "weight", "on_input"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_t2", "lokr_rows"),
    *("oft_blocks", "oft_diag", "oft_R.weight", "boft_R", "boft_s", "ia3_l", "reshape_weight", "a1.weight", "rescale"),
    *("lora_embedding_A", "lora_embedding_B", "set_weight", "w_norm", "b_norm", "default.lora_A.weight"),
)
_PREFIXES = (
    *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "unet.", "text_encoder.", "text_encoder_2."),
    *("transformer.", "base_model.model.", "base_model.model.unet.", "diffusion_model.", "lycoris_", "bundle_emb."),
    *("model.diffusion_model.", "oft_unet_", "lora_prior_unet_", "base_model.model.base_model.model.", "module."),
)
_KEYS = (
    *(
        "loraline.base",
        "loraline.card",
        "loraline.component",
        "loraline.token",
        "loraline.fingerprint",
        "ss_network_args",
    ),
    *("ss_network_alpha", "ss_network_dim", "ss_network_module", "ss_base_model_version", "modelspec.architecture"),
    *("lora_adapter_metadata", "networkAlphaMap", "format", "alpha", "rank", "sshs_model_hash", "zorb", "lora_config"),
)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def values(self) -> Any:
        """Returns the numbers; of a dtype that numpy lacks, the integers of its size."""
        kind = _TYPES.get(self.dtype) or (np.uint16 if _SIZES[self.dtype] == 2 else np.uint8)
        return np.frombuffer(self.content, dtype=kind).copy()


Weights = tuple[dict[str, Entry], dict[str, str]]
"""Tensors and metadata."""


def mutate_weights(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns a changed file."""
    action = random.choice(("bytes", "header", "text", *("tensors",) * 6))
    try:
        if action == "tensors":
            return encode(_mutate_tensors(decode(content), [*map(_decoded, others)], random))
        length = struct.unpack("<Q", content[:8])[0]
        header, body = content[8 : 8 + length], content[8 + length :]
        if action == "header":
            changed = json.dumps(mutate_tree(json.loads(header), random)).encode()
        elif action == "text":
            changed = mutate_text(header, (), random)
        else:
            return mutate_bytes(content, others, random)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return mutate_bytes(content, others, random)
    return struct.pack("<Q", len(changed)) + changed + body


def decode(content: bytes) -> Weights:
    """Returns the tensors and the metadata of a valid file; any exception of an invalid one."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata, body = header.pop("__metadata__", None) or {}, content[8 + length :]
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }, metadata


def encode(weights: Weights) -> bytes:
    """Returns the file of tensors and metadata, in the order that they have."""
    tensors, metadata = weights
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, entry in tensors.items():
        end = offset + len(entry.content)
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(entry.content for entry in tensors.values())


def _decoded(content: bytes) -> Weights:
    try:
        return decode(content)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return {}, {}


def _mutate_tensors(weights: Weights, others: Sequence[Weights], random: Random) -> Weights:
    tensors, metadata = dict(weights[0]), dict(weights[1])
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        kind = random.random()
        if kind < 0.2:
            _change_metadata(metadata, random)
        elif kind < 0.55 and tensors:
            tensors = _change_names(tensors, others, random)
        elif tensors:
            name = random.choice(list(tensors))
            tensors[name] = random.choice(_CHANGES)(tensors[name], random)
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _change_metadata(metadata: dict[str, str], random: Random) -> None:
    key = random.choice((*metadata, *_KEYS))
    value = metadata.get(key, "")
    choice = random.random()
    if choice < 0.2:
        metadata.pop(key, None)
    elif choice < 0.5:
        metadata[key] = random.choice((*PIECES, "sd", "sdxl", "flux", "1.0", "1e999", "{}", "[]", "4", "<embed>"))
    elif value.startswith(("{", "[")):
        try:
            metadata[key] = json.dumps(mutate_tree(json.loads(value), random))
        except ValueError:
            metadata[key] = value[:-1]
    else:
        metadata[key] = mutate_text(value.encode("utf-8", "replace"), (), random).decode("utf-8", "replace")


def _change_names(tensors: dict[str, Entry], others: Sequence[Weights], random: Random) -> dict[str, Entry]:
    """Returns the tensors after one is renamed, removed or copied, or all get another prefix."""
    name = random.choice(list(tensors))
    action = random.choice(("delete", "rename", "rename", "copy", "prefix", "other", "module", "many"))
    if action == "delete":
        return {key: entry for key, entry in tensors.items() if key != name}
    if action == "other":
        return tensors | random.choice([weights[0] for weights in others] or [{}])
    if action == "prefix":
        old, new = random.choice((*_PREFIXES, "")), random.choice((*_PREFIXES, ""))
        return {new + key.removeprefix(old): entry for key, entry in tensors.items()}
    if action == "many":
        copies = min(random.choice((3, 300)), MAX_SIZE // 64 // (len(tensors[name].content) + len(name) + 1))
        return tensors | {re.sub(r"\d+", str(n), name, count=1): tensors[name] for n in range(copies)}
    module, new = name.rpartition(".")[0], _renamed(name, random)
    if action == "module" and module:
        return {key.replace(module, new): entry for key, entry in tensors.items()}
    kept = tensors if action == "copy" else {key: entry for key, entry in tensors.items() if key != name}
    return kept | {new: tensors[name]}


def _renamed(name: str, random: Random) -> str:
    match random.randrange(6):
        case 0:
            return f"{name.rpartition('.')[0]}.{random.choice(_SUFFIXES)}"
        case 1:
            return random.choice(_PREFIXES) + name
        case 2:
            return re.sub(r"\d+", lambda _: str(random.choice((0, 1, 99, 10**9, 10**18))), name, count=1)
        case 3:
            return name.replace(".", "_") if random.random() < 0.5 else name.replace("_", ".")
        case 4:
            place = random.randrange(len(name) + 1)
            return name[:place] + random.choice(PIECES) + name[place:]
        case _:
            parts = name.split(".")
            parts[random.randrange(len(parts))] = random.choice((*parts, "", "unet", "0", "weight"))
            return ".".join(parts)


def _with_values(entry: Entry, values: Any, shape: Sequence[int] | None = None) -> Entry:
    return replace(entry, content=values.tobytes(), shape=tuple(values.shape if shape is None else shape))


def _set_values(entry: Entry, random: Random) -> Entry:
    values = entry.values()
    if values.size:
        with np.errstate(all="ignore"):
            special = random.choice(_SPECIAL)
            new = np.asarray(special if entry.dtype.startswith("F") else random.choice((0, 1, 127)))
            values[random.choice((slice(None), random.randrange(values.size)))] = new.astype(values.dtype)
    return _with_values(entry, values, entry.shape)


def _scale_values(entry: Entry, random: Random) -> Entry:
    if entry.dtype not in ("F64", "F32", "F16"):
        return entry
    with np.errstate(all="ignore"):
        values = entry.values() * np.asarray(random.choice((1e4, 1e18, 1e-18, 0.0)), dtype=_TYPES[entry.dtype])
    return _with_values(entry, values, entry.shape)


def _reshape(entry: Entry, random: Random) -> Entry:
    count = math.prod(entry.shape)
    shapes = [(count,), (1, count), (count, 1), (*entry.shape, 1), (1, *entry.shape), tuple(reversed(entry.shape))]
    if count % 2 == 0 and count:
        shapes += [(2, count // 2), (count // 2, 2), (count // 2, 2, 1, 1)]
    if count == 1:
        shapes += [(), (1,) * 6]
    return replace(entry, shape=random.choice(shapes))


def _resize(entry: Entry, random: Random) -> Entry:
    """Cuts or repeats along one dimension; makes an empty tensor with a huge dimension."""
    if not entry.shape or math.prod(entry.shape) == 0 or entry.dtype not in _SIZES:
        return entry
    if random.random() < 0.15:
        return replace(entry, shape=random.choice(((0,), (0, 1 << 40), (1 << 62, 0), (0, *entry.shape))), content=b"")
    kind = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}[_SIZES[entry.dtype]]
    values = np.frombuffer(entry.content, dtype=kind).reshape(entry.shape)
    axis = random.randrange(len(entry.shape))
    size = random.choice((1, 2, 3, 4, values.shape[axis] - 1, values.shape[axis] + 1, values.shape[axis] * 2, 40)) or 1
    size = min(size, MAX_SIZE // 4 * values.shape[axis] // max(1, values.nbytes)) or 1
    return _with_values(entry, np.take(values, np.arange(size) % values.shape[axis], axis=axis))


def _cast(entry: Entry, random: Random) -> Entry:
    """Gives another dtype: of the same size, with the same bytes, or another one, with the same values."""
    if random.random() < 0.4 and entry.dtype in _SIZES:
        same = [name for name, size in _SIZES.items() if size == _SIZES[entry.dtype]]
        return replace(entry, dtype=random.choice(same))
    if entry.dtype not in _TYPES:
        return entry
    new = random.choice(list(_TYPES))
    with np.errstate(all="ignore"):
        return replace(entry, dtype=new, content=np.nan_to_num(entry.values()).astype(_TYPES[new]).tobytes())


def _make_scalar(entry: Entry, random: Random) -> Entry:
    with np.errstate(all="ignore"):
        return Entry("F32", random.choice(((), (1,))), np.float32(random.choice((*_SPECIAL, 4.0, 1e9))).tobytes())


_CHANGES: tuple[Callable[[Entry, Random], Entry], ...] = (
    *(_set_values, _set_values, _scale_values, _reshape, _resize, _resize, _cast, _make_scalar),
)
