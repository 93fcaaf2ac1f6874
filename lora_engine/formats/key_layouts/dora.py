"""Factor keys of DoRA: those of the inner kind (the direction), and one tensor for the magnitude."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta, DoraDelta, LokrRowsDelta
from lora_engine.adapters.dora import INNER, MAGNITUDE
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LORALINE_KEYS, LYCORIS_KEYS, PEFT_KEYS, FactorKeys, KeyLayout

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DoraKeys:
    """The factor keys of an inner kind in the same key layout, plus a magnitude.

    Attributes:
        key_layout: The key layout.
        inner: The inner kind that is read.
        marks: Suffixes of the magnitude: first the one that is written, then others that are read.
        kind: Name of the kind.
    """

    key_layout: KeyLayout
    inner: str
    marks: tuple[str, ...]
    kind: str = "dora"

    @property
    def suffixes(self) -> Collection[str]:
        """The suffixes of the inner kind and of the magnitude."""
        return (*self._inner_keys.suffixes, *self.marks)

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns a suffix that the inner kind lacks, or the magnitude's, or None."""
        missing = self._inner_keys.missing([suffix for suffix in suffixes if suffix not in self.marks])
        return missing or (None if any(mark in suffixes for mark in self.marks) else self.marks[0])

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor with this suffix."""
        return MAGNITUDE if suffix in self.marks else self._inner_keys.factor(suffix)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta; the shape of the magnitude determines its axis."""
        return DoraDelta.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns the tensors of the inner delta, and the magnitude.

        Raises:
            AdapterError: The layout has no keys for the inner kind with a magnitude.
        """
        if not isinstance(delta, DoraDelta) or _entry(delta.inner.kind) not in self.key_layout.factor_keys:
            kind = delta.inner.kind if isinstance(delta, DoraDelta) else delta.kind
            raise AdapterError(
                f"the {self.key_layout.name} layout cannot hold a magnitude for an adapter of kind {kind!r}",
                allowed=", ".join(kind for kind in INNER if _entry(kind) in self.key_layout.factor_keys),
                remedy="choose another format, such as loraline or kohya",
            )
        inner = self.key_layout.factor_keys[delta.inner.kind].write(delta.inner)
        return {**inner, self.marks[0]: self.stored_magnitude(delta)}

    def stored_magnitude(self, delta: DoraDelta) -> Tensor:
        """Returns the magnitude in LyCORIS' form, which is also the form in memory."""
        return delta.magnitude

    @property
    def _inner_keys(self) -> FactorKeys:
        return self.key_layout.factor_keys[self.inner]


@dataclass(frozen=True)
class RowsDoraKeys(DoraKeys):
    """The rows of a LoKr as the direction."""

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta; the shape of the magnitude determines its axis."""
        inner = self._inner_keys.read({key: tensor for key, tensor in tensors.items() if key not in self.marks}, alpha)
        if not isinstance(inner, LokrRowsDelta):
            raise TypeError(f"the keys of {self.inner!r} gave a delta of kind {inner.kind!r}")
        return DoraDelta(inner, next(tensors[mark] for mark in self.marks if mark in tensors))


@dataclass(frozen=True)
class PeftDoraKeys(DoraKeys):
    """PEFT's form: `[out]` for linear layers, `[1, out, 1, 1]` for convolutions, always per output.

    OneTrainer stores LyCORIS' magnitude with PEFT's factors; it is read as LyCORIS'.
    """

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta, with the magnitude as a column."""
        if _LYCORIS in tensors:
            return super().read(tensors, alpha)
        delta = DoraDelta.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)
        magnitude = delta.magnitude
        if magnitude.dim() == 4 and magnitude.shape[0] == 1:
            return delta.with_factors({**delta.factors(), MAGNITUDE: magnitude.transpose(0, 1)})
        return delta

    def stored_magnitude(self, delta: DoraDelta) -> Tensor:
        """Returns the magnitude as a vector, or as a row for convolutions.

        Raises:
            AdapterError: The magnitude is per input.
        """
        if delta.axis != 0:
            raise AdapterError(
                "the magnitude is per input, and PEFT supports only magnitudes per output",
                allowed=f"a magnitude of the shape [out, 1]; this one has {list(delta.magnitude.shape)}",
                remedy="choose another format, such as loraline or kohya",
            )
        return delta.magnitude.transpose(0, 1) if delta.magnitude.dim() == 4 else delta.magnitude.flatten()


def _entry(inner: str) -> str:
    """Returns the entry name in a layout for an inner kind; the first inner kind has the plain name."""
    return "dora" if inner == next(iter(INNER)) else f"dora of {inner}"


# ai-toolkit has its own suffix, in both of its namings.
_LYCORIS, _AITOOLKIT = "dora_scale", "magnitude"
_PEFT_MARKS = tuple(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight"))
for _inner in INNER:
    LYCORIS_KEYS.add(DoraKeys(LYCORIS_KEYS, _inner, (_LYCORIS, _AITOOLKIT)), _entry(_inner))
LORALINE_KEYS.add(DoraKeys(LORALINE_KEYS, "lora", (_LYCORIS, _AITOOLKIT)))
LORALINE_KEYS.add(RowsDoraKeys(LORALINE_KEYS, "lokr-rows", (_LYCORIS,)), _entry("lokr-rows"))
PEFT_KEYS.add(PeftDoraKeys(PEFT_KEYS, "lora", _PEFT_MARKS))
DIFFUSERS_KEYS.add(PeftDoraKeys(DIFFUSERS_KEYS, "lora", (*_PEFT_MARKS, _AITOOLKIT, _LYCORIS)))
