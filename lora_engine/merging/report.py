"""What a merge or a resize made of each module, in numbers. No tensors live here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One module's result.

    Attributes:
        kind: Of the result.
        rank: Of the result; None where the kind has none.
        retained: Share of the squared Frobenius norm that the result keeps, in [0, 1]; 1 where nothing was compressed.
        energy: The squared Frobenius norm before compression; 0 where nothing was compressed and it was not needed.
    """

    kind: str
    rank: int | None
    retained: float = 1.0
    energy: float = 0.0

    @property
    def error(self) -> float:
        """The relative Frobenius error of the compression."""
        return float((1.0 - self.retained) ** 0.5)


@dataclass(frozen=True)
class Report:
    """The results of all modules, by canonical name."""

    modules: Mapping[str, ModuleReport]

    @property
    def retained(self) -> float:
        """Share of the squared norm of all compressed modules together that is kept; 1 where none was compressed."""
        total = sum(module.energy for module in self.modules.values())
        kept = sum(module.energy * module.retained for module in self.modules.values())
        return kept / total if total else 1.0

    @property
    def worst(self) -> tuple[str, float]:
        """The module that keeps the smallest share, and the share."""
        return min(((name, module.retained) for name, module in self.modules.items()), key=lambda entry: entry[1])

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        shown = {
            name: {"kind": module.kind, "rank": module.rank, "retained": module.retained}
            for name, module in self.modules.items()
        }
        return {"retained": self.retained, "modules": shown}
