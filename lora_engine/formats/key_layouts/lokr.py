"""Factor keys of LoKr: LyCORIS and PEFT share them, but PEFT stores alpha in its configuration.

PEFT derives the factors' shapes from its configuration, so writing searches for one that gives the adapter's shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_engine.adapters import Delta, LokrDelta, LokrRowsDelta
from lora_engine.adapters.lokr import factorize
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import LORALINE_KEYS, LYCORIS_KEYS, PEFT_KEYS, TableFactorKeys
from lora_engine.formats.lora_config import number_of, ranks_and_alphas
from lora_engine.formats.peft_types import PEFT_TYPES, PeftType
from lora_engine.formats.validate import ROWS
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    "left": "lokr_w1",
    "left_up": "lokr_w1_a",
    "left_down": "lokr_w1_b",
    "right": "lokr_w2",
    "right_up": "lokr_w2_a",
    "right_down": "lokr_w2_b",
    "right_core": "lokr_t2",
}
# Files saved from the live model carry the name of PEFT's adapter.
_LIVE = {f"{suffix}.default": factor for factor, suffix in _NAMES.items()}
_KERNELS = (1, 9, 25, 49)


@dataclass(frozen=True)
class LokrKeys(TableFactorKeys):
    """A table in which each side needs either the whole factor or both of its low-rank factors."""

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first suffix that a side lacks, or None."""
        present = {self.factor(suffix) for suffix in suffixes}
        for side in ("left", "right"):
            pair = [f"{side}_up", f"{side}_down"]
            if side not in present and not present.issuperset(pair):
                missing = [factor for factor in pair if factor not in present]
                return self.names[missing[0] if len(missing) == 1 else side]
        return None


@dataclass(frozen=True)
class RowsKeys(LokrKeys):
    """The factors of a Kronecker product, and the first and the last row (exclusive) as integers."""

    @property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return (*super().suffixes, ROWS)

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor or setting with this suffix."""
        return ROWS if suffix == ROWS else super().factor(suffix)

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first suffix that is missing, or None."""
        return super().missing(suffixes) if ROWS in suffixes else ROWS

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix.

        Raises:
            AdapterError: The rows are not two numbers.
        """
        rows = [int(row) for row in tensors[ROWS].flatten().tolist()]
        if len(rows) != 2:
            problem = f"{ROWS!r} has the shape {list(tensors[ROWS].shape)}"
            raise AdapterError(problem, allowed="the first row and the row after the last", remedy="check the file")
        factors = {self.factor(name): tensor for name, tensor in tensors.items() if name != ROWS}
        return LokrRowsDelta(LokrDelta.from_factors(factors, alpha), *rows)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix, without alpha."""
        tensors = super().write(delta)
        return (
            {**tensors, ROWS: torch.tensor([delta.start, delta.stop])} if isinstance(delta, LokrRowsDelta) else tensors
        )


def lokr_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns PEFT's `LoKrConfig` for one component's modules (by path).

    Raises:
        AdapterError: No single configuration gives the shapes of all modules.
    """
    deltas = {path: delta for path, delta in modules.items() if isinstance(delta, LokrDelta)}
    both = any(delta.left is None for delta in deltas.values())
    ranks: dict[str, tuple[int, float]] = {}
    for path, delta in deltas.items():
        # PEFT keeps a factor whole if half of its longer side is at most the rank, and always scales.
        rank = delta.rank or max(*delta.left_sides, *_right_sides(delta)[0])
        ranks[path] = (rank, float(rank) if delta.rank is None else delta.alpha)
    limits = sorted({-1, *(side for delta in deltas.values() for side in delta.left_sides)})
    mismatches: dict[int, list[str]] = {}
    for limit in limits:
        mismatches[limit] = [
            path for path, delta in deltas.items() if not _matches_shapes(delta, ranks[path][0], limit, both=both)
        ]
    best = min(limits, key=lambda limit: len(mismatches[limit]))
    if mismatches[best]:
        raise AdapterError(
            f"no single PEFT configuration gives the shapes of all factors; decompose_factor {best} fails for"
            f" {len(mismatches[best])} of {len(deltas)} modules, the first is {mismatches[best][0]!r}",
            where=mismatches[best][0],
            allowed="modules that share one decompose_factor, and all have or lack a low-rank left factor",
            remedy="choose another format, such as loraline or kohya",
        )
    return {
        **ranks_and_alphas(ranks, "alpha"),
        "decompose_both": both,
        "decompose_factor": best,
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "rank_dropout_scale": False,
        "use_effective_conv2d": any(delta.right_core is not None for delta in deltas.values()),
    }


def _matches_shapes(delta: LokrDelta, rank: int, limit: int, *, both: bool) -> bool:
    """Returns True if PEFT creates factors of these shapes with this `decompose_factor`."""
    a, b = delta.left_sides
    if (delta.left is not None) != (not both or 2 * rank >= max(a, b)):
        return False
    for c, d in _right_sides(delta):
        is_whole = 2 * rank >= max(c, d)
        if (delta.right is not None) == is_whole and _split(a * c, limit) == (a, c) and _split(b * d, limit) == (b, d):
            return True
    return False


def _split(dimension: int, limit: int) -> tuple[int, int]:
    """Returns the split of `factorize`, except that PEFT puts `limit` first if it divides the dimension."""
    return (limit, dimension // limit) if limit > 0 and dimension % limit == 0 else factorize(dimension, limit)


def _right_sides(delta: LokrDelta) -> list[tuple[int, int]]:
    """Returns the possible sides of the right factor; the size of a kernel flattened into `right_down` is unknown."""
    rows, columns = delta.right_sides
    if delta.right is not None:
        return [(rows, delta.right.shape[1])]
    kernels = (1,) if delta.right_core is not None else _KERNELS
    return [(rows, columns // size) for size in kernels if columns % size == 0]


def _scaled(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Returns the delta scaled by PEFT's configuration, which PEFT also applies if both factors are whole."""
    if not isinstance(delta, LokrDelta) or delta.rank is not None or delta.left is None:
        return delta
    alpha = number_of(config, path, where, "alpha", "alpha_pattern")
    rank = number_of(config, path, where, "r", "rank_pattern")
    if alpha is None or not rank or alpha == rank:
        return delta
    left = delta.left.to(torch.promote_types(delta.left.dtype, torch.float32))
    return delta.with_factors({**delta.factors(), "left": left * (alpha / rank)})


LYCORIS_KEYS.add(LokrKeys("lokr", _NAMES))
LORALINE_KEYS.add(RowsKeys("lokr-rows", _NAMES))
PEFT_KEYS.add(LokrKeys("lokr", _NAMES, aliases=_LIVE))
PEFT_TYPES.add("LOKR", PeftType(("lokr",), "alpha", lokr_settings, _scaled))
