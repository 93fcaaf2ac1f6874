"""Sets up device, memory layout and speed of a base by the `running` settings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_engine.bases.base import BaseModel, default_device, visible_gpus
from lora_engine.errors import SettingsError
from lora_engine.training.specs.running import Precision, Running


def choose_device(running: Running) -> str | None:
    """Returns the device to load a base on; None leaves the choice to `load_base`.

    Raises:
        SettingsError: This machine lacks the requested device.
    """
    is_available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if running.deterministic:
        # cuBLAS reads it on first use; without it, torch refuses deterministic matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = running.device
    if device in is_available and not is_available[device]():
        raise SettingsError(
            f"running.device is {device!r}, but torch finds no such device on this machine",
            remedy="set running.device to auto, or install the torch build and the driver for this device",
        )
    return None if device == "auto" else device


def choose_precision(precision: Precision, device: str | None) -> Precision:
    """Returns the precision for a device: `auto` is bf16 on a GPU with bf16 arithmetic, else fp32.

    Args:
        precision: The setting; all but `auto` are returned unchanged.
        device: The device of the training; None is the fastest.
    """
    if precision != "auto":
        return precision
    is_gpu = torch.device(device or default_device()).type == "cuda"
    return "bf16" if is_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def used_devices(running: Running) -> tuple[str, ...]:
    """Returns the names of the devices that a training uses: `cpu`, `mps`, or `cuda-0` for the first GPU.

    Args:
        running: With several processes, each uses its own GPU.
    """
    device = default_device() if running.device == "auto" else running.device
    if device == "mps" and running.processes > 1:
        device = "cpu"  # as `process_group` chooses
    if device != "cuda":
        return (device,)
    return visible_gpus(running.processes)


def prepare_network(base: BaseModel, running: Running) -> None:
    """Sets up the network of a base, before anything is attached to it.

    Raises:
        SettingsError: The network or this machine does not support a setting.
    """
    for name, network in denoisers_of(base):
        if running.channels_last:
            # Bypasses the `to` of diffusers, which adds checks of dtypes.
            nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if running.attention == "xformers":
            _require_xformers(base)
            _enable(network, name, "enable_xformers_memory_efficient_attention", "attention")
        if running.gradient_checkpointing:
            _enable(network, name, "enable_gradient_checkpointing", "gradient_checkpointing")


def compile_network(base: BaseModel, running: Running) -> None:
    """Compiles the repeated blocks of the network on their first run, with everything attached by then.

    Raises:
        SettingsError: No compiler works, or the network has no repeated blocks.
    """
    if running.compile == "none":
        return
    _require_compiler(base.device)
    for name, network in denoisers_of(base):
        _enable(network, name, "compile_repeated_blocks", "compile")


def denoisers_of(base: BaseModel) -> Iterator[tuple[str, Any]]:
    """Yields names and modules of the components that are no text encoders."""
    # Text encoders are small, and mostly do not run once their outputs are cached.
    for name, module in base.modules.items():
        if not name.startswith("text_encoder"):
            yield name, module


def _enable(network: Any, name: str, method: str, setting: str) -> None:
    try:
        getattr(network, method)()
    except (AttributeError, ValueError) as error:
        raise SettingsError(
            f"the network does not support running.{setting} ({error})",
            where=name,
            remedy=f"remove running.{setting} for this base",
        ) from error


def _require_xformers(base: BaseModel) -> None:
    if importlib.util.find_spec("xformers") is None or base.device.type != "cuda":
        missing = (
            "the package xformers is not installed" if base.device.type == "cuda" else "the device is not a CUDA GPU"
        )
        raise SettingsError(
            f"running.attention is 'xformers', but {missing}",
            allowed="sdpa everywhere; xformers on CUDA",
            remedy="set running.attention to sdpa, which is as fast on recent GPUs, or install xformers",
        )


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(_probe)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise SettingsError(
            f"running.compile is 'regional', but torch.compile fails on this machine ({first})",
            remedy="install a C++ compiler (on a GPU also Triton), or set running.compile to none",
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
