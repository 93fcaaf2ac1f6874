"""An adapter out of the difference of two models of one architecture, read tensor by tensor from their files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.full import FullDelta
from lora_engine.adapters.select import select_modules
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.merging.budget import Budget
from lora_engine.merging.spectrum import Noise, leading_part
from lora_engine.progress import Progress, no_progress
from lora_engine.seeds import generator
from lora_engine.streaming.blocks import FLOATS
from lora_engine.streaming.inputs import check_same, read_place
from lora_engine.streaming.model import StoredModel, open_model

KINDS = ("lora", "full")
_EMBEDDINGS = (".token_embedding", ".position_embedding")


@dataclass(frozen=True)
class ExtractedModule:
    """What became of the difference of one module.

    Attributes:
        rank: Of its factors; 0 where the difference is rounding noise alone and the module was left out; None for a
            difference that is kept whole.
        error: Relative Frobenius error of its weight, 0 to 1.
        norm: Frobenius norm of the difference.
    """

    rank: int | None
    error: float
    norm: float


@dataclass(frozen=True)
class ExtractReport:
    """How well the adapter stands for the difference.

    Attributes:
        modules: By canonical name, every module that was looked at and differs.
        error: Relative Frobenius error over all of them together.
        left_out: Names of tensors that differ, or may differ, and are not part of the adapter: other components, norms,
            biases, embeddings, modules that the targets do not mean.
    """

    modules: dict[str, ExtractedModule]
    error: float
    left_out: list[str]


def extract(
    tuned: Path,
    base: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    noise_aware: bool = False,
    targets: str | Sequence[str] | None = None,
    kind: str = "lora",
    with_rest: bool = False,
    seed: int = 0,
    component: str | None = None,
    architecture: str | None = None,
    progress: Progress = no_progress,
) -> tuple[Adapter, ExtractReport]:
    """The adapter that leads from one model to another, as nearly as its rank allows.

    The difference is formed in float32, one module at a time; factors are balanced (U sqrt(S), sqrt(S) V^T) and of
    scale 1. Convolutions become LoCon.

    Args:
        tuned: The model to arrive at; see `streaming.open_model`.
        base: The model to begin with, in the same layout.
        rank: The rank, or together with one of the next two, the largest.
        energy: Share of the squared norm that every module keeps at least, above 0, up to 1.
        frobenius: Largest relative error of every module, from 0, below 1.
        noise_aware: Whether to drop singular values that rounding to the dtypes explains; enough by itself.
        targets: See `select_modules`; None takes every linear and convolution layer of the U-Net or transformer and of
            the text encoders.
        kind: `lora`, or `full` for the whole difference.
        with_rest: Whether norms, and biases, are taken too, the norms as kind `full`.
        seed: Of the sketches; every module has a generator of its own.
        component: What a component's file is, where nothing else tells it.
        architecture: Of original single files, where nothing else tells it.
        progress: Called after every module.

    Returns:
        The adapter, with the base's fingerprint where that has one, and how well it does.

    Raises:
        BaseModelError: A model cannot be read, or names or shapes differ; before anything is computed.
        SettingsError: Nothing says how much to keep, an unknown kind, or targets that mean nothing.
        AdapterError: The models do not differ in what is looked at, or values are not finite.
    """
    budget = _budget(rank, energy, frobenius, kind, is_noise_enough=noise_aware)
    first, second = (open_model(path, component=component, architecture=architecture) for path in (tuned, base))
    check_same(first, second)
    chosen = _targets(second, targets)
    pairs = _Pairs(first, second, noise_aware=noise_aware)
    modules: dict[str, Delta] = {}
    found: dict[str, ExtractedModule] = {}
    for done, name in enumerate(chosen):
        difference, noise = pairs.difference(f"{name}.weight")
        delta, told = _module(difference, noise, budget, kind, generator(seed, "extract", name))
        bias = pairs.difference(f"{name}.bias")[0] if with_rest and f"{name}.bias" in first.places else None
        if bias is not None and bool(bias.any()):
            delta = _with_bias(delta, bias)
        if told.norm > 0.0:
            found[name] = told
        if delta is not None:
            modules[name] = delta
        progress(done + 1, len(chosen), {"error": told.error})
    if with_rest:
        modules |= pairs.norms()
    if not modules:
        raise AdapterError(
            "the models do not differ in any module beyond what rounding explains",
            where=f"{tuned}, {base}",
            remedy="check that these are the two models, or choose other targets",
        )
    taken = {f"{name}.{part}" for name, delta in modules.items() for part in _parts(delta)}
    looked_at = taken | {f"{name}.weight" for name in chosen}
    left_out = [name for name in first.places if name not in looked_at and pairs.is_different(name)]
    return Adapter(modules, second.family, second.fingerprint()), ExtractReport(found, _total(found), left_out)


class _Pairs:
    """The same weights of two models, read one after the other."""

    def __init__(self, tuned: StoredModel, base: StoredModel, *, noise_aware: bool) -> None:
        self._tuned, self._base, self._noise_aware = tuned, base, noise_aware

    def difference(self, name: str) -> tuple[Tensor, Noise | None]:
        """The difference in float32, and what rounding may have done to it."""
        one, other = read_place(self._tuned.places[name]), read_place(self._base.places[name])
        difference = one.float().sub_(other.float())
        if not all(math.isfinite(float(end)) for end in torch.aminmax(difference)):
            raise AdapterError(
                "the difference is not finite",
                where=f"tensor {name!r}",
                allowed="finite weights in both models",
                remedy="check both files",
            )
        if not self._noise_aware or difference.dim() < 2:
            return difference, None
        return difference, Noise.of((rounding_variance(one) + rounding_variance(other)).flatten(1))

    def is_different(self, name: str) -> bool:
        """Whether the two differ in any bit."""
        one, other = self._tuned.places[name], self._base.places[name]
        if one.stored.dtype not in FLOATS or other.stored.dtype not in FLOATS:
            return False
        return not torch.equal(read_place(one).float(), read_place(other).float())

    def norms(self) -> dict[str, Delta]:
        """The differences of the norms of all components that an adapter reaches."""
        found: dict[str, Delta] = {}
        for name, shape in self._base.module_shapes.items():
            if len(shape) == 1 and not name.startswith("vae."):
                parts = [part for part in ("weight", "bias") if f"{name}.{part}" in self._base.places]
                changes = {part: self.difference(f"{name}.{part}")[0] for part in parts}
                if any(bool(change.any()) for change in changes.values()):
                    found[name] = FullDelta(changes["weight"], changes.get("bias"))
        return found


def rounding_variance(weight: Tensor) -> Tensor:
    """The variance of what rounding to its dtype has done to each element of a weight; float64, in its shape.

    A number between two powers of two was moved by up to half of the spacing there, evenly: spacing^2 / 12.
    """
    limits = torch.finfo(weight.dtype)
    spacing = torch.exp2(torch.frexp(weight.float()).exponent.double()).mul_(limits.eps / 2)
    return spacing.clamp_(min=limits.smallest_normal * limits.eps).square_().div_(12)


def _module(
    difference: Tensor, noise: Noise | None, budget: Budget | None, kind: str, source: torch.Generator
) -> tuple[Delta | None, ExtractedModule]:
    norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    if norm == 0.0:
        return None, ExtractedModule(0, 0.0, 0.0)
    if kind == "full":
        return FullDelta(difference), ExtractedModule(None, 0.0, norm)
    part = leading_part(difference.flatten(1), budget, generator=source, noise=noise)
    told = ExtractedModule(part.rank, part.error, norm)
    if part.rank == 0:
        return None, told
    up, down = part.balanced()
    ones = [1 for _ in difference.shape[2:]]
    down = down.reshape(part.rank, *difference.shape[1:]).contiguous()
    return LoraDelta(down, up.reshape(*up.shape, *ones).contiguous(), float(part.rank)), told


def _with_bias(delta: Delta | None, bias: Tensor) -> Delta:
    if isinstance(delta, LoraDelta):
        return LoraDelta(delta.down, delta.up, delta.alpha, bias=bias)
    return FullDelta(delta.diff if isinstance(delta, FullDelta) else None, bias)


def _parts(delta: Delta) -> list[str]:
    bias = getattr(delta, "bias", None)
    return ["weight"] if bias is None else ["weight", "bias"]


def _targets(model: StoredModel, targets: str | Sequence[str] | None) -> list[str]:
    shapes = {name: shape for name, shape in model.module_shapes.items() if len(shape) in (2, 4)}
    if targets is not None:
        return select_modules(shapes, targets)
    chosen = [name for name in shapes if not name.startswith("vae.") and not name.endswith(_EMBEDDINGS)]
    if not chosen:
        raise SettingsError(
            "the models have no linear or convolution layer that an adapter reaches", where=str(model.path)
        )
    return chosen


def _budget(
    rank: int | None, energy: float | None, frobenius: float | None, kind: str, *, is_noise_enough: bool
) -> Budget | None:
    if kind not in KINDS:
        raise SettingsError(f"the kind {kind!r} cannot be extracted", allowed=", ".join(KINDS), remedy="choose another")
    if rank is None and energy is None and frobenius is None and (is_noise_enough or kind == "full"):
        return None
    return Budget(rank=rank, energy=energy, error=frobenius)


def _total(modules: dict[str, ExtractedModule]) -> float:
    whole = sum(told.norm**2 for told in modules.values())
    lost = sum((told.error * told.norm) ** 2 for told in modules.values())
    return math.sqrt(lost / whole) if whole else 0.0
