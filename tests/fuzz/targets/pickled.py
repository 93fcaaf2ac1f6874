"""The target that reads files which torch pickled, in the sandboxed child process."""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import patch

import torch

from lora_engine.formats import pickles
from lora_engine.formats.pickles import PICKLE_LIMITS, read_pickle
from tests.fuzz.files import Files
from tests.fuzz.target import Target
from tests.lora_engine.formats.forked_readers import forking, shared_server


def _seed_pickles(_: Path) -> list[Files]:
    # Outside of the bounds of an input, which the server would inherit.
    shared_server()
    weights = {f"layer.{number}.weight": torch.arange(6.0).reshape(2, 3) + number for number in range(3)}
    contents = [
        weights,
        {"state_dict": weights, "epoch": 3, "lr": 1e-4, "names": ["a", "b"], "none": None},
        {
            "shared": [weights["layer.0.weight"], weights["layer.0.weight"].T],
            "half": torch.ones(2, dtype=torch.float16),
        },
        {"string_to_param": {"*": torch.ones(1, 4)}, "name": "zorb"},
    ]
    files = []
    for content in contents:
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            files.append({"0.pt": buffer.getvalue()})
    return files


def check_pickle(folder: Path, output: Path) -> None:
    """Reads a pickled file; what it accepts is tensors and plain values, which torch reads again as they are."""
    (path,) = folder.iterdir()
    with patch.object(pickles, "subprocess", forking()):
        content = read_pickle(path, limits=PICKLE_LIMITS)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    assert _equal(torch.load(buffer, weights_only=True), content), "what was read does not survive"


def _equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    return type(first) is type(second) and first == second


PICKLED = (Target("pickles", _seed_pickles, check_pickle, 0.5),)
"""Targets of pickled files."""
