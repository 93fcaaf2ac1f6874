"""Past findings, each with the input that showed it, built by code: target, input, and what it must say now."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lora_engine.files import canonical_json
from lora_engine.formats.safetensors_io import serialize
from tests.fuzz.files import Files, as_text

_MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_FLAT = _MODULE.replace(".", "_")


@dataclass(frozen=True)
class Case:
    """One finding.

    Attributes:
        target: The target that it concerns.
        build: Returns the input.
        refusal: Pattern of the refusal; empty if the input must be accepted.
    """

    target: str
    build: Callable[[], Files]
    refusal: str = ""


def _peft(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, object], header: Mapping[str, str] | None = None
) -> Files:
    weights = b"".join(bytes(part) for part in serialize(tensors, header or {}))
    return {"adapter_model.safetensors": weights, "adapter_config.json": json.dumps(config).encode()}


def _oft(**settings: object) -> Files:
    """Returns a PEFT folder with rotations, whose configuration chooses the number of terms of their series."""
    config = {"peft_type": "OFT", "peft_version": "0.19.0", "oft_block_size": 3, "use_cayley_neumann": True} | settings
    return _peft({f"base_model.model.{_MODULE}.oft_R.weight": torch.ones(2, 3) / 10}, config)


def _lora(prefix: str, *, folder: str = "", header: Mapping[str, str] | None = None) -> Files:
    """Returns a PEFT folder with one matrix."""
    tensors = {f"{prefix}{_MODULE}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    files = _peft(tensors, {"peft_type": "LORA", "lora_alpha": 1}, header)
    return {f"{folder}{name}": content for name, content in files.items()}


def _stored(header: Mapping[str, str], component: str = "unet") -> Files:
    """Returns an adapter in the store's format, with one matrix."""
    names = (f"{component}.{_MODULE}.lora_{part}.weight" for part in ("down", "up"))
    tensors = {name: torch.ones(2, 2) for name in names} | {f"{component}.{_MODULE}.alpha": torch.tensor(2.0)}
    return {"adapter.safetensors": b"".join(bytes(part) for part in serialize(tensors, header))}


