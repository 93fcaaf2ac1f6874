"""Builders of bad and odd adapter files, each with the expected result, in one literal table `CORPUS`.

Every test builds its files, because the repository must not hold hostile files.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

NAN, INF = float("nan"), float("inf")
Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
FLAT = "lora_unet_" + Q.removeprefix("unet.").replace(".", "_")
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
BASE = {Q: (4, 3), CONV: (5, 4, 3, 3), "unet.conv_norm_out": (4,)}
"""The base of cases with `named`."""
READ = ""
ROWS = {"lokr_w1": torch.ones(2, 3), "lokr_w2": torch.ones(4, 1)}
GLORA = {"b1.weight": torch.ones(4, 2), "b2.weight": torch.ones(2, 3)}


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        build: Creates the file or folder at a path.
        refusal: Pattern of the error message; empty if the file must be readable.
        named: True if it is read with `BASE`.
        file: Name of the file.
        dangerous: True if reading it might take much memory or time; a limited child process reads it.
        nightly: True if refusing it takes more than ten seconds.
    """

    build: Callable[[Path], None]
    refusal: str
    named: bool = False
    file: str = "a.safetensors"
    dangerous: bool = False
    nightly: bool = False


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def lora(
    module=Q, rank=2, out=4, inner=3, alpha=2.0, *, up="lora_up.weight", down="lora_down.weight", dtype=torch.float32
):
    tensors = {f"{module}.{down}": ones(rank, inner, dtype=dtype), f"{module}.{up}": ones(out, rank, dtype=dtype)}
    return tensors if alpha is None else tensors | {f"{module}.alpha": torch.tensor(alpha)}


def saved(tensors, metadata=None):
    return lambda path: save_file(tensors, path, metadata=metadata)


def changed(**factors):
    """Returns the builder of a valid LoRA with some tensors replaced; None omits one."""
    names = {
        "down": f"{Q}.lora_down.weight",
        "up": f"{Q}.lora_up.weight",
        "alpha": f"{Q}.alpha",
        "mid": f"{Q}.lora_mid.weight",
    }
    new = {names.get(key, f"{Q}.{key}"): tensor for key, tensor in factors.items()}
    return saved({key: tensor for key, tensor in (lora() | new).items() if tensor is not None})


def plus(name, tensor=None):
    return saved(lora() | {name: ones(1) if tensor is None else tensor})


def module(kind_tensors, where=Q):
    return saved({f"{where}.{suffix}": tensor for suffix, tensor in kind_tensors.items()})


def raw(content):
    return lambda path: path.write_bytes(content)


