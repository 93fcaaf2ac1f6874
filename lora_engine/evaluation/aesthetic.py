"""Scores images by a predictor of ratings: linear layers on the vectors of a CLIP, as LAION's aesthetic predictors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.data.pixels import read_pixels
from lora_engine.embedding.embedder import Embedder
from lora_engine.errors import EngineError, SettingsError
from lora_engine.finite import is_finite
from lora_engine.formats.pickles import is_pickled, read_pickle
from lora_engine.formats.safetensors_io import read_safetensors

_ENDINGS = (".safetensors", ".pth", ".pt")
_MAX_LAYERS = 32


@dataclass(frozen=True)
class RatingHead:
    """Linear layers without activations between them, which give one rating.

    Attributes:
        layers: Weight [out, in] and bias [out] of each.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    def rate(self, vectors: Tensor) -> Tensor:
        """Returns float32 [n] for vectors [n, d] of length 1."""
        for weight, bias in self.layers:
            vectors = torch.nn.functional.linear(vectors, weight, bias)
        return vectors[:, 0]


def load_rating_head(path: Path, width: int) -> RatingHead:
    """Loads a head from a file, or from the only such file of a folder: safetensors, or a state dict of PyTorch.

    Args:
        path: The file or folder.
        width: Length of the embedder's vectors.

    Raises:
        SettingsError: There is no such file, or it has other tensors than linear layers from the width to one number.
    """
    file = _find(path)
    try:
        tensors = read_pickle(file) if is_pickled(file) else read_safetensors(file)[0]
    except EngineError as error:
        raise SettingsError(f"the head cannot be read ({error.problem})", where=str(file)) from None
    layers = _layers(tensors if isinstance(tensors, Mapping) else {}, str(file))
    sizes = [width, *(len(bias) for _, bias in layers)]
    fits = all(weight.shape == (out, inner) for (weight, _), inner, out in zip(layers, sizes, sizes[1:], strict=False))
    if not fits or sizes[-1] != 1 or len(sizes) < 2:
        shapes = " -> ".join(f"{weight.shape[1]} to {weight.shape[0]}" for weight, _ in layers) or "no layer"
        raise SettingsError(
            f"the head has {shapes}",
            where=str(file),
            allowed=f"linear layers from {width}, the width of the embedder, to 1",
            remedy="give the CLIP that it was trained on",
        )
    return RatingHead(layers)


def rate_images(embedder: Embedder, head: RatingHead, files: Sequence[Path]) -> list[float]:
    """Returns the rating of each image, on the scale of the head: 1 to 10 for LAION's."""
    vectors = torch.cat([embedder.embed_images(read_pixels(file)[None]) for file in files])
    return [round(float(rating), 3) for rating in head.rate(vectors)]


def _find(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    heads = [file for file in files if file.suffix.lower() in _ENDINGS and file.is_file()]
    if len(heads) != 1:
        raise SettingsError(f"has {len(heads)} heads", where=str(path), allowed=f"one file of {', '.join(_ENDINGS)}")
    return heads[0]


def _layers(tensors: Mapping[str, object], where: str) -> tuple[tuple[Tensor, Tensor], ...]:
    weights = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and name.endswith("weight")}
    layers = []
    for name in sorted(weights, key=lambda name: [int(number) for number in re.findall(r"[0-9]{1,9}", name)]):
        weight = weights[name]
        bias = tensors.get(name.removesuffix("weight") + "bias")
        bias = bias if isinstance(bias, Tensor) else torch.zeros(weight.shape[:1])
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or not (is_finite(weight) and is_finite(bias)):
            raise SettingsError(f"{name!r} is no linear layer with finite weights", where=where)
        layers.append((weight.float(), bias.float()))
    if len(layers) > _MAX_LAYERS:
        raise SettingsError(f"the head has {len(layers)} layers", where=where, allowed=f"at most {_MAX_LAYERS}")
    return tuple(layers)
