"""MediaPipe's full-range BlazeFace in torch: finds faces up to about five meters from the camera.

Bazarevsky et al. 2019, https://arxiv.org/abs/1907.05047; README.md beside this file states source, license and digests
of the weights.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_engine.building import BUILDING

FACE_WEIGHTS = Path(__file__).with_name("full_range.safetensors")
SIDE, GRID = 192, 48
"""Side of the input in pixels, and anchors per side: one in the center of each cell of 4 x 4 pixels."""
POINTS = 8
"""Points per face: center, size, both eyes, nose, mouth, both ears; each as x and y."""
# Channels inside and behind each block; `None` separates the sizes of the feature maps: 96, 48, 24, 12 and 6.
_ENCODER = (
    ((8, 32), (8, 32)),
    ((12, 48), (12, 48), (16, 64)),
    ((24, 96), (32, 128), (32, 128)),
    ((36, 144), (48, 192), (64, 256)),
    ((96, 384), (96, 384), (96, 384), (96, 384)),
)
# Channels of each level of the decoder, channels inside its blocks, and their number.
_DECODER = ((96, 48, 2), (64, 32, 2), (48, 24, 1))


class BlazeFace(nn.Module):
    """The network, with random weights; `load_blazeface` returns the trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        channels, widths, levels = 32, [], []
        for number, blocks in enumerate(_ENCODER):
            level = []
            for index, (middle, outputs) in enumerate(blocks):
                level.append(_Block(channels, middle, outputs, 2 if number and not index else 1))
                channels = outputs
            levels.append(nn.Sequential(*level))
            widths.append(channels)
        self.encoder = nn.ModuleList(levels)
        self.decoder = nn.ModuleList()
        for (outputs, middle, count), skipped in zip(_DECODER, reversed(widths[1:-1]), strict=True):
            self.decoder.append(_Merge(channels, skipped, outputs, middle, count))
            channels = outputs
        self.boxes = nn.Conv2d(channels, 2 * POINTS, 1)
        self.scores = nn.Conv2d(channels, 1, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns points and scores at every anchor.

        Args:
            pixels: float32 [n, 3, 192, 192] in [-1, 1].

        Returns:
            Points [n, 2304, 8, 2] (x, y) in pixels relative to the anchor, and logits [n, 2304]; rows of anchors first.
        """
        features = F.relu(self.stem(_pad_like_tensorflow(pixels)))
        maps = []
        for level in self.encoder:
            features = level(features)
            maps.append(features)
        for merge, skipped in zip(self.decoder, reversed(maps[1:-1]), strict=True):
            features = merge(features, skipped)
        points = self.boxes(features).permute(0, 2, 3, 1).reshape(len(pixels), -1, POINTS, 2)
        return points, self.scores(features).flatten(1)


class _Block(nn.Module):
    """A double block: two depthwise-separable convolutions around a bottleneck, with a skip connection."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise_in = nn.Conv2d(inputs, inputs, 3, stride, padding=2 - stride, groups=inputs)
        self.pointwise_in = nn.Conv2d(inputs, middle, 1)
        self.depthwise_out = nn.Conv2d(middle, middle, 3, padding=1, groups=middle)
        self.pointwise_out = nn.Conv2d(middle, outputs, 1)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, features: Tensor) -> Tensor:
        skipped = features
        if self.stride == 2:
            skipped, features = F.max_pool2d(features, 2), _pad_like_tensorflow(features)
        inner = self.depthwise_out(F.relu(self.pointwise_in(self.depthwise_in(features))))
        # The skipped features have fewer channels: the others are zero.
        return F.relu(F.pad(skipped, (0, 0, 0, 0, 0, self.extra)) + self.pointwise_out(inner))


class _Merge(nn.Module):
    """A level of the decoder: adds the enlarged features to those of the encoder with the same size."""

    def __init__(self, inputs: int, skipped: int, outputs: int, middle: int, count: int) -> None:
        super().__init__()
        self.inputs, self.skipped = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(skipped, outputs, 1)
        self.blocks = nn.Sequential(*(_Block(outputs, middle, outputs) for _ in range(count)))

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        enlarged = F.interpolate(F.relu(self.inputs(features)), scale_factor=2.0, mode="bilinear", align_corners=False)
        merged: Tensor = self.blocks(F.relu(self.skipped(skipped)) + enlarged)
        return merged


def _pad_like_tensorflow(features: Tensor) -> Tensor:
    # "SAME" for a stride of 2 pads one row and one column, below and on the right.
    return F.pad(features, (0, 1, 0, 1))


@functools.cache
def load_blazeface() -> BlazeFace:
    """Returns the trained network in float32 on the CPU; its weights are stored in float16."""
    # Building a module draws from the global generator; its state is restored.
    with BUILDING, torch.random.fork_rng(devices=[]):
        network = BlazeFace()
    network.load_state_dict({name: value.float() for name, value in load_file(FACE_WEIGHTS).items()})
    return network.eval().requires_grad_(False)