def header(entries, body=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return raw(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(start=0, end=4, shape=(1,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


class Canary:
    """Creates a folder `canary` in the working directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def pickled(protocol=2, *, zipped=False):
    def build(path):
        content = pickle.dumps(Canary(), protocol=protocol)
        if not zipped:
            path.write_bytes(content)
            return
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")

    return build


def zip_bomb(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(64):
            file.write(b"\0" * (1 << 20))


def sparse(size, content=b""):
    def build(path):
        path.write_bytes(content)
        os.truncate(path, size)

    return build


def many(count):
    def build(path):
        text = b"{%s}" % b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))
        header(text)(path)

    return build


def twin_names(count):
    return header(b"{%s}" % b",".join([b'"x":1'] * count))


def link(target):
    return lambda path: path.symlink_to(target)


def loop(path):
    path.symlink_to(path)


def linked_good(path):
    save_file(lora(), path.with_name("good.safetensors"))
    path.symlink_to(path.with_name("good.safetensors"))


def folder_of(*names, content=None):
    def build(path):
        path.mkdir()
        for name in names:
            save_file(lora() if content is None else content, path / name)

    return build


def peft(config, tensors=None, name="adapter_config.json"):
    def build(path):
        path.mkdir()
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (path / name).write_bytes(text)
        inside = lora(
            "base_model.model." + Q.removeprefix("unet."), alpha=None, up="lora_B.weight", down="lora_A.weight"
        )
        save_file(inside if tensors is None else tensors, path / "adapter_model.safetensors")

    return build


def metadata(**pairs):
    return saved(lora(), {key.replace("__", "."): value for key, value in pairs.items()})


def diffusers_file(config):
    tensors = lora(alpha=None, up="lora_B.weight", down="lora_A.weight")
    return saved(tensors, {"lora_adapter_metadata": config})


def good_bytes():
    from safetensors.torch import save

    return save(lora())


LOHA = {"hada_w1_a": ones(4, 2), "hada_w1_b": ones(2, 3), "hada_w2_a": ones(4, 2), "hada_w2_b": ones(2, 3)}
LOKR = {"lokr_w1": ones(2, 1), "lokr_w2": ones(2, 3)}
PARTS = {"lora_down.weight": ones(2, 3), "lora_up.weight": ones(4, 2)}
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
GOOD = good_bytes()
PICKLE = "can run code when it is read|cannot be read as tensors and plain values"

CORPUS: dict[str, Case] = {
    # Sound and odd.
    "good": Case(saved(lora()), READ),
    "good for the base": Case(saved(lora()), READ, named=True),
    "no alpha": Case(changed(alpha=None), READ, named=True),
    "alpha of one entry": Case(changed(alpha=ones(1)), READ),
    "alpha of one entry in two dimensions": Case(changed(alpha=ones(1, 1)), READ),
    "alpha of whole numbers": Case(changed(alpha=torch.tensor(2)), READ),
    "alpha in half": Case(changed(alpha=torch.tensor(2.0, dtype=torch.float16)), READ),
    "huge alpha": Case(changed(alpha=torch.tensor(1e30)), READ),
    "float16": Case(saved(lora(dtype=torch.float16)), READ),
    "bfloat16": Case(saved(lora(dtype=torch.bfloat16)), READ),
    "float64": Case(saved(lora(dtype=torch.float64)), READ),
    "factors of two dtypes": Case(changed(up=ones(4, 2, dtype=torch.float16)), READ, named=True),
    "rank above the width": Case(saved(lora(rank=50)), READ, named=True),
    "all zeros": Case(changed(up=torch.zeros(4, 2), down=torch.zeros(2, 3)), READ),
    "subnormal values": Case(changed(up=torch.full((4, 2), 1e-42)), READ),
    "largest values": Case(changed(up=torch.full((4, 2), 3e38)), READ),
    "linear factors as 1 x 1 convolutions": Case(changed(up=ones(4, 2, 1, 1), down=ones(2, 3, 1, 1)), READ, named=True),
    "a link": Case(linked_good, READ),
    "a folder with one file": Case(folder_of("x.safetensors"), READ, file="folder"),
    "a name in capitals": Case(saved(lora()), READ, file="A.SAFETENSORS"),
    "a name with spaces and quotes": Case(saved(lora()), READ, file='it\'s "one" $(x).safetensors'),
    "unknown metadata": Case(metadata(anything="\u00e9\u4e2d\x00"), READ),
    "ss_network_dim is wrong": Case(metadata(ss_network_dim="999", ss_network_alpha="nan"), READ),
    "diffusers' keys": Case(saved(lora(alpha=None, up="lora_B.weight", down="lora_A.weight")), READ),
    "diffusers' old keys": Case(saved(lora(alpha=None, up="lora.up.weight", down="lora.down.weight")), READ),
    "kohya for the base": Case(saved(lora(FLAT)), READ, named=True),
    "FLUX in kohya's names": Case(saved(lora(QKV, out=9216, inner=3072)), READ),
    "PEFT folder": Case(peft(PEFT), READ, file="unet"),
    "padded header": Case(
        raw(
            struct.pack("<Q", struct.unpack("<Q", GOOD[:8])[0] + 8)
            + GOOD[8 : 8 + struct.unpack("<Q", GOOD[:8])[0]]
            + b" " * 8
            + GOOD[8 + struct.unpack("<Q", GOOD[:8])[0] :]
        ),
        READ,
    ),
    # Bytes.
    "empty file": Case(raw(b""), "truncated"),
    "one byte": Case(raw(b"\x08"), "truncated"),
    "eight bytes": Case(raw(b"\0" * 8), "truncated|broken"),
    "zeros": Case(raw(b"\0" * 4096), "broken"),
    "text": Case(raw(b"this is no safetensors file at all, only a sentence"), "no safetensors file"),
    "a page instead of the file": Case(raw(b"<!DOCTYPE html><html>404 Not Found</html>" * 9), "no safetensors file"),
    "a pointer of git-lfs": Case(
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64), "no safetensors"
    ),
    "a gzip": Case(raw(b"\x1f\x8b\x08\x00" + b"\0" * 64), "truncated|no safetensors"),
    "an executable": Case(raw(b"\x7fELF" + b"\0" * 200), "truncated|broken|no safetensors"),
    "truncated in the header": Case(raw(GOOD[:40]), "truncated"),
    "truncated in the body": Case(raw(GOOD[:-4]), "cannot be read"),
    "bytes after the end": Case(raw(GOOD + b"\0" * 8), "cannot be read"),
    "twice in one file": Case(raw(GOOD + GOOD), "cannot be read"),
    "header beyond the end": Case(header(b"{}", length=1 << 40), "claims"),
    "header of all ones": Case(header(b"{}", length=(1 << 64) - 1), "claims"),
    "header at the limit, not there": Case(header(b"{}", length=99_999_999), "claims"),
    "header of nothing": Case(header(b""), "truncated|broken"),
    # JSON.
    "no JSON": Case(header(b"{not json}"), "header is broken"),
    "not UTF-8": Case(header(b"\xff\xfe{}"), "header is broken"),
    "a lone surrogate": Case(
        header(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), b"\0" * 4), "invalid|cannot be read|broken"
    ),
    "deep lists": Case(header(b"[" * 100_000), "header is broken"),
    "deep objects": Case(header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "header is broken", dangerous=True),
    "deep inside an entry": Case(
        header(b'{"x":{"shape":' + b"[" * 50_000 + b"]" * 50_000 + b"}}"), "header is broken", dangerous=True
    ),
    "a list": Case(header([1, 2]), "not a JSON object"),
    "a number": Case(header(b"1"), "not a JSON object"),
    "null": Case(header(b"null"), "not a JSON object"),
    "an entry that is a string": Case(header({"x": "y"}, b"\0" * 4), "cannot be read"),
    "an entry without offsets": Case(header({"x": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "cannot be read"),
    "an entry without a shape": Case(
        header({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4), "cannot be read"
    ),
    "a name twice": Case(header(b'{"x":1,"x":2}'), "duplicate key"),
    "a million names twice": Case(twin_names(1_000_000), "duplicate key", dangerous=True),
    "a number of a million digits": Case(
        header(b'{"x":{"shape":[' + b"9" * 1_000_000 + b"]}}"), "broken|cannot be read", dangerous=True
    ),
    "infinity in the header": Case(
        header(b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', b"\0" * 4), "broken|cannot be read"
    ),
    "metadata of numbers": Case(
        header({"__metadata__": {"a": 1}, "x": entry()}, b"\0" * 4), "metadata are not strings"
    ),
    "metadata a list": Case(header({"__metadata__": ["a"], "x": entry()}, b"\0" * 4), "metadata are not strings"),
    "metadata nested": Case(
        header({"__metadata__": {"a": {"b": "c"}}, "x": entry()}, b"\0" * 4), "metadata are not strings"
    ),
    "metadata a string": Case(header({"__metadata__": "a", "x": entry()}, b"\0" * 4), "metadata are not strings"),
    # Offsets, shapes, dtypes.
    "overlapping tensors": Case(header({"x": entry(), "y": entry(2, 6)}, b"\0" * 6), "cannot be read"),
    "one body for two tensors": Case(header({"x": entry(), "y": entry()}, b"\0" * 4), "cannot be read"),
    "a hole": Case(header({"x": entry(), "y": entry(8, 12)}, b"\0" * 12), "cannot be read"),
    "a hole at the start": Case(header({"x": entry(4, 8)}, b"\0" * 8), "cannot be read"),
    "negative offsets": Case(header({"x": entry(-4, 0)}, b"\0" * 4), "cannot be read"),
    "offsets in reverse": Case(header({"x": entry(4, 0)}, b"\0" * 4), "cannot be read"),
    "offsets beyond the end": Case(
        header({"x": entry(0, 1 << 50, (1 << 48,))}, b"\0" * 4), "cannot be read", dangerous=True
    ),
    "offsets of halves": Case(header({"x": entry(0, 3.5)}, b"\0" * 4), "cannot be read"),
    "shape against size": Case(header({"x": entry(shape=(7,))}, b"\0" * 4), "cannot be read"),
    "negative shape": Case(header({"x": entry(shape=(-1,))}, b"\0" * 4), "cannot be read"),
    "overflowing shape": Case(
        header({"x": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 4), "cannot be read", dangerous=True
    ),
    "huge claim": Case(header({"x": entry(0, 1 << 44, (1 << 42,))}, b"\0" * 4), "cannot be read", dangerous=True),
    "a thousand dimensions": Case(header({"x": entry(shape=(1,) * 1000)}, b"\0" * 4), ".", dangerous=True),
    "unknown dtype": Case(header({"x": entry(dtype="F3")}, b"\0" * 4), "cannot be read"),
    "dtype a number": Case(header({"x": entry(dtype=1)}, b"\0" * 4), "cannot be read"),
    "int factors": Case(changed(up=ones(4, 2, dtype=torch.int64)), "int64"),
    "uint8 factors": Case(changed(up=ones(4, 2, dtype=torch.uint8)), "uint8"),
    "bool factors": Case(changed(up=ones(4, 2, dtype=torch.bool)), "torch.bool"),
    # Names.
    "a path": Case(plus("../../etc/passwd"), "no slash"),
    "an absolute path": Case(plus("/etc/passwd"), "no slash"),
    "a path of Windows": Case(plus("..\\x"), "no slash"),
    "an empty name": Case(header({"": entry()}, b"\0" * 4), "invalid tensor name"),
    "control characters": Case(plus("unet.a\x1b[2J.lora_down.weight"), "printable"),
    "a NUL": Case(plus("unet.a\x00"), "printable"),
    "a line break": Case(plus("unet.a\nb"), "printable"),
    "right to left": Case(plus("unet.\u202ea"), "printable"),
    "no width": Case(plus("unet.\u200ba"), "printable"),
    "a long name": Case(plus("unet." + "a" * 600), "1 to 512"),
    "dots alone": Case(plus("...."), "invalid|double dot"),
    "an unknown tensor": Case(plus("unet.weight"), "no factor"),
    "unknown tensors alone": Case(saved({"weight": ones(2, 2)}), "unknown adapter format"),
    "letters of another alphabet": Case(plus(Q.replace("a", "\u0430") + ".lora_up.weight"), "lora_down.weight"),
    "no tensors": Case(saved({}), "no tensors"),
    "metadata alone": Case(saved({}, {"a": "b"}), "no tensors"),
    # Factors.
    "orphan down": Case(changed(up=None), "no 'lora_up.weight'"),
    "orphan up": Case(changed(down=None), "no 'lora_down.weight'"),
    "orphan alpha": Case(plus("unet.other.alpha", torch.tensor(1.0)), "other.alpha"),
    "alpha alone": Case(changed(up=None, down=None), "adapter format"),
    "ranks disagree": Case(changed(up=ones(4, 3)), "rank"),
    "up and down exchanged": Case(changed(up=ones(2, 4), down=ones(3, 2)), "rank"),
    "one dimension": Case(changed(down=ones(2)), "2 or 4 dimensions"),
    "three dimensions": Case(changed(down=ones(2, 3, 1)), "2 or 4 dimensions"),
    "five dimensions": Case(changed(down=ones(2, 3, 1, 1, 1)), "2 or 4 dimensions"),
    "factors without dimension": Case(changed(down=torch.tensor(1.0), up=torch.tensor(1.0)), "2 or 4 dimensions"),
    "rank 0": Case(changed(down=ones(0, 3), up=ones(4, 0)), "none empty"),
    "no rows": Case(changed(up=ones(0, 2)), "none empty"),
    "NaN": Case(changed(up=torch.full((4, 2), NAN)), "8 of 8 values are NaN"),
    "one NaN": Case(changed(up=torch.tensor([[1, 1], [1, NAN], [1, 1], [1, 1]])), "1 of 8 values"),
    "infinity": Case(changed(down=torch.full((2, 3), INF)), "6 of 6 values"),
    "minus infinity in half": Case(changed(down=torch.full((2, 3), -INF, dtype=torch.float16)), "6 of 6 values"),
    "two keys for a factor": Case(
        saved(lora() | lora(alpha=None, up="lora_B.weight", down="lora_A.weight")),
        "twice|two keys|no factor|together",
    ),
    "half of each key layout": Case(saved({f"{Q}.lora_A.weight": ones(2, 3), f"{Q}.lora_up.weight": ones(4, 2)}), "."),
    "a core of another rank": Case(changed(mid=ones(3, 3, 3, 3)), r"\[2, 2, k, k\]"),
    "a core of two dimensions": Case(changed(mid=ones(2, 2)), r"\[2, 2, k, k\]"),
    "a kernel's core on a linear layer": Case(changed(mid=ones(2, 2, 3, 3)), ".", named=True),
    # Alpha.
    "alpha NaN": Case(changed(alpha=torch.tensor(NAN)), "NaN"),
    "alpha infinite": Case(changed(alpha=torch.tensor(INF)), "infinite"),
    "alpha negative": Case(changed(alpha=torch.tensor(-1.0)), READ),
    "alpha zero": Case(changed(alpha=torch.tensor(0.0)), READ),
    "alpha a vector": Case(changed(alpha=ones(2)), "one number"),
    "alpha empty": Case(changed(alpha=ones(0)), "one number"),
    "alpha a matrix": Case(changed(alpha=ones(4, 2)), "one number"),
    # Against the base.
    "columns of another base": Case(saved(lora(inner=5)), "for the base's weight", named=True),
    "rows of another base": Case(saved(lora(out=5)), "for the base's weight", named=True),
    "a kernel on a linear layer": Case(
        changed(down=ones(2, 3, 3, 3), up=ones(4, 2, 1, 1)), "for the base's weight", named=True
    ),
    "a linear layer on a kernel": Case(saved(lora(CONV, out=5, inner=4)), "for the base's weight", named=True),
    "a module that the base lacks": Case(saved(lora("unet.nowhere")), "no module", named=True),
    "kohya's module that the base lacks": Case(saved(lora("lora_unet_nowhere")), "base", named=True),
    "a text encoder that the base lacks": Case(saved(lora("text_encoder_9.x")), "base|format", named=True),
    "a norm of low rank": Case(saved(lora("unet.conv_norm_out")), ".", named=True),
    "the same module in two names": Case(
        saved(lora(FLAT) | lora(FLAT.replace("down_blocks_0_attentions_0", "input_blocks_1_1"))), "twice", named=True
    ),
    "FLUX for Stable Diffusion": Case(saved(lora(QKV, out=9216, inner=3072)), "base has no module", named=True),
    # Other kinds.
    "LoHa": Case(module(LOHA), READ, named=True),
    "LoHa without a factor": Case(module({k: v for k, v in LOHA.items() if k != "hada_w2_b"}), "hada_w2_b"),
    "LoHa of two ranks": Case(module(LOHA | {"hada_w2_a": ones(4, 3)}), "rank|shape"),
    "LoHa of two sizes": Case(module(LOHA | {"hada_w2_a": ones(5, 2)}), "shape"),
    "LoHa with one core": Case(module(LOHA | {"hada_t1": ones(2, 2, 3, 3)}), "."),
    "LoHa with NaN": Case(module(LOHA | {"hada_w2_a": torch.full((4, 2), NAN)}), "NaN"),
    "LoHa for another base": Case(
        module(LOHA | {"hada_w1_a": ones(8, 2), "hada_w2_a": ones(8, 2)}), "base", named=True
    ),
    "LoKr": Case(module(LOKR), READ, named=True),
    "LoKr without its right factor": Case(module({"lokr_w1": ones(2, 1)}), "lokr"),
    "LoKr without its left factor": Case(module({"lokr_w2": ones(2, 3)}), "lokr"),
    "LoKr with a half of a factor": Case(module({"lokr_w1": ones(2, 1), "lokr_w2_a": ones(2, 1)}), "lokr"),
    "LoKr with a factor whole and in halves": Case(
        module(LOKR | {"lokr_w2_a": ones(2, 1), "lokr_w2_b": ones(1, 3)}), "."
    ),
    "LoKr of two ranks": Case(
        module({"lokr_w1": ones(2, 1), "lokr_w2_a": ones(2, 1), "lokr_w2_b": ones(2, 3)}), "rank|shape"
    ),
    "LoKr for another base": Case(module({"lokr_w1": ones(2, 2), "lokr_w2": ones(2, 3)}), "base", named=True),
    "LoKr of one dimension": Case(module({"lokr_w1": ones(2), "lokr_w2": ones(2, 3)}), "."),
    "LoKr with a placeholder for alpha": Case(module(LOKR | {"alpha": torch.tensor(9999999999.0)}), READ, named=True),
    "LoKr with a placeholder for alpha in half precision": Case(
        module({key: value.half() for key, value in LOKR.items()} | {"alpha": torch.tensor(9999999999.0).half()}),
        READ,
        named=True,
    ),
    "LoKr that would be huge": Case(
        module({"lokr_w1": ones(1000, 1000), "lokr_w2": ones(1000, 1000)}), "base", named=True, dangerous=True
    ),
    "rows of a LoKr": Case(module(ROWS | {"lokr_rows": torch.tensor([2, 6])}), READ, named=True),
    "rows that a LoKr does not have": Case(module(ROWS | {"lokr_rows": torch.tensor([4, 12])}), "4 to 12 of 8"),
    "rows of a LoKr in reverse": Case(module(ROWS | {"lokr_rows": torch.tensor([6, 2])}), "6 to 2 of 8"),
    "three rows of a LoKr": Case(module(ROWS | {"lokr_rows": torch.tensor([2, 4, 6])}), "has the shape"),
    "too few rows of a LoKr": Case(module(ROWS | {"lokr_rows": torch.tensor([2, 5])}), "3 rows", named=True),
    "rows without a LoKr": Case(plus(f"{CONV}.lokr_rows", torch.tensor([2, 6])), "lokr_w1"),
    "GLoRA": Case(module({"a1.weight": ones(3, 2), "a2.weight": ones(2, 3), **GLORA}), READ, named=True),
    "GLoRA of two ranks": Case(module({"a1.weight": ones(3, 1), "a2.weight": ones(1, 3), **GLORA}), "match the others"),
    "GLoRA of another base": Case(
        module({"a1.weight": ones(9, 2), "a2.weight": ones(2, 9), **GLORA, "b2.weight": ones(2, 9)}), "base", named=True
    ),
    "GLoRA without a factor": Case(module(GLORA), "a1.weight"),
    "OFT of parts without the first": Case(saved({f"{QKV}.oft_blocks.1": ones(2, 2, 2)}), "oft_blocks.0"),
    "OFT of parts of other sizes": Case(
        saved(
            {f"{QKV}.oft_blocks.{n}": ones(2, 2, 2) for n in range(2)} | {f"{QKV}.alpha": torch.tensor(1.0)},
            {"loraline.base": "flux"},
        ),
        "rows",
    ),
    "FLUX LoKr whose parts share its factors": Case(
        saved({f"{QKV}.lokr_w1": ones(1000, 1000), f"{QKV}.lokr_w2": ones(60, 20)}, {"loraline.base": "flux"}),
        READ,
    ),
    "DoRA of outputs": Case(module(PARTS | {"dora_scale": ones(4, 1)}), READ, named=True),
    "DoRA of inputs": Case(module(PARTS | {"dora_scale": ones(1, 3)}), READ, named=True),
    "DoRA of neither axis": Case(module(PARTS | {"dora_scale": ones(1, 7)}), "."),
    "DoRA of both axes": Case(module(PARTS | {"dora_scale": ones(4, 3)}), "."),
    "DoRA of zeros' dimension": Case(module(PARTS | {"dora_scale": torch.tensor(1.0)}), "."),
    "DoRA with NaN": Case(module(PARTS | {"dora_scale": torch.full((4, 1), NAN)}), "NaN"),
    "DoRA alone": Case(module({"dora_scale": ones(4, 1)}), "dora_scale"),
    "FLUX DoRA of inputs in a fused layer": Case(
        saved(lora(QKV, out=9216, inner=3072) | {f"{QKV}.dora_scale": ones(1, 3072)}), "magnitudes are per input"
    ),
    "a whole difference": Case(module({"diff": ones(4, 3)}), READ, named=True),
    "a whole difference of another base": Case(module({"diff": ones(3, 4)}), "base", named=True),
    "a whole difference without dimension": Case(module({"diff": torch.tensor(1.0)}), "shape"),
    "a difference and a LoRA": Case(module(PARTS | {"diff": ones(4, 3)}), "together|no factor"),
    "a replacement": Case(module({"set_weight": ones(4, 3)}), READ, named=True),
    "a replacement of another base": Case(module({"set_weight": ones(3, 4)}), "base", named=True),
    "FLUX rows that are not three times the columns": Case(saved(lora(QKV, out=10)), "10 rows"),
    "FLUX in no known module": Case(saved(lora("lora_unet_double_blocks_0_odd", out=9)), "double_blocks_0_odd"),
    "FLUX block of a huge number": Case(saved(lora(f"lora_unet_double_blocks_{'9' * 50}_img_attn_qkv", out=9)), "999"),
    "BFL norm of a bool": Case(
        saved({"double_blocks.0.img_attn.norm.key_norm.scale": ones(4, dtype=torch.bool)}), "torch.bool"
    ),
    "XLabs module that is none": Case(
        saved(lora("double_blocks.0.processor.odd_lora1", alpha=None, up="up.weight", down="down.weight")), "odd_lora1"
    ),
    "an unsupported family": Case(saved(lora("lora_unet_blocks_0_self_attn_q_proj")), "Anima"),
    # Headers.
    "a card that is no JSON": Case(metadata(loraline__card="{"), "card is broken"),
    "a card of wrong types": Case(metadata(loraline__card='{"seed": "x"}'), "card is broken"),
    "a deep card": Case(metadata(loraline__card="[" * 100_000), "card is broken"),
    "a card of unknown fields": Case(metadata(loraline__card='{"odd": 1}'), "card is broken"),
    "diffusers' settings that are no JSON": Case(diffusers_file("{"), "not JSON"),
    "diffusers' settings that are a list": Case(diffusers_file("[]"), "not a JSON object"),
    "diffusers' alpha that is a string": Case(diffusers_file('{"unet.lora_alpha": "8"}'), "alpha is '8'"),
    "diffusers' alpha that is NaN": Case(diffusers_file('{"unet.lora_alpha": NaN}'), "alpha is nan"),
    "diffusers' alpha that is true": Case(diffusers_file('{"unet.lora_alpha": true}'), "alpha is True"),
    "diffusers' alpha that is negative": Case(diffusers_file('{"unet.lora_alpha": -3}'), READ),
    "diffusers' pattern that never ends": Case(
        diffusers_file('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}'), "no plain module name"
    ),
    "diffusers' patterns that are a list": Case(
        diffusers_file('{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}'), "object of module names"
    ),
    # PEFT.
    "PEFT settings that are no JSON": Case(peft(b"{"), "not JSON", file="unet"),
    "PEFT settings that are a list": Case(peft([]), "not a JSON object", file="unet"),
    "PEFT settings that are deep": Case(peft(b"[" * 100_000), "levels deep", file="unet"),
    "PEFT settings that are binary": Case(peft(b"\xff\x00\xfe"), "not UTF-8", file="unet"),
    "PEFT type that is unknown": Case(peft(PEFT | {"peft_type": "EVIL"}), "EVIL", file="unet"),
    "PEFT alpha that is NaN": Case(peft(b'{"peft_type": "LORA", "lora_alpha": NaN}'), "alpha is nan", file="unet"),
    "PEFT alpha that is 0": Case(peft(PEFT | {"lora_alpha": 0}), READ, file="unet"),
    "PEFT without settings": Case(peft(PEFT, name="other.json"), "adapter_config.json", file="unet"),
    "PEFT pattern that never ends": Case(
        peft(PEFT | {"alpha_pattern": {"(a+)+$": 2}}), "no plain module name", file="unet"
    ),
    # What is no file, and pickles.
    "a missing file": Case(lambda path: None, "no such file"),
    "a dangling link": Case(link("nowhere"), "no such file|not a regular"),
    "a link to itself": Case(loop, "no such file|not a regular|loop"),
    "a device": Case(link("/dev/zero"), "not a regular file", dangerous=True),
    "a pipe": Case(os.mkfifo, "not a regular file", dangerous=True),
    "an empty folder": Case(folder_of(), "0 .safetensors files", file="folder"),
    "a folder with two files": Case(folder_of("x.safetensors", "y.safetensors"), "2 .safetensors files", file="folder"),
    "a folder of the file's name": Case(folder_of(), "0 .safetensors files"),
    "a pickle": Case(pickled(), PICKLE, file="a.pt"),
    "a pickle of protocol 0": Case(pickled(0), ".", file="a.pt"),
    "a pickle of protocol 5": Case(pickled(5), PICKLE, file="a.pth"),
    "a zipped pickle": Case(pickled(zipped=True), PICKLE, file="a.ckpt"),
    "a pickle called .bin": Case(pickled(), PICKLE, file="a.bin"),
    "a pickle in disguise": Case(pickled(), PICKLE),
    "a pickle of protocol 0 in disguise": Case(pickled(0), "no safetensors"),
    "a zipped pickle in disguise": Case(pickled(zipped=True), PICKLE),
    "a zip bomb": Case(zip_bomb, "compressed", file="a.pt", dangerous=True),
    "a zip bomb in disguise": Case(zip_bomb, PICKLE, dangerous=True),
    # Size.
    "a hundred thousand tensors and one": Case(many(100_001), "100001 tensors", dangerous=True),
    "a million tensors": Case(many(1_000_000), "1000000 tensors", dangerous=True, nightly=True),
    "a sparse file of a terabyte": Case(sparse(1 << 40, b"\x02\0\0\0\0\0\0\0{}"), "bytes", dangerous=True),
    "a sparse header": Case(sparse(99_999_999 + 8, struct.pack("<Q", 99_999_999)), "broken", dangerous=True),
}
