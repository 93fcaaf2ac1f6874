"""Reads the components of a base through the classes of diffusers and transformers: safetensors only, offline.

Also the canonical names of modules. Computes nothing.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_engine.bases.source import BaseSource
from lora_engine.errors import BaseModelError

_LEVEL = "text_model"


def load_component(cls: Any, source: BaseSource, component: str, dtype: torch.dtype) -> nn.Module:
    """One component with weights, frozen and in evaluation mode, on the CPU.

    Args:
        cls: The class of diffusers or transformers that reads it.
        source: Where the base lies.
        component: The sub-folder.
        dtype: Of the weights in memory.

    Raises:
        BaseModelError: The files are damaged or do not fit the configuration.
    """
    keyword = {"torch_dtype": dtype} if cls.__module__.startswith("diffusers") else {"dtype": dtype}
    if "torch_dtype" in keyword:
        keyword["low_cpu_mem_usage"] = _has_accelerate()
    try:
        # Building a module before its weights are read draws from the global generator; give it back as it was.
        with torch.random.fork_rng(devices=[]), _quiet():
            module = cls.from_pretrained(
                str(source.folder),
                subfolder=component,
                use_safetensors=True,
                local_files_only=True,
                variant=source.layout.variants[component],
                **keyword,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unreadable(source.folder / component, error) from error
    if not isinstance(module, nn.Module):
        raise BaseModelError(f"{cls.__name__} gave no module", where=str(source.folder / component))
    return module.requires_grad_(False).eval()


def load_tokenizer(cls: Any, source: BaseSource, component: str) -> Any:
    """A tokenizer, from the files of the folder alone.

    Raises:
        BaseModelError: The files are damaged.
    """
    try:
        return cls.from_pretrained(str(source.folder), subfolder=component, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _unreadable(source.folder / component, error) from error


def canonical_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The adaptable layers of all components, under their canonical names."""
    return [
        f"{component}.{_insert_level(component, module, path)}"
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]


def locate_module(modules: Mapping[str, nn.Module], name: str, known: Iterable[str]) -> tuple[nn.Module, str]:
    """The parent of the module of a canonical name, and the attribute that holds it there.

    Raises:
        BaseModelError: There is no such module; names the nearest.
    """
    component, _, path = name.partition(".")
    root = modules.get(component)
    if root is not None and path:
        if _lacks_level(component, root):
            path = path.removeprefix(f"{_LEVEL}.")
        parent_path, _, leaf = path.rpartition(".")
        with contextlib.suppress(AttributeError):
            parent = root.get_submodule(parent_path)
            if isinstance(getattr(parent, leaf), nn.Module):
                return parent, leaf
    near = difflib.get_close_matches(name, list(known), n=2)
    raise BaseModelError(
        f"the base has no module {name!r}",
        allowed=f"names such as {' or '.join(map(repr, near))}" if near else f"names in {', '.join(modules)}",
    )


def _insert_level(component: str, root: nn.Module, path: str) -> str:
    return f"{_LEVEL}.{path}" if _lacks_level(component, root) else path


def _lacks_level(component: str, root: nn.Module) -> bool:
    # transformers 5 dropped the level from CLIPTextModel, and kept it in CLIPTextModelWithProjection.
    return component.startswith("text_encoder") and not hasattr(root, _LEVEL)


def _has_accelerate() -> bool:
    from diffusers.utils import is_accelerate_available

    return bool(is_accelerate_available())


def _unreadable(folder: Path, error: Exception) -> BaseModelError:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return BaseModelError(
        f"the component cannot be read ({first})", where=str(folder), remedy="download or save the base again, whole"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
