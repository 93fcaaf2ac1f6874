"""Regularizes the training of LoRA deltas: dropout of ranks and of modules, and a limit of their norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.delta import Delta
from lora_engine.adapters.lora import LoraDelta
from lora_engine.errors import SettingsError


def check_low_rank(adapter: Adapter, setting: str) -> None:
    """Checks that every delta of an adapter is a product of `up` and `down`, which a setting needs.

    Raises:
        SettingsError: One is not.
    """
    for name, delta in adapter.modules.items():
        if not isinstance(delta, LoraDelta) or delta.mid is not None:
            form = "in Tucker form" if isinstance(delta, LoraDelta) else f"of kind {delta.kind!r}"
            raise SettingsError(
                f"{setting} needs deltas that are up @ down, but that of {name!r} is {form}",
                where=setting,
                allowed="kinds lora, rslora and lora-fa, without tucker",
                remedy=f"leave {setting} out, or choose another kind",
            )


def draw_rank_mask(delta: Delta, share: float, generator: torch.Generator) -> Tensor | None:
    """Returns the factors of a delta's ranks: float32 [r], 0 or 1 / (1 - share); None for other kinds than LoRA."""
    if not isinstance(delta, LoraDelta):
        return None
    is_kept = torch.rand(delta.rank, generator=generator) >= share
    return (is_kept.to(torch.float32) / (1.0 - share)).to(delta.up.device)


def mask_first_ranks(delta: Delta, rank: int) -> Tensor | None:
    """Returns the mask [r] of a delta's first ranks: float32, 1 or 0; None where all of them count."""
    if not isinstance(delta, LoraDelta) or delta.rank <= rank:
        return None
    return (torch.arange(delta.rank) < rank).to(delta.up.device, torch.float32)


def cut_ranks(adapter: Adapter, rank: int) -> Adapter:
    """Returns an adapter with the first ranks of its LoRA deltas, at the same scale; those of fewer ranks are whole."""
    return replace(adapter, modules={name: _cut(delta, rank) for name, delta in adapter.modules.items()})


def _cut(delta: Delta, rank: int) -> Delta:
    if not isinstance(delta, LoraDelta) or delta.rank <= rank:
        return delta
    down, up = delta.down[:rank].clone(), delta.up[:, :rank].clone()
    return replace(delta, down=down, up=up, alpha=delta.scale * rank)


def mask_ranks(delta: Delta, mask: Tensor) -> Delta:
    """Returns the delta with the columns of `up` multiplied by a mask [r]; keeps the graph."""
    factors = dict(delta.factors())
    up = factors["up"]
    factors["up"] = up * mask.to(up.dtype).view(1, -1, *[1] * (up.dim() - 2))
    return delta.with_factors(factors)


def draw_skipped(names: list[str], share: float, generator: torch.Generator) -> set[str]:
    """Returns the modules to skip, each with the probability `share`; never all of them."""
    draws = dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
    skipped = {name for name, draw in draws.items() if draw < share}
    # Without any module the loss would have no gradient.
    return skipped - {max(draws, key=draws.__getitem__)} if len(skipped) == len(names) else skipped


@torch.no_grad()
def limit_norms(deltas: Mapping[str, Delta], limit: float) -> None:
    """Scales LoRA factors in place so that no delta has a larger Frobenius norm; `up` and `down` by the same factor.

    A frozen `down` keeps its value. sd-scripts' `scale_weight_norms`.

    Args:
        deltas: Module name to delta; other kinds are not changed.
        limit: Largest norm of `scale * up @ down`; above 0.
    """
    for delta in deltas.values():
        if not isinstance(delta, LoraDelta):
            continue
        up, down = delta.up.flatten(1), delta.down.flatten(1)
        # |U D|^2 is the sum of (U^T U) * (D D^T), without the product itself.
        norm = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0.0).sqrt() * abs(delta.scale)
        ratio = (limit / norm).clamp(max=1.0)
        if "down" in delta.frozen:
            delta.up.mul_(ratio)
        else:
            delta.up.mul_(ratio.sqrt())
            delta.down.mul_(ratio.sqrt())
