"""Resolves the references of a pipeline file for each cell of its matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.spec.document import PipelineDocument, secret_error, setting_of, texts_of
from flows.spec.head import EXPANDED
from flows.spec.matrix import MatrixCell
from flows.spec.overlays import Relocation
from flows.spec.references import References, Resolved, escape
from lora_engine.documents import Where
from registry.store.redaction import is_secret_key
from tasks.errors import SpecError

_MAX_VALUES = 500_000


class PipelineTemplate:
    """The data of a file, and the places of its references; parts without references are shared by all cells."""

    def __init__(self, document: PipelineDocument) -> None:
        self.document = document
        self.data = {key: value for key, value in document.data.items() if key not in EXPANDED}
        texts = list(texts_of(self.data))
        self.size = sum(location[:1] != ("matrix",) for location in document.lines)
        self._relocation = Relocation(document)
        self._touched: set[Where] = set()
        for location, text in texts:
            if "$" in text:
                self._touched.update(location[:size] for size in range(len(location) + 1))

    def check_size(self, cells: int) -> None:
        """Refuses a matrix of a large file.

        Raises:
            SpecError: The pipelines have too many values in all.
        """
        if cells > 1 and cells * self.size > _MAX_VALUES:
            raise SpecError(
                f"{cells} pipelines of {self.size} values each",
                where=self.document.where(("matrix",)),
                allowed=f"at most {_MAX_VALUES} values in all",
            )

    def name(self, references: References) -> str:
        """Returns the name of a cell's pipeline."""
        written: dict[Where, tuple[Any, str]] = {}
        return str(self._expand(self.data.get("name"), ("name",), references, written))

    def expand(self, references: References, cell: MatrixCell | None) -> PipelineDocument:
        """Returns the data of a cell's pipeline, with the paths of other files made relative."""
        written: dict[Where, tuple[Any, str]] = {}
        data = self._expand(self.data, (), references, written)
        source = self.document
        moved = self._relocation.apply(data)
        return PipelineDocument(source.path, moved, source.lines, source.files, written, cell)

    def _expand(
        self, value: Any, location: Where, references: References, written: dict[Where, tuple[Any, str]]
    ) -> Any:
        if location not in self._touched:
            return value
        if isinstance(value, Mapping):
            return {key: self._expand(entry, (*location, key), references, written) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._expand(entry, (*location, index), references, written) for index, entry in enumerate(value)]
        resolved = references.resolve(value, lambda: self.document.where(location))
        self._check_secret(resolved, location)
        if resolved.secret is not None:
            written[location] = (resolved.value, resolved.secret)
        elif isinstance(resolved.value, str) and escape(resolved.value) != resolved.value:
            written[location] = (resolved.value, escape(resolved.value))
        return resolved.value

    def _check_secret(self, resolved: Resolved, location: Where) -> None:
        """Allows a secret only in settings whose values every record hides, and there only a reference."""
        key, where = setting_of(location), self.document.where(location)
        if resolved.secret is not None and not is_secret_key(key):
            raise SpecError(
                f"{'.'.join(map(str, location))} refers to a secret, which would be recorded with the results",
                where=where,
                allowed="a secret in settings such as api_key, password or hf_token",
            )
        if resolved.secret is None and is_secret_key(key) and resolved.value not in ("", None):
            raise secret_error(".".join(map(str, location)), where)
