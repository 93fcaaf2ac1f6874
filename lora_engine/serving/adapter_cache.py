"""Keeps adapters that were read in memory, up to a number of bytes; those that were used last stay."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lora_engine.adapters.row_factors import RowFactors, find_row_obstacle
from lora_engine.bases.base import BaseModel
from lora_engine.errors import AdapterError
from lora_engine.formats import Bundle, read_bundle
from lora_engine.inference.image_metadata import UsedAdapter


def text_part(bundle: Bundle) -> Bundle:
    """Returns what an adapter file changes of the text encoders, with its learned tokens."""
    return _part(bundle, lambda name: name.startswith("text_encoder"))


def denoiser_part(bundle: Bundle) -> Bundle:
    """Returns what an adapter file changes of the denoiser."""
    return replace(_part(bundle, lambda name: not name.startswith("text_encoder")), embeddings=())


def _part(bundle: Bundle, is_in: Callable[[str], bool]) -> Bundle:
    modules = {name: delta for name, delta in bundle.adapter.modules.items() if is_in(name)}
    return replace(bundle, adapter=replace(bundle.adapter, modules=modules))


@dataclass(eq=False)
class _Entry:
    base: BaseModel
    file: Path
    bundle: Bundle

    @cached_property
    def factors(self) -> RowFactors:
        adapter = denoiser_part(self.bundle).adapter
        return RowFactors.of(self.base, adapter) if adapter.modules else RowFactors({})

    @cached_property
    def digests(self) -> UsedAdapter:
        return UsedAdapter.of_file(self.file, self.file.name)

    @property
    def nbytes(self) -> int:
        tensors = [factor for delta in self.bundle.adapter.modules.values() for factor in delta.factors().values()]
        tensors += [vectors for embedding in self.bundle.embeddings for vectors in embedding.vectors.values()]
        factors = self.factors.nbytes if "factors" in self.__dict__ else 0
        return sum(tensor.nbytes for tensor in tensors) + factors


class AdapterCache:
    """The adapters of files, each read at most once while it is kept.

    Args:
        base: The base that they are for.
        limit: Bytes of all tensors; the adapter that was used last is kept whatever its size.
    """

    def __init__(self, base: BaseModel, limit: int) -> None:
        self._base, self._limit = base, limit
        self._names = base.module_names()
        self._entries: OrderedDict[Path, _Entry] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, file: Path) -> bool:
        return file in self._entries

    def bundle(self, file: Path) -> Bundle:
        """Returns the contents of an adapter file.

        Raises:
            AdapterError: See `read_bundle`.
        """
        return self._entry(file).bundle

    def row_factors(self, file: Path) -> RowFactors:
        """Returns the factors of the denoiser's part of an adapter.

        Raises:
            AdapterError: The file cannot be read, or the adapter does not fit or has no products by row.
        """
        factors = self._entry(file).factors
        self._evict()
        return factors

    def row_obstacle(self, file: Path) -> str | None:
        """Returns why an adapter cannot be applied to single rows of a batch; None if it can."""
        try:
            adapter = denoiser_part(self.bundle(file)).adapter
            return find_row_obstacle(self._base, adapter) if adapter.modules else None
        except AdapterError as error:
            return error.problem

    def describe(self, file: Path, reference: str) -> UsedAdapter:
        """Returns the digests of a file for the metadata of images."""
        name, at, number = reference.partition("@")
        label = f"{name}-v{number}" if at else Path(reference).stem
        return replace(self._entry(file).digests, label=label, reference=reference)

    def forget(self, file: Path) -> None:
        """Drops an adapter."""
        self._entries.pop(file, None)

    def _entry(self, file: Path) -> _Entry:
        if file not in self._entries:
            self._entries[file] = _Entry(self._base, file, read_bundle(file, self._names))
        self._entries.move_to_end(file)
        self._evict()
        return self._entries[file]

    def _evict(self) -> None:
        while len(self._entries) > 1 and self.nbytes > self._limit:
            self._entries.popitem(last=False)
