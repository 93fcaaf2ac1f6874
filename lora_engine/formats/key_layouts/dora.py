"""How files spell DoRA: the spelling of the kind that moves the direction, and one more tensor for the magnitude."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from lora_engine.adapters import Delta, DoraDelta
from lora_engine.adapters.dora import INNER, MAGNITUDE
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import DIFFUSERS, LYCORIS, PEFT, FactorKeys, KeyLayout


@dataclass(frozen=True)
class DoraKeys:
    """A magnitude beside the factors of an inner kind, which are spelt as that kind's own are in the same style.

    Attributes:
        style: The style.
        inner: The kind that moves the direction in what is read.
        marks: Suffixes of the magnitude: the one that is written, and others that are read.
    """

    style: KeyLayout
    inner: str
    marks: tuple[str, ...]
    kind: str = "dora"

    @property
    def suffixes(self) -> Collection[str]:
        """The inner kind's and the magnitude's."""
        return (*self._spelling.suffixes, *self.marks)

    def missing(self, suffixes: Collection[str]) -> str | None:
        """A suffix that the inner kind lacks, or that of the magnitude."""
        lacks = self._spelling.missing([suffix for suffix in suffixes if suffix not in self.marks])
        return lacks or (None if any(mark in suffixes for mark in self.marks) else self.marks[0])

    def factor(self, suffix: str) -> str:
        """The factor that a suffix stands for."""
        return MAGNITUDE if suffix in self.marks else self._spelling.factor(suffix)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """The delta; the shape of the magnitude tells its axis."""
        return DoraDelta.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """The inner delta's tensors, and the magnitude.

        Raises:
            AdapterError: The style cannot spell it.
        """
        if not isinstance(delta, DoraDelta) or _entry(delta.inner.kind) not in self.style.spellings:
            kind = delta.inner.kind if isinstance(delta, DoraDelta) else delta.kind
            raise AdapterError(
                f"{self.style.name} names cannot hold a magnitude beside an adapter of kind {kind!r}",
                allowed=", ".join(kind for kind in INNER if _entry(kind) in self.style.spellings),
                remedy="choose another format, such as loraline or kohya",
            )
        inner = self.style.spellings[delta.inner.kind].write(delta.inner)
        return {**inner, self.marks[0]: self.spelt(delta)}

    def spelt(self, delta: DoraDelta) -> Tensor:
        """The magnitude as the file has it: in LyCORIS' form, which is also that in memory."""
        return delta.magnitude

    @property
    def _spelling(self) -> FactorKeys:
        return self.style.spellings[self.inner]


@dataclass(frozen=True)
class PeftDoraKeys(DoraKeys):
    """PEFT's form: `[out]` on linear layers, `[1, out, 1, 1]` on convolutions, always of the outputs.

    OneTrainer has LyCORIS' magnitude beside PEFT's factors, which is read as LyCORIS'.
    """

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """The delta, with the magnitude as a column."""
        if _LYCORIS in tensors:
            return super().read(tensors, alpha)
        delta = DoraDelta.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)
        magnitude = delta.magnitude
        if magnitude.dim() == 4 and magnitude.shape[0] == 1:
            return delta.with_factors({**delta.factors(), MAGNITUDE: magnitude.transpose(0, 1)})
        return delta

    def spelt(self, delta: DoraDelta) -> Tensor:
        """A vector, or a row for convolutions.

        Raises:
            AdapterError: The magnitude is that of the inputs.
        """
        if delta.axis != 0:
            raise AdapterError(
                "the magnitude is that of the inputs, and PEFT knows that of the outputs alone",
                allowed=f"a magnitude of the shape [out, 1], this one has {list(delta.magnitude.shape)}",
                remedy="choose another format, such as loraline or kohya",
            )
        return delta.magnitude.transpose(0, 1) if delta.magnitude.dim() == 4 else delta.magnitude.flatten()


def _entry(inner: str) -> str:
    """The name under which a style keeps the spelling around an inner kind; the plain name is that of the first."""
    return "dora" if inner == next(iter(INNER)) else f"dora of {inner}"


# ai-toolkit has a name of its own, in both of its namings.
_LYCORIS, _AITOOLKIT = "dora_scale", "magnitude"
_PEFT_MARKS = tuple(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight"))
for _inner in INNER:
    LYCORIS.spellings.add(_entry(_inner), DoraKeys(LYCORIS, _inner, (_LYCORIS, _AITOOLKIT)))
PEFT.spellings.add(_entry("lora"), PeftDoraKeys(PEFT, "lora", _PEFT_MARKS))
DIFFUSERS.spellings.add(_entry("lora"), PeftDoraKeys(DIFFUSERS, "lora", (*_PEFT_MARKS, _AITOOLKIT, _LYCORIS)))
