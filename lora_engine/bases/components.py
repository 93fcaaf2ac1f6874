"""Loads the components of a base with the classes of diffusers and transformers: safetensors only, offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_engine.bases.source import BaseSource
from lora_engine.bases.vae import VaeSource
from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.checkpoints.quantization import read_stored
from lora_engine.checkpoints.scales import multiply, read_scale
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.text_names import canonical_text_name
from lora_engine.errors import AdapterError, BaseModelError

_SCALE_NAMES = r"(^|\.)(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)$"


def load_component(cls: Any, source: BaseSource, component: str, dtype: torch.dtype) -> nn.Module:
    """Loads one component with weights on the CPU, frozen and in evaluation mode; scaled weights times their scales.

    Args:
        cls: Its class in diffusers or transformers.
        source: The base.
        component: The subfolder.
        dtype: Dtype of the weights in memory.

    Raises:
        BaseModelError: The files are damaged, do not match the configuration, or have packed weights.
    """
    names = [name for name in source.layout.files if name.startswith(f"{component}/")]
    return _load(cls, source.folder, component, source.layout.variants[component], names, dtype)


def load_autoencoder(cls: Any, source: VaeSource, dtype: torch.dtype) -> nn.Module:
    """Loads an autoencoder; see `load_component`."""
    return _load(cls, source.folder, "", source.variant, source.files, dtype)


def _load(
    cls: Any, folder: Path, component: str, variant: str | None, names: Sequence[str], dtype: torch.dtype
) -> nn.Module:
    scaled = _scaled_weights(folder, component, names)
    extra: dict[str, Any] = {"dtype": dtype}
    if cls.__module__.startswith("diffusers"):
        # Without accelerate, the default of diffusers falls back with a warning.
        extra = {"torch_dtype": dtype, "low_cpu_mem_usage": _has_accelerate()}
    try:
        # Building a module draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars(), _ignoring_scales(cls, scaled):
            module = cls.from_pretrained(
                str(folder),
                subfolder=component,
                use_safetensors=True,
                local_files_only=True,
                variant=variant,
                **extra,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unreadable(folder / component, error) from error
    if not isinstance(module, nn.Module):
        raise BaseModelError(f"{cls.__name__} returned no module", where=str(folder / component))
    align_weights(module)
    module.requires_grad_(False)
    _apply_scales(module, scaled, folder / component)
    return module.eval()


def _scaled_weights(folder: Path, component: str, names: Sequence[str]) -> dict[str, StoredTensor]:
    """Returns the scaled weights of a component by their names in the files; the libraries ignore their scales."""
    try:
        stored = read_stored(folder / name for name in names if name.endswith(".safetensors"))
    except AdapterError as error:
        raise _unreadable(folder / component, error) from error
    return {
        name: tensor for tensors, _ in stored.values() for name, tensor in tensors.items() if tensor.scale is not None
    }


@contextmanager
def _ignoring_scales(cls: Any, scaled: Mapping[str, StoredTensor]) -> Iterator[None]:
    """Keeps the libraries from listing the scales, which `_apply_scales` reads, as unused weights."""
    if not scaled:
        yield
        return
    name = "_keys_to_ignore_on_load_unexpected"
    usual = getattr(cls, name, None)
    setattr(cls, name, [*(usual or ()), _SCALE_NAMES])
    try:
        yield
    finally:
        setattr(cls, name, usual)


def _apply_scales(module: nn.Module, scaled: Mapping[str, StoredTensor], folder: Path) -> None:
    if not scaled:
        return
    parameters = {canonical_text_name(name): value for name, value in module.named_parameters()}
    for name, stored in scaled.items():
        scale, value = read_scale(stored), parameters.get(canonical_text_name(name))
        if value is None or scale is None or value.shape != stored.shape:
            raise BaseModelError(
                "the scaled weight is not a weight of the component",
                where=f"{folder}: tensor {name!r}",
                allowed="scaled weights with the names and shapes of the component",
                remedy="remove the quantization first: loraline convert MODEL --to plain",
            )
        values = multiply(value.detach().float().reshape(len(value), -1).contiguous(), scale, 0)
        value.copy_(values.view(value.shape))


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


def _has_accelerate() -> bool:
    from diffusers.utils import is_accelerate_available

    return bool(is_accelerate_available())


def _unreadable(folder: Path, error: Exception) -> BaseModelError:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return BaseModelError(
        f"the component cannot be read ({first})", where=str(folder), remedy="download or save the base again"
    )
