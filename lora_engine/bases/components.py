"""Loads the components of a base with the classes of diffusers and transformers: safetensors only, offline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_engine.bases.source import BaseSource
from lora_engine.building import BUILDING
from lora_engine.errors import BaseModelError

_ALIGNMENT = 64


def load_component(cls: Any, source: BaseSource, component: str, dtype: torch.dtype) -> nn.Module:
    """Loads one component with weights on the CPU, frozen and in evaluation mode.

    Args:
        cls: Its class in diffusers or transformers.
        source: The base.
        component: The subfolder.
        dtype: Dtype of the weights in memory.

    Raises:
        BaseModelError: The files are damaged or do not match the configuration.
    """
    extra: dict[str, Any] = {"dtype": dtype}
    if cls.__module__.startswith("diffusers"):
        # Without accelerate, the default of diffusers falls back with a warning.
        extra = {"torch_dtype": dtype, "low_cpu_mem_usage": _has_accelerate()}
    try:
        # Building a module draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            module = cls.from_pretrained(
                str(source.folder),
                subfolder=component,
                use_safetensors=True,
                local_files_only=True,
                variant=source.layout.variants[component],
                **extra,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unreadable(source.folder / component, error) from error
    if not isinstance(module, nn.Module):
        raise BaseModelError(f"{cls.__name__} returned no module", where=str(source.folder / component))
    align_weights(module)
    return module.requires_grad_(False).eval()


def load_tokenizer(cls: Any, source: BaseSource, component: str) -> Any:
    """Loads a tokenizer from the files of the folder.

    Raises:
        BaseModelError: The files are damaged.
    """
    try:
        with BUILDING:
            return cls.from_pretrained(str(source.folder), subfolder=component, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unreadable(source.folder / component, error) from error


def align_weights(module: nn.Module) -> None:
    """Copies weights that are not aligned to 64 bytes into aligned memory.

    Memory-mapped weights have arbitrary addresses, and CPU kernels round differently at different alignments. Aligned
    weights give the same bits in every process.
    """
    for value in (*module.parameters(), *module.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % _ALIGNMENT:
            value.data = value.detach().clone()


def _has_accelerate() -> bool:
    from diffusers.utils import is_accelerate_available

    return bool(is_accelerate_available())


def _unreadable(folder: Path, error: Exception) -> BaseModelError:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return BaseModelError(
        f"the component cannot be read ({first})", where=str(folder), remedy="download or save the base again"
    )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Disables the progress bars of transformers until the block ends."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
