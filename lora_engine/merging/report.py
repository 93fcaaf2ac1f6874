"""Defines the report of a merge or a resize. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One module's result.

    Attributes:
        kind: Adapter kind of the result.
        rank: Rank of the result; None for kinds without one.
        retained: Share of the squared Frobenius norm that the result keeps, in [0, 1]; 1 without compression.
        energy: Squared Frobenius norm before compression; 0 if it was not computed.
    """

    kind: str
    rank: int | None
    retained: float = 1.0
    energy: float = 0.0

    @property
    def error(self) -> float:
        """Relative Frobenius error of the compression."""
        return float((1.0 - self.retained) ** 0.5)


@dataclass(frozen=True)
class Report:
    """The results of all modules by canonical name.

    Attributes:
        modules: The results by module.
        assumed: What was assumed because a file does not state it; empty if nothing.
    """

    modules: Mapping[str, ModuleReport]
    assumed: str = ""

    @property
    def retained(self) -> float:
        """Share of the squared norm of all compressed modules that is kept; 1 if none was compressed."""
        total = sum(module.energy for module in self.modules.values())
        kept = sum(module.energy * module.retained for module in self.modules.values())
        return kept / total if total else 1.0

    @property
    def worst(self) -> tuple[str, float]:
        """The module that keeps the smallest share of its squared norm, and that share."""
        return min(((name, module.retained) for name, module in self.modules.items()), key=lambda entry: entry[1])

    def as_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        shown = {
            name: {"kind": module.kind, "rank": module.rank, "retained": module.retained}
            for name, module in self.modules.items()
        }
        assumed = {"assumed": self.assumed} if self.assumed else {}
        return {"retained": self.retained, "modules": shown} | assumed
