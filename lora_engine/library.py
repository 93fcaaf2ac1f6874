"""Loads, saves, attaches, merges and resizes adapters: what `import lora_engine as le` offers on whole adapters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_engine.adapters import Adapter, Attachment, module_shapes
from lora_engine.adapters import attach as attach_adapter
from lora_engine.adapters.tree import Base
from lora_engine.bases.base import BaseModel
from lora_engine.bases.structure import base_module_shapes
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import FilePath
from lora_engine.formats import Bundle, read_bundle, write_adapter
from lora_engine.merging.files import learns, load_base_if_read, merge_recipe, merged_card
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import parse_options
from lora_engine.merging.report import Report
from lora_engine.merging.resize import resize as resize_adapter
from lora_engine.merging.spec import Weight


@dataclass(frozen=True, eq=False, repr=False)
class LoadedAdapter(Bundle):
    """An adapter with its card and its learned tokens.

    Attributes:
        adapter: The deltas by canonical module name.
        card: The metadata of the file.
        embeddings: Tokens that were learned with the adapter.
        assumptions: What the file does not state and the reader assumed; empty for nothing.
        report: The share of the merge that each module keeps; None for an adapter that was not merged or resized.
    """

    report: Report | None = None

    def __repr__(self) -> str:
        tokens = f", {len(self.embeddings)} tokens" if self.embeddings else ""
        return f"{repr(self.adapter)[:-1]}{tokens}>"

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the base that the adapter changes, such as `unet` and `text_encoder`, sorted."""
        return self.adapter.components

    def only(self, *components: str) -> LoadedAdapter:
        """Returns the adapter without the modules of other components.

        Raises:
            AdapterError: The adapter changes none of the components.
        """
        modules = {n: delta for n, delta in self.adapter.modules.items() if n.partition(".")[0] in components}
        if not modules:
            raise AdapterError(f"no module in {components!r}", allowed=", ".join(self.components), remedy="name one")
        return replace(self, adapter=replace(self.adapter, modules=modules))

    def save(
        self,
        path: FilePath,
        *,
        format: str = "loraline",  # noqa: A002 (the name of the option everywhere)
        dtype: torch.dtype | None = None,
        base: FilePath | None = None,
    ) -> list[Path]:
        """Writes the adapter; the same adapter and card give the same bytes.

        Args:
            path: A file that ends in `.safetensors`, or a folder, which gets the file names of the format.
            format: Name of a codec, such as `kohya`, `peft` or `diffusers`; see `codecs`.
            dtype: Dtype of the tensors; None keeps each.
            base: A base for formats that number its modules (cloneofsimo); see `load`.

        Returns:
            The files that were written.

        Raises:
            AdapterError: The format or the dtype cannot hold the adapter.
            SettingsError: No such format.
        """
        shapes = None if base is None else base_module_shapes(base)
        return write_adapter(
            path,
            self.adapter,
            format=format,
            card=self.card,
            dtype=dtype,
            embeddings=self.embeddings,
            module_names=shapes,
        )

    def attached(self, model: Base, scale: float = 1.0, *, trainable: bool = False) -> Attachment:
        """Attaches the adapter until the block ends; see `attach`."""
        if self.embeddings and self.adapter.modules:
            tokens = ", ".join(repr(embedding.token) for embedding in self.embeddings)
            warnings.warn(
                f"the learned tokens {tokens} are not attached. Fix: load their file with the pipeline, or use "
                "`lora_engine.inference.textual_inversion.attach_embeddings` on a Loraline base",
                stacklevel=2,
            )
        return attach(model, self.adapter, scale, trainable=trainable)


def load(path: FilePath, base: FilePath | Base | None = None) -> LoadedAdapter:
    """Reads an adapter of any format; the names of its tensors tell which.

    Args:
        path: A `.safetensors` file, a `.pt` file (read by a process without rights), or a folder that holds an adapter.
        base: What the adapter must fit: a published architecture (`sd15`, `sdxl`, ...), `tiny`, a diffusers folder, a
            checkpoint file, a hub id, or a model in memory. None trusts the names in the file.

    Raises:
        AdapterError: The file is no adapter, is damaged, or does not fit the base.
        BaseModelError: No such base.
    """
    if isinstance(base, str | os.PathLike):
        bundle = read_bundle(path, base_module_shapes(base))
    else:
        bundle = read_bundle(path, None if base is None else module_shapes(base))
    return LoadedAdapter(bundle.adapter, bundle.card, bundle.embeddings, bundle.assumptions)


def attach(model: Base, adapter: Adapter | LoadedAdapter, scale: float = 1.0, *, trainable: bool = False) -> Attachment:
    """Wraps the layers that an adapter changes; no weight is touched.

    Args:
        model: A Loraline base, a diffusers pipeline, a torch module (where the adapter changes one component alone), or
            modules by component name.
        adapter: The adapter; its factors are copied to the devices of the layers.
        scale: Strength; 0 gives the output of the base bit for bit.
        trainable: True if the factors take gradients.

    Returns:
        A context manager that detaches at its end; `detach()` does it by hand.

    Raises:
        AdapterError: A module is missing, has another shape, or cannot carry an adapter; the model is untouched.
    """
    deltas = adapter.adapter if isinstance(adapter, LoadedAdapter) else adapter
    return attach_adapter(model, deltas, scale, trainable=trainable)


def merge(
    adapters: Sequence[LoadedAdapter | FilePath],
    weights: Sequence[Weight] | None = None,
    method: str = "concatenate",
    *,
    seed: int = 0,
    base: FilePath | BaseModel | None = None,
    **options: Any,
) -> LoadedAdapter:
    """Merges adapters into one; the result does not depend on their order.

    Args:
        adapters: At least one, all for the same base.
        weights: One per adapter: a number, or numbers by pattern over module names; None is 1 for each.
        method: Name of a merge method; see `METHODS`.
        seed: Seed of the methods that draw random numbers.
        base: The base, for kinds whose delta depends on its weights (DoRA, OFT, (IA)3).
        options: Options of the method, such as `density=0.5` of `ties`.

    Raises:
        SettingsError: No adapter, an unknown method or option, or weights that do not fit.
        AdapterError: The adapters are for different bases, or a kind cannot be merged by the method.
    """
    chosen = parse_options(method, options)
    if learns(chosen):
        raise SettingsError(f"{method!r} needs a dataset", remedy="use `lora_engine.merging.files.merge_files`")
    loaded = [item if isinstance(item, LoadedAdapter) else load(item) for item in adapters]
    scales: Sequence[Weight] = [1.0] * len(loaded) if weights is None else weights
    deltas, cards = [item.adapter for item in loaded], [item.card for item in loaded]
    if base is None or isinstance(base, str | os.PathLike):
        base = load_base_if_read(deltas, chosen, base)
    merged, report = merge_adapters(deltas, scales, chosen, seed=seed, base=base)
    titles = [card.title or "adapter" for card in cards]
    card = merged_card(cards, titles, scales, method, merge_recipe(chosen, seed, scales, report))
    return LoadedAdapter(merged, card, report=report)


def resize(adapter: LoadedAdapter, rank: int, **options: Any) -> LoadedAdapter:
    """Compresses every module to a rank by truncated SVD; see `lora_engine.merging.resize`.

    Args:
        adapter: The adapter.
        rank: Rank of every module at most.
        options: Further options of `lora_engine.merging.resize.resize`.
    """
    smaller, report = resize_adapter(adapter.adapter, rank=rank, **options)
    return replace(adapter, adapter=smaller, report=report)
