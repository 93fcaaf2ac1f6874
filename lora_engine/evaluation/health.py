"""Examines the weights of an adapter without its base: effective ranks, norms, the range of float16, dead factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.decomposition import whole_svd
from lora_engine.merging.compress import plain_factors
from lora_engine.merging.deltas import ModuleDeltas

DEAD = 1e-4
"""A component of a module is dead if its norm is at most this share of the largest component's."""
_FLOAT16 = torch.finfo(torch.float16)
_MAX_SPECTRUM = 64


@dataclass(frozen=True)
class ModuleHealth:
    """The weights of one module.

    Attributes:
        kind: Kind of the delta.
        rank: Rank of its factors; None if the kind has none.
        effective_rank: Exponential of the entropy of the singular values (Roy and Vetterli 2007); None if the delta
            depends on the base, 0 for a delta of zeros.
        norm: Frobenius norm of the weight's delta; None as above.
        largest: Largest absolute value of a factor.
        dead: Number of dead components of a LoRA; None for other kinds.
        underflow: Share of the values other than 0 that float16 rounds to 0.
        spectrum: Singular values of the delta, the largest first, at most 64; empty if it depends on the base.
    """

    kind: str
    rank: int | None
    effective_rank: float | None
    norm: float | None
    largest: float
    dead: int | None
    underflow: float
    spectrum: tuple[float, ...]

    @property
    def notes(self) -> list[str]:
        """What is wrong with the module, in words; empty for a healthy one."""
        notes = []
        if self.norm == 0.0:
            notes.append("changes nothing")
        elif self.dead:
            notes.append(f"{self.dead} of {self.rank} components are dead")
        if not math.isfinite(self.largest):
            notes.append("has NaN or infinite values")
        elif self.largest > float(_FLOAT16.max):
            notes.append("overflows float16")
        if self.underflow > 0.01:
            notes.append(f"float16 rounds {self.underflow:.0%} of the values to 0")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Returns the module as JSON values, with its notes."""
        return asdict(self) | {"spectrum": list(self.spectrum), "notes": self.notes}


def examine_adapter(modules: Mapping[str, Delta]) -> dict[str, ModuleHealth]:
    """Returns the health of every module, by name; reads no base."""
    return {name: examine_delta(delta) for name, delta in modules.items()}


def examine_delta(delta: Delta) -> ModuleHealth:
    """Returns the health of one delta."""
    values = [factor.detach().double().flatten() for factor in delta.factors().values()]
    joined = torch.cat(values) if values else torch.zeros(1, dtype=torch.float64)
    spectrum = _singular_values(delta)
    nonzero = joined != 0.0
    rounded = nonzero & (joined.to(torch.float16) == 0.0)
    return ModuleHealth(
        kind=delta.kind,
        rank=delta.rank,
        effective_rank=None if spectrum is None else effective_rank(spectrum),
        norm=None if spectrum is None else float(torch.linalg.vector_norm(spectrum)),
        largest=float(joined.abs().max()),
        dead=_count_dead(delta) if isinstance(delta, LoraDelta) else None,
        underflow=float(rounded.sum()) / max(1, int(nonzero.sum())),
        spectrum=() if spectrum is None else tuple(spectrum[:_MAX_SPECTRUM].tolist()),
    )


def effective_rank(spectrum: Tensor) -> float:
    """Returns the exponential of the entropy of normalized singular values: k for k equal ones, 0 if all are 0."""
    total = float(spectrum.sum())
    if total == 0.0 or not math.isfinite(total):
        return 0.0
    shares = spectrum.double() / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def _singular_values(delta: Delta) -> Tensor | None:
    if isinstance(delta, LoraDelta):
        down, up = (factor.detach().double() for factor in plain_factors(delta))
        core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T * delta.scale
        return torch.linalg.svdvals(core) if bool(torch.isfinite(core).all()) else None
    if delta.reads_base or delta.weight_shape is None:
        return None
    dense = ModuleDeltas.of("", [delta]).dense(delta)[0].float()
    if not bool(torch.isfinite(dense).all()):
        return None
    if not bool(dense.any()):
        return torch.zeros(1, dtype=torch.float64)
    return whole_svd(dense.reshape(len(dense), -1))[1].double()


def _count_dead(delta: LoraDelta) -> int:
    down, up = (factor.detach().double() for factor in plain_factors(delta))
    norms = torch.linalg.vector_norm(down, dim=1) * torch.linalg.vector_norm(up, dim=0)
    return int((norms <= DEAD * norms.max()).sum())