def _kohya(more: Mapping[str, torch.Tensor]) -> Files:
    """Returns a file of kohya's with one matrix and other tensors."""
    tensors = {f"lora_unet_{_FLAT}.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    header = {"loraline.base": "sd"}
    return {"adapter.safetensors": b"".join(bytes(part) for part in serialize({**tensors, **more}, header))}


def _embedding(token: str) -> Files:
    """Returns a file of kohya's with one learned token."""
    parts = serialize({"emb_params": torch.ones(2, 4)}, {"loraline.token": token})
    return {"zorb.safetensors": b"".join(map(bytes, parts))}


def _patterns() -> Files:
    """Returns a PEFT folder with an alpha for each of many modules, which was compared with each module."""
    names = [f"down_blocks.{n}.attentions.0.to_q" for n in range(300)]
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(1, 2)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(2, 1)
    patterns = {f"^{name}": float(n + 1) for n, name in enumerate(reversed(names))}
    return _peft(tensors, {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": patterns})


def _broken_exif() -> Files:
    """Returns an image whose EXIF names data beyond its end, for which Pillow warns."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9286: b"ASCII\0\0\0Steps: 3"}
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG", exif=exif)
    return {
        "0.jpg": buffer.getvalue().replace(struct.pack(">HHI", 0x9286, 7, 16), struct.pack(">HHI", 0x9286, 7, 1 << 24))
    }


def _absolute_export() -> Files:
    """Returns a folder whose statement of the export, which no signature covers, has a path outside of the folder."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "predicate": {"adapter": {"sha256": "0" * 64}, "version": ""},
        "predicateType": "urn:loraline:export:v1",
        "subject": [{"digest": {"sha256": "0" * 64}, "name": "/etc/hostname"}],
    }
    return {
        "out/records/exported.json": canonical_json(statement),
        "out/records/signature.json": b"{}",
        "release.pub": ec.derive_private_key(7, ec.SECP256R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }


FINDINGS: Mapping[str, Case] = {
    "a number of 60,000 digits in a prompt": Case("prompts", lambda: as_text("(a:" + "9" * 60_000)),
    "many pieces of one weight": Case("prompts", lambda: as_text("a:" * 60_000)),
    "60,000 open brackets": Case("prompts", lambda: as_text("(a" * 30_000), "more than 100 open brackets"),
    "60,000 spaces in a prompt": Case("prompts", lambda: as_text("a" + " " * 60_000 + "!")),
    "20,000 weights of another program before a bracket": Case("prompts", lambda: as_text(" 1::a:" * 20_000 + "]")),
    "60,000 spaces in an infotext": Case("infotexts", lambda: as_text("a" + " " * 60_000 + "!")),
    "a word of 250,000 characters in a script": Case(
        "trainers", lambda: {"run.sh": b"train" * 50_000}, "starts no training script"
    ),
    "a script that repeats a long variable": Case(
        "trainers",
        lambda: {"run.sh": b"A=" + b"a" * 400_000 + b"\npython train.py" + b" $A" * 15_000},
        "the values of its variables are too long",
    ),
    "120,000 quotes without an end beside a surrogate": Case(
        "indices", lambda: {"model_index.json": b'"\\ud800' + b'\\"' * 120_000}, "not JSON"
    ),
    "a statement of an export that names a file by its absolute path": Case("signed", _absolute_export, "unknown form"),
    "a control character in a key": Case("policies", lambda: {"policy.yaml": '"a\u202eb\x1b": 1'.encode()}, "not YAML"),
    "a direction character in a key": Case("policies", lambda: {"policy.yaml": b'"a\\u202Eb": 1'}, r"\\u202e"),
    "a control character in a name of --set": Case("set", lambda: as_text("ada\x1bpter.rank=[\t"), r"\\x1b"),
    "a tag of 40,000 characters": Case(
        "prompts", lambda: as_text(f"<lora:{'x' * 40_000}:y>"), r"^character 1: tag '<lora:x{74}': 'y' "
    ),
    "a value of 35,000 characters": Case("pipelines", lambda: {"line.yaml": b"name: " + b"x-" * 17_000}, r" \.\.\. "),
    "EXIF beyond the end of the file": Case("images", _broken_exif),
    "a series of 10**9 terms": Case("folders", lambda: _oft(num_cayley_neumann_terms=10**9), "terms.*0 .exact. to 100"),
    "a series of -3 terms": Case("folders", lambda: _oft(num_cayley_neumann_terms=-3), "terms.*0 .exact. to 100"),
    "a component of no base in the header": Case(
        "folders", lambda: _lora("base_model.model.", header={"loraline.component": "vae"}), "the component is 'vae'"
    ),
    "a component of no base as a folder": Case(
        "folders", lambda: _lora("base_model.model.", folder="x/"), "folder 'x': the component is 'x'"
    ),
    "an empty fingerprint": Case("adapters", lambda: _stored({"loraline.base": "sd", "loraline.fingerprint": ""})),
    "a transformer's module for a base with a U-Net": Case(
        "adapters", lambda: _stored({"loraline.base": "sd"}, "transformer"), "is of a transformer.*which has a U-Net"
    ),
    "PEFT's prefix after the component, too": Case(
        "folders", lambda: _lora("base_model.model.unet.base_model.model."), "PEFT's prefix in its name"
    ),
    "as many patterns as modules": Case("folders", _patterns),
    "a letter and its accent around a control character": Case(
        "captions", lambda: as_text("a\0\u0301"), "CaptionSettings"
    ),
    "a value of undecodable bytes": Case("set", lambda: as_text("\udcfe" * 4_000), r"\\udcfe.* \.\.\. "),
    "a set within a set": Case("patterns", lambda: as_text("re:[[a]"), "Possible nested set"),
    "a glob of 70,000 characters": Case("patterns", lambda: as_text("unet.[" * 12_000), "72,000 characters"),
    **{
        f"a path of 5,000 characters as {field}": Case(
            "pipelines",
            lambda line=line: {"line.yaml": f"name: a\nbase: tiny\n{line.replace('LONG', 'a' * 5000)}\n".encode()},
            refusal,
        )
        for field, line, refusal in (
            ("images", "steps: {s: {uses: ingest, images: LONG}}", "does not exist"),
            ("a base", "steps: {s: {uses: merge, adapters: [x@1], base: LONG}}", "neither a folder or file nor"),
            ("an extended file", "extends: LONG", "which is no file"),
            ("a matrix", "matrix: {file: LONG}\nsteps: {s: {uses: merge, adapters: [x@1]}}", "which is no file"),
        )
    },
    "the home of an unknown user as a base": Case(
        "pipelines",
        lambda: {"line.yaml": b"name: a\nbase: ~nobody-of-that-name/x\nsteps: {s: {uses: merge, adapters: [x@1]}}\n"},
        "neither a folder or file nor a hub id",
    ),
    "a token that is named like a text encoder": Case("embeddings", lambda: _embedding("text_encoder")),
    "a token with a dot": Case("embeddings", lambda: _embedding("a.b")),
    "a stated shape that is one number": Case(
        "adapters",
        lambda: _kohya({f"lora_unet_{_FLAT}.reshape_weight": torch.tensor(7.0)}),
        "'reshape_weight' is",
    ),
    "a stated shape that is not a number": Case(
        "adapters",
        lambda: _kohya({f"lora_unet_{_FLAT}.reshape_weight": torch.tensor([float("nan"), 2.0])}),
        "NaN|'reshape_weight' is",
    ),
    "a module of two denoisers": Case(
        "adapters",
        lambda: _stored({}, "transformer.unet"),
        "is of two denoisers, and no base has both",
    ),
    "a module with two components": Case("adapters", lambda: _stored({"loraline.base": "sd"}, "text_encoder.unet")),
}
"""What was wrong -> its case."""
