"""How files spell the factors of LoKr: LyCORIS and PEFT alike, but PEFT keeps alpha in its configuration.

PEFT makes the factors' shapes by its configuration, so that has to be found again that gives those of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_engine.adapters import Delta, LokrDelta
from lora_engine.adapters.lokr import factorise
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import LYCORIS, PEFT, TableFactorKeys
from lora_engine.formats.lora_config import number_of, ranks_and_alphas
from lora_engine.formats.peft_types import PEFT_TYPES, PeftType

_NAMES = {
    "left": "lokr_w1",
    "left_up": "lokr_w1_a",
    "left_down": "lokr_w1_b",
    "right": "lokr_w2",
    "right_up": "lokr_w2_a",
    "right_down": "lokr_w2_b",
    "right_core": "lokr_t2",
}
# The name of PEFT's adapter, where somebody saved the live model's names.
_LIVE = {f"{suffix}.default": factor for factor, suffix in _NAMES.items()}
_KERNELS = (1, 9, 25, 49)


@dataclass(frozen=True)
class LokrKeys(TableFactorKeys):
    """A table of which each side needs either the whole factor or both of the two that make it up."""

    def missing(self, suffixes: Collection[str]) -> str | None:
        """The first suffix that a side lacks, or None."""
        there = {self.factor(suffix) for suffix in suffixes}
        for side in ("left", "right"):
            pair = [f"{side}_up", f"{side}_down"]
            if side not in there and not there.issuperset(pair):
                lone = [factor for factor in pair if factor not in there]
                return self.names[lone[0] if len(lone) == 1 else side]
        return None


def lokr_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """PEFT's `LoKrConfig` for one component's modules (by path).

    Raises:
        AdapterError: No one configuration gives the shapes of all of them.
    """
    deltas = {path: delta for path, delta in modules.items() if isinstance(delta, LokrDelta)}
    both = any(delta.left is None for delta in deltas.values())
    whole: dict[str, tuple[int, float]] = {}
    for path, delta in deltas.items():
        # PEFT keeps a factor whole where half of its longer side is not above the rank, and always scales.
        rank = delta.rank or max(*delta.left_sides, *_right(delta)[0])
        whole[path] = (rank, float(rank) if delta.rank is None else delta.alpha)
    limits = sorted({-1, *(side for delta in deltas.values() for side in delta.left_sides)})
    orphans: dict[int, list[str]] = {}
    for limit in limits:
        orphans[limit] = [path for path, delta in deltas.items() if not _gives(delta, whole[path][0], limit, both=both)]
    best = min(limits, key=lambda limit: len(orphans[limit]))
    if orphans[best]:
        raise AdapterError(
            f"no one setting of PEFT gives the shapes of all factors; with decompose_factor {best} it fails for"
            f" {len(orphans[best])} of {len(deltas)} modules, the first is {orphans[best][0]!r}",
            where=orphans[best][0],
            allowed="modules that were all made with one factor, and with or without a left factor of low rank",
            remedy="choose another format, such as loraline or kohya",
        )
    return {
        **ranks_and_alphas(whole, "alpha"),
        "decompose_both": both,
        "decompose_factor": best,
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "rank_dropout_scale": False,
        "use_effective_conv2d": any(delta.right_core is not None for delta in deltas.values()),
    }


def _gives(delta: LokrDelta, rank: int, limit: int, *, both: bool) -> bool:
    """Whether PEFT makes the factors' shapes with this `decompose_factor`."""
    a, b = delta.left_sides
    if (delta.left is not None) != (not both or 2 * rank >= max(a, b)):
        return False
    for c, d in _right(delta):
        is_whole = 2 * rank >= max(c, d)
        if (delta.right is not None) == is_whole and _split(a * c, limit) == (a, c) and _split(b * d, limit) == (b, d):
            return True
    return False


def _split(dimension: int, limit: int) -> tuple[int, int]:
    """As `factorise`, but PEFT does not put the smaller number first where `limit` divides."""
    return (limit, dimension // limit) if limit > 0 and dimension % limit == 0 else factorise(dimension, limit)


def _right(delta: LokrDelta) -> list[tuple[int, int]]:
    """The sides that the right factor may have: a kernel that is flattened into `right_down` does not show."""
    rows, columns = delta.right_sides
    if delta.right is not None:
        return [(rows, delta.right.shape[1])]
    kernels = (1,) if delta.right_core is not None else _KERNELS
    return [(rows, columns // size) for size in kernels if columns % size == 0]


def _scaled(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Where both factors are whole, PEFT scales all the same, by the rank of its configuration."""
    if not isinstance(delta, LokrDelta) or delta.rank is not None or delta.left is None:
        return delta
    alpha = number_of(config, path, where, "alpha", "alpha_pattern")
    rank = number_of(config, path, where, "r", "rank_pattern")
    if alpha is None or not rank or alpha == rank:
        return delta
    left = delta.left.to(torch.promote_types(delta.left.dtype, torch.float32))
    return delta.with_factors({**delta.factors(), "left": left * (alpha / rank)})


LYCORIS.add(LokrKeys("lokr", _NAMES))
PEFT.add(LokrKeys("lokr", _NAMES, aliases=_LIVE))
PEFT_TYPES.add("LOKR", PeftType(("lokr",), "alpha", lokr_settings, _scaled))
