"""Writes a real ONNX model that tags the color of an image, in the layout of the WD taggers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

SIDE = 8
TAGS = (
    ("general", 9),
    ("sensitive", 9),
    ("red_sky", 0),
    ("green_grass", 0),
    ("blue_sea", 0),
    ("^_^", 0),
    ("ann_(x)", 4),
)
# Weights of blue, green and red, and the bias: a color above half of its range is likely.
_WEIGHTS = (
    (0.0, 0.0, 0.0, 2.0),
    (0.0, 0.0, 0.0, -2.0),
    (0.0, 0.0, 0.04, -5.0),
    (0.0, 0.04, 0.0, -5.0),
    (0.04, 0.0, 0.0, -5.0),
    (0.0, 0.0, 0.02, -5.0),
    (0.0, 0.0, 0.04, -9.0),
)


def write_tagger(folder: Path) -> Path:
    """Writes `model.onnx` and `selected_tags.csv`."""
    folder.mkdir(parents=True)
    rows = [f"{number},{name},{category},{100 - number}" for number, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    columns = [[row[channel] for row in _WEIGHTS] for channel in range(3)]
    (folder / "model.onnx").write_bytes(_model(columns, [row[3] for row in _WEIGHTS]))
    return folder


def _model(weights: Sequence[Sequence[float]], bias: Sequence[float]) -> bytes:
    count = len(bias)
    nodes = (
        _node("ReduceMean", ["input"], "mean", _ints("axes", (1, 2)) + _int("keepdims", 0)),
        _node("MatMul", ["mean", "w"], "product"),
        _node("Add", ["product", "b"], "sum"),
        _node("Sigmoid", ["sum"], "output"),
    )
    graph = b"".join(_bytes(1, node) for node in nodes) + _text(2, "tagger")
    graph += _bytes(5, _tensor("w", (3, count), [value for row in weights for value in row]))
    graph += _bytes(5, _tensor("b", (count,), bias))
    graph += _bytes(11, _value("input", (None, SIDE, SIDE, 3))) + _bytes(12, _value("output", (None, count)))
    return _number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13))


def _node(kind: str, inputs: Sequence[str], output: str, attributes: bytes = b"") -> bytes:
    return b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, kind) + attributes


def _ints(name: str, values: Sequence[int]) -> bytes:
    return _bytes(5, _text(1, name) + b"".join(_number(8, value) for value in values) + _number(20, 7))


def _int(name: str, value: int) -> bytes:
    return _bytes(5, _text(1, name) + _number(3, value) + _number(20, 2))


def _tensor(name: str, shape: Sequence[int], values: Sequence[float]) -> bytes:
    sizes = b"".join(_number(1, size) for size in shape)
    return sizes + _number(2, 1) + _text(8, name) + _bytes(9, struct.pack(f"<{len(values)}f", *values))


def _value(name: str, shape: Sequence[int | None]) -> bytes:
    sizes = b"".join(_bytes(1, _text(2, "n") if size is None else _number(1, size)) for size in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, 1) + _bytes(2, sizes)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
