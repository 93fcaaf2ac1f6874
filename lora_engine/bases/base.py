"""The one protocol of base models, and how one is loaded. What a family computes lives in its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.families import families
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.bases.source import BaseSource, resolve_base


class BaseModel(Protocol):
    """A diffusion model as training, evaluation and generation see it; frozen, in evaluation mode.

    Attributes:
        family: `sd` or `sdxl`.
        name: What cards call it; free of paths.
        fingerprint: SHA-256 over its files.
        device: Where it computes.
        dtype: Of the network's weights; latents, losses and pictures are float32 everywhere.
        modules: The adaptable components: `unet`, `text_encoder`[, `text_encoder_2`].
        noise: The forward process and the parameterisation.
        default_size: (height, width) in pixels that it was made for.
    """

    family: str
    name: str
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    modules: dict[str, nn.Module]
    noise: NoiseSchedule
    default_size: tuple[int, int]

    def module_names(self) -> list[str]:
        """Canonical names of the adaptable layers (Linear, Conv2d), in the order of the model.

        Text encoders always carry the level `text_model`, whatever the installed version of transformers does.
        """
        ...

    def get_module(self, name: str) -> nn.Module:
        """The module of a canonical name."""
        ...

    def set_module(self, name: str, module: nn.Module) -> None:
        """Puts another module in its place."""
        ...

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels [n, 3, h, w] in [-1, 1] as scaled latents: the posterior's mode, or a sample with the generator."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents as pixels [n, 3, h, w]; not clipped."""
        ...

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """One row a text; `size` (height, width) in pixels is needed by families that are told it."""
        ...

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """As `encode_text`, for the other side of classifier-free guidance."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network makes of noisy latents at timesteps [n] (int64); float32; keeps the graph."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of that size in pixels.

        Raises:
            SettingsError: The size is not a multiple of what the model needs.
        """
        ...

    def scheduler(self) -> Any:
        """A fresh sampler of diffusers (DPM-Solver++) with the model's own settings."""
        ...


def load_base(
    source: BaseSource | str, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> BaseModel:
    """Loads a base model, frozen.

    Args:
        source: Where it lies, or a name for `resolve_base`.
        device: Where it is to compute; None takes CUDA, else MPS, else the CPU.
        dtype: Of the network and the text encoders; the autoencoder always computes in float32.

    Raises:
        BaseModelError: It cannot be found or its parts do not fit.
    """
    found = resolve_base(source) if isinstance(source, str) else source
    module = importlib.import_module(families[found.family].module)
    return cast(BaseModel, module.load(found, torch.device(device or default_device()), dtype))


def default_device() -> str:
    """The fastest kind of device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
