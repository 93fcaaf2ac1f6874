"""Tests bad adapter files: each is refused with file, tensor, rule and fix; odd but valid ones are read."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lora_engine.errors import AdapterError
from lora_engine.formats import Limits, inspect, read_adapter, validate_tensors
from lora_engine.formats.safetensors_io import read_safetensors

MODULE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP, ALPHA = f"{MODULE}.lora_down.weight", f"{MODULE}.lora_up.weight", f"{MODULE}.alpha"
NAN, INF = float("nan"), float("inf")


def good():
    return {DOWN: torch.ones(2, 3), UP: torch.ones(4, 2), ALPHA: torch.tensor(2.0)}


def without(name):
    return {key: tensor for key, tensor in good().items() if key != name}


BAD_TENSORS = {
    "orphan down": (without(UP), DOWN, "lora_up.weight"),
    "orphan up": (without(DOWN), UP, "lora_down.weight"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, ALPHA, "adapter format"),
    "ranks disagree": (good() | {UP: torch.ones(4, 3)}, UP, "rank"),
    "swapped": (good() | {DOWN: torch.ones(3, 2), UP: torch.ones(2, 4)}, UP, "rank"),
    "NaN": (good() | {UP: torch.full((4, 2), NAN)}, UP, "8 of 8 values are NaN"),
    "one Inf": (good() | {DOWN: torch.tensor([[1, 1, INF], [1, 1, 1]])}, DOWN, "1 of 6 values"),
    "NaN in half": (good() | {UP: torch.full((4, 2), NAN, dtype=torch.float16)}, UP, "NaN"),
    "alpha NaN": (good() | {ALPHA: torch.tensor(NAN)}, ALPHA, "NaN"),
    "alpha a vector": (good() | {ALPHA: torch.ones(2)}, ALPHA, "one number"),
    "int factors": (good() | {UP: torch.ones(4, 2, dtype=torch.int64)}, UP, "torch.int64"),
    "bool factors": (good() | {UP: torch.ones(4, 2, dtype=torch.bool)}, UP, "torch.bool"),
    "one dimension": (good() | {DOWN: torch.ones(2)}, DOWN, "2 or 4 dimensions"),
    "three dimensions": (good() | {DOWN: torch.ones(2, 3, 1)}, DOWN, "2 or 4 dimensions"),
    "empty factor": (good() | {DOWN: torch.ones(0, 3), UP: torch.ones(4, 0)}, DOWN, "none empty"),
    "core of another rank": (
        good() | {f"{MODULE}.lora_mid.weight": torch.ones(3, 3, 3, 3)},
        f"{MODULE}.lora_mid.weight",
        r"\[2, 2, k, k\]",
    ),
    "unknown factor": (good() | {f"{MODULE}.hada_w1_a": torch.ones(2, 2)}, "hada_w1_a", "no factor of a kind"),
    "path-like name": (good() | {"../../etc/passwd": torch.ones(1)}, "../../etc/passwd", "no slash"),
    "control characters": (good() | {"unet.a\x1b[2J.lora_down.weight": torch.ones(1)}, "x1b", "printable"),
    "name with NUL": (good() | {"unet.a\x00": torch.ones(1)}, "x00", "printable"),
    "right-to-left name": (good() | {"unet.\u202ea": torch.ones(1)}, "u202e", "printable"),
    "long name": (good() | {"unet." + "a" * 600: torch.ones(1)}, "aaa", "1 to 512"),
    "nothing": ({}, "", "no tensors"),
    "unknown tensors": ({"weight": torch.ones(2, 2)}, "weight", "unknown adapter format"),
    "two keys for a factor": (
        {
            f"{MODULE}.lora_A.weight": torch.ones(2, 3),
            f"{MODULE}.lora_B.weight": torch.ones(4, 2),
            f"{MODULE}.lora.down.weight": torch.ones(2, 3),
        },
        MODULE,
        "one factor twice",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_with_file_tensor_and_remedy(case, tmp_path):
    tensors, tensor, rule = BAD_TENSORS[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=rule) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)
    assert tensor in str(caught.value)
    assert caught.value.remedy
    with pytest.raises(AdapterError, match=rule):
        inspect(path)


@pytest.mark.parametrize(
    ("shape", "tensor"), [((4, 5), DOWN), ((5, 3), UP), ((4, 3, 3, 3), DOWN), ((3, 4), UP)], ids=str
)
def test_shapes_against_the_base_are_refused(shape, tensor, tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="for the base's weight") as caught:
        read_adapter(tmp_path / "a.safetensors", {MODULE: shape})
    assert tensor in str(caught.value)


def test_valid_files_are_read(tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "a.safetensors")
    for name in ("a.safetensors", "link.safetensors"):
        adapter, card = read_adapter(tmp_path / name, {MODULE: (4, 3)})
        assert adapter.modules[MODULE].alpha == 2.0
        assert card.extra == {}
    save_file(without(ALPHA), tmp_path / "b.safetensors")
    assert read_adapter(tmp_path / "b.safetensors")[0].modules[MODULE].scale == 1.0


def header_of(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_BYTES = {
    "empty file": b"",
    "three bytes": b"abc",
    "text": b"this is no safetensors file at all, only a sentence",
    "html": b"<!DOCTYPE html><html>404</html>" * 9,
    "header beyond the end": struct.pack("<Q", 1 << 40) + b"{}",
    "huge header": struct.pack("<Q", 99_000_000) + b"{}",
    "no JSON": header_of(b"{not json}"),
    "not UTF-8": header_of(b"\xff\xfe{}"),
    "deep JSON": header_of(b"[" * 100_000),
    "a list": header_of([1, 2]),
    "metadata of numbers": header_of({"__metadata__": {"a": 1}, "x": ENTRY}, b"\0" * 4),
    "metadata a list": header_of({"__metadata__": ["a"], "x": ENTRY}, b"\0" * 4),
    "a name twice": header_of(b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 1 + b'"x":1}', b"\0" * 4),
    "truncated body": header_of({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"\0" * 8),
    "trailing bytes": header_of({"x": ENTRY}, b"\0" * 99),
    "overlapping": header_of({"x": ENTRY, "y": {**ENTRY, "data_offsets": [2, 6]}}, b"\0" * 6),
    "a hole": header_of({"x": ENTRY, "y": {**ENTRY, "data_offsets": [8, 12]}}, b"\0" * 12),
    "negative offsets": header_of({"x": {**ENTRY, "data_offsets": [-4, 0]}}, b"\0" * 4),
    "shape against size": header_of({"x": {**ENTRY, "shape": [7]}}, b"\0" * 4),
    "overflowing shape": header_of({"x": {**ENTRY, "shape": [1 << 62, 1 << 62]}}, b"\0" * 4),
    "unknown dtype": header_of({"x": {**ENTRY, "dtype": "F3"}}, b"\0" * 4),
    "entry a string": header_of({"x": "y"}, b"\0" * 4),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_bytes_are_refused_with_the_files_name(case, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_BYTES[case])
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(good(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=r"a\.safetensors"):
            read_adapter(path)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("form", ["zip", "raw"])
@pytest.mark.usefixtures("forked_readers")
def test_pickles_are_refused_unread(name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Canary(), protocol=2))
    if form == "zip":
        content = path.read_bytes()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    refusal = "can run code when it is read" if path.suffix == ".safetensors" else "nothing else is read"
    with pytest.raises(AdapterError, match=refusal):
        read_adapter(path)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary(), protocol=2))
    assert (tmp_path / "canary").exists(), "negative control: the canary fires when it is unpickled"


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.safetensors", "missing.safetensors", "empty", "dangling.safetensors"):
        with pytest.raises(AdapterError, match=name):
            read_adapter(tmp_path / name)


@pytest.mark.parametrize("limits", [Limits(file=100), Limits(header=50), Limits(tensors=2), Limits(name=9)], ids=str)
def test_a_file_over_a_limit_is_refused(limits, tmp_path):
    save_file(good(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="Allowed"):
        read_adapter(tmp_path / "a.safetensors", limits=limits)
    assert len(read_safetensors(tmp_path / "a.safetensors")[0]) == 3


def test_validate_accepts_only_valid_tensors():
    assert validate_tensors(good()) is None
    with pytest.raises(AdapterError, match="no tensors"):
        validate_tensors({})
