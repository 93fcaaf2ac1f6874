"""Defines the protocol of base models and loads them. Each family implements it in its folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.noise import NoiseSchedule
from lora_engine.bases.options import UNCHANGED_BASE, BaseOptions
from lora_engine.bases.quantized import Quantization, check_quantization, quantize_base
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.building import BUILDING
from lora_engine.errors import SettingsError
from lora_engine.files import FilePath
from lora_engine.framing import Framing

_chosen: ContextVar[str] = ContextVar("chosen", default="")


class BaseModel(Protocol):
    """A diffusion model for training, evaluation and generation; frozen, in evaluation mode.

    Attributes:
        family: The family of its adapters; a name among `families`.
        name: Name for cards, without paths.
        fingerprint: SHA-256 over its files.
        device: The device of the weights.
        dtype: Dtype of the denoiser's weights; latents, losses and images are always float32.
        modules: The adaptable components: `unet` or `transformer`, `text_encoder`[, `text_encoder_2`[, ...]].
        noise: The noise schedule and the parameterization; a `FlowSchedule` for flow matching.
        default_size: Native (height, width) in pixels.
        distilled: True for distilled guidance: `predict` runs once per step and takes the guidance scale if its network
            has that input.
        inpaints: True if `predict` needs the result of `encode_mask`.
        quantization: Storage of the denoiser's linear layers: `none`, `8bit`, `4bit` or `fp8`.
        options: What was changed of it.
    """

    family: str
    name: str
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    modules: dict[str, nn.Module]
    noise: NoiseSchedule
    default_size: tuple[int, int]
    distilled: bool
    inpaints: bool
    quantization: Quantization
    options: BaseOptions

    def configure(self, options: BaseOptions) -> None:
        """Sets the layer of the text encoders that is read, the noise schedule and the autoencoder.

        What an earlier call changed and these options leave out is the base's own again.

        Raises:
            BaseModelError: The autoencoder is damaged, or has other latents than that of the base.
            SettingsError: The family does not have an option, or a value does not suit the base.
        """
        ...

    def module_names(self) -> list[str]:
        """Returns the canonical names of the adaptable layers (Linear, Conv2d), in the order of the model.

        Names of text encoders always contain `text_model`, independent of the version of transformers.
        """
        ...

    def get_module(self, name: str) -> nn.Module:
        """Returns the module with a canonical name."""
        ...

    def set_module(self, name: str, module: nn.Module) -> None:
        """Replaces the module with a canonical name."""
        ...

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encodes pixels [n, 3, h, w] in [-1, 1] as scaled latents: the mode, or a sample if a generator is given."""
        ...

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Conditioning:
        """Encodes a mask and images for an inpainting base; add it to the text with `Conditioning.with_tensors`.

        Args:
            mask: [n, 1, h, w]; values of 0.5 and above are generated, others are kept.
            pixels: The unmasked images, [n, 3, h, w] in [-1, 1].

        Returns:
            `mask` [n, 1, height, width] of 0 and 1, and `masked` [n, channels, height, width], the latents of the
            images with gray under the mask; both in the size of the latents.

        Raises:
            SettingsError: The base is not an inpainting base, or the shapes do not match.
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to pixels [n, 3, h, w]; not clipped."""
        ...

    def encode_text(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encodes texts, one row per text; some families also need `size` (height, width) in pixels."""
        ...

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encodes negative prompts for classifier-free guidance; see `encode_text`."""
        ...

    def with_framings(self, conditioning: Conditioning, framings: Sequence[Framing]) -> Conditioning:
        """Returns the conditioning of training images, one row each, for networks that read the original size and crop.

        Others get it unchanged.
        """
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's prediction for noisy latents at timesteps [n]; float32; keeps the autograd graph.

        Timesteps are int64 indices into the schedule for diffusion, and any dtype (sigma times 1000) for a flow.
        """
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns (channels, height, width) of the latents of an image of that size in pixels.

        Raises:
            SettingsError: The size is not a multiple that the model requires.
        """
        ...

    def scheduler(
        self, steps: int | None = None, size: tuple[int, int] | None = None, sampler: str | None = None
    ) -> Any:
        """Returns a new diffusers sampler with the model's settings: DPM-Solver++, or Euler's method for a flow.

        Args:
            steps: Number of timesteps to set; None leaves them to the caller.
            size: (height, width) in pixels, on which the timesteps of some flows depend; None is `default_size`.
            sampler: Another sampler of diffusion models, a name for `find_sampler`.

        Raises:
            SettingsError: The sampler is unknown, or not one for the base.
        """
        ...


def load_base(
    source: BaseSource | FilePath,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    quantise: Quantization = "none",
    options: BaseOptions = UNCHANGED_BASE,
    offload: float = 0.0,
) -> BaseModel:
    """Loads a base model, frozen.

    Args:
        source: The source, or a name for `resolve_base`.
        device: The device; None takes CUDA, else MPS, else the CPU.
        dtype: Dtype of the denoiser and the text encoders; the autoencoder is always float32.
        quantise: Storage of the linear layers in the denoiser's blocks; see `quantize_base`.
        options: Changes of the base.
        offload: Share of these layers whose weights stay in the CPU's memory; see `BlockSwapper`.

    Raises:
        BaseModelError: The base is not found, or its parts do not match.
        SettingsError: A package that quantization needs is not installed, or an option does not suit the base.
    """
    resolved = source if isinstance(source, BaseSource) else resolve_base(source)
    check_quantization(quantise)
    with BUILDING:
        load = getattr(importlib.import_module(resolved.module), resolved.loader.rpartition(":")[2])
    base = cast(BaseModel, load(resolved, torch.device(device or default_device()), dtype))
    if options != UNCHANGED_BASE:
        base.configure(options)
    quantize_base(base, quantise, offload=offload)
    base.quantization = quantise
    return base


def full_mask_conditioning(base: BaseModel, conditioning: Conditioning, size: tuple[int, int]) -> Conditioning:
    """Adds a mask over the full image for an inpainting base; returns the conditioning of other bases unchanged.

    Args:
        base: Any base.
        conditioning: The result of `encode_text`.
        size: (height, width) in pixels.
    """
    if not base.inpaints:
        return conditioning
    full = base.encode_mask(torch.ones(1, 1, *size), torch.zeros(1, 3, *size))
    return conditioning.with_tensors(full.index([0] * len(conditioning)))


def visible_gpus(count: int) -> tuple[str, ...]:
    """Returns the names of the first GPUs, such as `cuda-0`.

    They are numbered as in `CUDA_VISIBLE_DEVICES`, so that processes that see different GPUs name them differently.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(f"cuda-{visible[index] if index < len(visible) else index}" for index in range(count))


@contextmanager
def device_chosen(device: str) -> Iterator[None]:
    """Makes a device the default of this thread inside a `with` block; `auto` changes nothing.

    Args:
        device: The type of a device, or a numbered GPU such as `cuda:1`.

    Raises:
        SettingsError: This machine lacks the device.
    """
    kind, _, number = device.partition(":")
    available: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    count = torch.cuda.device_count() if number else 0
    if (kind in available and not available[kind]()) or (number and int(number) >= count):
        raise SettingsError(
            f"device {device!r}: torch finds no such device on this machine",
            remedy="set the device to auto, or install the torch build and the driver for it",
        )
    token = _chosen.set("" if device == "auto" else kind)
    try:
        with torch.cuda.device(int(number)) if number else nullcontext():
            yield
    finally:
        _chosen.reset(token)


def default_device() -> str:
    """Returns the type of the device that `device_chosen` made the default, else of the fastest of this machine."""
    if chosen := _chosen.get():
        return chosen
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
