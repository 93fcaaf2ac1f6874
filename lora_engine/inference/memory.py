"""Estimates the memory that drawing needs and refuses sizes beyond it before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_engine.bases.base import BaseModel
from lora_engine.errors import SettingsError

_FLOAT32 = 4
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """A lower bound of the memory for drawing, in bytes.

    Attributes:
        weights: Of all parts of the base; they are loaded.
        denoiser: Activations of one prediction that exist at the same time.
        decoder: Activations of the autoencoder's last level that exist at the same time.
    """

    weights: int
    denoiser: int
    decoder: int

    @property
    def activations(self) -> int:
        """Bytes beside the weights: the larger part, as the decoder runs after the denoiser."""
        return max(self.denoiser, self.decoder)


def estimate_memory(base: BaseModel, size: tuple[int, int], *, rows: int, images: int, tiled: bool) -> MemoryEstimate:
    """Returns a lower bound: what certainly exists at once, without copies, workspaces and attention.

    - U-Net: the outputs of all down layers, which the up layers read, [rows, channels, height, width] each.
    - Transformer: the hidden states, queries, keys and values of one block, [rows, tokens, width] each.
    - Decoder: the enlarged input and the output of the last upsampling convolution in float32, and the images.

    Args:
        base: The base.
        size: (height, width) in pixels.
        rows: Rows of a prediction: images times parts of the prompt.
        images: Images that are decoded together.
        tiled: True if the autoencoder decodes one image at a time, in tiles.
    """
    _, height, width = base.latent_shape(size)
    vae: Any = base.vae  # type: ignore[attr-defined]
    parts = [*base.modules.values(), vae]
    weights = sum(value.nbytes for part in parts for value in (*part.parameters(), *part.buffers()))
    channels = vae.config.block_out_channels
    tile = min(size[0], vae.tile_sample_min_size) * min(size[1], vae.tile_sample_min_size)
    pixels = tile if tiled else images * size[0] * size[1]
    output = 2 * images * 3 * size[0] * size[1] * _FLOAT32
    decoder = 2 * channels[min(1, len(channels) - 1)] * pixels * _FLOAT32 + output
    denoiser = rows * _activations(next(iter(base.modules.values())), height, width) * base.dtype.itemsize
    return MemoryEstimate(weights, denoiser, decoder)


def check_memory(
    base: BaseModel, size: tuple[int, int], free: int, *, rows: int, images: int, tiled: bool
) -> MemoryEstimate:
    """Returns the estimate; see `estimate_memory`.

    Raises:
        SettingsError: The free memory of the base's device, in bytes, is smaller.
    """
    estimate = estimate_memory(base, size, rows=rows, images=images, tiled=tiled)
    if estimate.activations <= free:
        return estimate
    raise SettingsError(
        f"images of {size[1]} x {size[0]} pixels, {images} at once, need at least "
        f"{estimate.activations // _MIB:,} MiB beside {estimate.weights // _MIB:,} MiB of weights, "
        f"and {base.device} has {free // _MIB:,} MiB left",
        remedy="make images smaller"
        + ("" if images == 1 else ", or set --batch 1")
        + ("" if tiled else ", or --tile-vae"),
    )


def _activations(denoiser: nn.Module, height: int, width: int) -> int:
    """Returns the numbers per row that exist at once, for latents of (height, width)."""
    config: Any = denoiser.config
    levels = config.get("block_out_channels")
    if levels is None:
        heads, dimension = config.get("num_attention_heads"), config.get("attention_head_dim")
        hidden = int(config.get("dim") or heads * dimension)
        return 4 * (height // 2) * (width // 2) * hidden
    layers = config.layers_per_block
    total = int(levels[0]) * height * width
    for level, channels in enumerate(levels):
        count = layers if isinstance(layers, int) else layers[level]
        total += count * int(channels) * (height >> level) * (width >> level)
    return total
