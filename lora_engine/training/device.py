"""Brings a base into the form that `running` asks for: device, memory, speed. What is computed stays the same."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_engine.bases.base import BaseModel, default_device
from lora_engine.errors import SettingsError
from lora_engine.training.specs.running import Running


def choose_device(running: Running) -> str | None:
    """The device to load a base on; None leaves the choice to `load_base`.

    Raises:
        SettingsError: This machine lacks what was asked for.
    """
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if running.deterministic:
        # cuBLAS reads it when it first works; without it, torch refuses its products of matrices.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    wanted = running.device
    if wanted in there and not there[wanted]():
        raise SettingsError(
            f"running.device is {wanted!r}, and this machine has none that torch can use",
            remedy="set it to auto, or install the build of torch for this device and its driver",
        )
    return None if wanted == "auto" else wanted


def used_devices(running: Running) -> tuple[str, ...]:
    """Returns the names of the devices that a training computes on: `cpu`, `mps`, or `cuda-0` for the first GPU.

    A GPU is named as `CUDA_VISIBLE_DEVICES` names it, so that processes that see different GPUs name them differently.

    Args:
        running: With several processes, each has a GPU of its own.
    """
    device = default_device() if running.device == "auto" else running.device
    if device == "mps" and running.processes > 1:
        device = "cpu"  # as `process_group` chooses
    if device != "cuda":
        return (device,)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(f"cuda-{visible[at] if at < len(visible) else at}" for at in range(running.processes))


def prepare_network(base: BaseModel, running: Running) -> None:
    """Sets up the network of a base, before anything is attached to it.

    Raises:
        SettingsError: The network, or this machine, cannot do what was asked for.
    """
    for name, network in _networks(base):
        if running.channels_last:
            # Of `nn.Module`, since that of diffusers concerns itself with dtypes.
            nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if running.attention == "xformers":
            _require_xformers(base)
            _ask(network, name, "enable_xformers_memory_efficient_attention", "attention")
        if running.gradient_checkpointing:
            _ask(network, name, "enable_gradient_checkpointing", "gradient_checkpointing")


def compile_network(base: BaseModel, running: Running) -> None:
    """Has the repeated blocks of the network compiled when they first run, with what is attached to them by then.

    Raises:
        SettingsError: No compiler works here, or the network has no repeated blocks.
    """
    if running.compile == "none":
        return
    _require_compiler(base.device)
    for name, network in _networks(base):
        _ask(network, name, "compile_repeated_blocks", "compile")


def _networks(base: BaseModel) -> Iterator[tuple[str, Any]]:
    # Text encoders are small, and mostly not run at all once their outputs are cached.
    for name, module in base.modules.items():
        if not name.startswith("text_encoder"):
            yield name, module


def _ask(network: Any, name: str, method: str, setting: str) -> None:
    try:
        getattr(network, method)()
    except (AttributeError, ValueError) as error:
        raise SettingsError(
            f"the network cannot do what running.{setting} asks for ({error})",
            where=name,
            remedy=f"leave running.{setting} out for this base",
        ) from error


def _require_xformers(base: BaseModel) -> None:
    if importlib.util.find_spec("xformers") is None or base.device.type != "cuda":
        missing = "the package xformers is not installed" if base.device.type == "cuda" else "the device is no GPU"
        raise SettingsError(
            f"running.attention is 'xformers', and {missing}",
            allowed="sdpa everywhere; xformers on CUDA",
            remedy="set it to sdpa, which is as fast on recent GPUs, or install xformers",
        )


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(_probe)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise SettingsError(
            f"running.compile is 'regional', and torch.compile does not work here ({first})",
            remedy="install a C++ compiler (on a GPU also Triton), or set running.compile to none",
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
