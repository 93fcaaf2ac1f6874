"""Defines `Adapter`: deltas by canonical module name. Knows no file format, no path and no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from lora_engine.adapters.delta import Delta, same_delta
from lora_engine.finite import is_finite, not_finite

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """One adapter: its deltas, and the base that they were trained for.

    Attributes:
        modules: Canonical dotted module name (`unet.down_blocks.0....to_q`) to its delta; sorted by name.
        base: Family of the base model; empty means unknown.
        fingerprint: Digest of the base that it was trained for; None means unknown.
    """

    modules: Mapping[str, Delta] = field(default_factory=dict)
    base: str = ""
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        ordered = dict(sorted(self.modules.items()))
        object.__setattr__(self, "modules", MappingProxyType(ordered))

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the base that the adapter changes, such as `text_encoder` and `unet`; sorted."""
        return tuple(sorted({name.partition(".")[0] for name in self.modules}))

    def __eq__(self, other: object) -> bool:
        """Returns True if names, kinds, settings, base and dtypes are equal, and the factors bit for bit."""
        if not isinstance(other, Adapter):
            return NotImplemented
        same_base = (self.base, self.fingerprint) == (other.base, other.fingerprint)
        return (
            same_base
            and list(self.modules) == list(other.modules)
            and all(same_delta(delta, other.modules[name]) for name, delta in self.modules.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Returns the family, the kinds, the ranks and the number of modules."""
        kinds = "+".join(sorted({delta.kind for delta in self.modules.values()}))
        ranks = sorted({delta.rank for delta in self.modules.values() if delta.rank})
        rank = f" r={ranks[0]}" if len(ranks) == 1 else f" r={ranks[0]}-{ranks[-1]}" if ranks else ""
        return f"<Adapter {self.base or 'unknown base'} {kinds or 'empty'}{rank}, {len(self.modules)} modules>"

    def to_export(self) -> Adapter:
        """Returns the adapter in export form; see `Delta.to_export`."""
        return replace(self, modules={name: delta.to_export() for name, delta in self.modules.items()})

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Adapter:
        """Returns the adapter with its factors in another dtype or on another device.

        Raises:
            AdapterError: A value is not finite in the dtype (the maximum of float16 is 65504).
        """
        modules = {name: _cast(name, delta, dtype, device) for name, delta in self.modules.items()}
        return replace(self, modules=modules)


def _cast(name: str, delta: Delta, dtype: torch.dtype | None, device: torch.device | str | None) -> Delta:
    originals = delta.factors()
    factors = {key: factor.to(device=device, dtype=dtype) for key, factor in originals.items()}
    for key, factor in factors.items():
        if dtype is not None and not is_finite(factor):
            raise not_finite(f"module {name!r}, factor {key!r}", factor, originals[key])
    return delta.with_factors(factors)
