"""Extracts an adapter from the difference of two models, read tensor by tensor from their files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.full import FullDelta
from lora_engine.adapters.select import select_modules
from lora_engine.checkpoints.scales import FLOATS
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.merging.budget import Budget
from lora_engine.merging.spectrum import Noise, leading_part
from lora_engine.progress import Progress, no_progress
from lora_engine.seeds import generator
from lora_engine.streaming.channels import common_channels, pad_channels
from lora_engine.streaming.inputs import check_same_tensors, read_location
from lora_engine.streaming.model import StoredModel, open_model
from lora_engine.streaming.noise import location_variance

_KINDS = ("lora", "full")
_EMBEDDINGS = (".token_embedding", ".position_embedding")


@dataclass(frozen=True)
class ExtractedModule:
    """The extracted difference of one module.

    Attributes:
        rank: Rank of the factors; 0 means that the difference is only rounding noise and the module was omitted; None
            means a full difference.
        error: Relative Frobenius error of the weight, 0 to 1.
        norm: Frobenius norm of the difference.
    """

    rank: int | None
    error: float
    norm: float


@dataclass(frozen=True)
class ExtractReport:
    """The accuracy of an extracted adapter.

    Attributes:
        modules: Canonical name to result, for every target module that differs.
        error: Relative Frobenius error over all of these modules.
        left_out: Names of tensors that differ, or may differ, and are not part of the adapter: other components, norms,
            biases, embeddings, modules that the targets do not match.
        common_channels: Tensors that have more input channels in one model, such as an inpainting model, with the
            number of channels that were compared; the adapter changes only these.
    """

    modules: dict[str, ExtractedModule]
    error: float
    left_out: list[str]
    common_channels: dict[str, int]


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
    """Returns the adapter that best approximates the difference of two models, within its rank.

    The difference is computed in float32, one module at a time. Factors are balanced (U sqrt(S), sqrt(S) V^T) and have
    scale 1. Convolutions become LoCon. If one model reads more input channels, the common ones are compared, and the
    adapter has the base's shape.

    Args:
        tuned: The fine-tuned model; see `streaming.open_model`.
        base: The base model, with the same tensors, in any layout.
        rank: The rank; with one of the next two, the maximum rank.
        energy: Minimum share of the squared norm that every module keeps, above 0, up to 1.
        frobenius: Maximum relative error of every module, from 0, below 1.
        noise_aware: True drops singular values that rounding to the dtypes explains; a sufficient criterion alone.
        targets: See `select_modules`; None selects every linear and convolution layer of the denoiser and of the text
            encoders.
        kind: `lora`, or `full` for the dense difference.
        with_rest: True includes biases, and norms as kind `full`.
        seed: Random seed of the sketches; every module has its own generator.
        component: Component of a single file; None means inferred.
        architecture: Architecture of original single files; None means inferred.
        progress: Called after every module.

    Returns:
        The adapter, with the base's fingerprint if known, and its accuracy.

    Raises:
        BaseModelError: A model cannot be read, or names or shapes differ; raised before anything is computed.
        SettingsError: No criterion for the rank is set, the kind is unknown, or a target matches nothing.
        AdapterError: The models do not differ in the targets, or values are not finite.
    """
    budget = _budget(rank, energy, frobenius, kind, is_noise_enough=noise_aware)
    first, second = (open_model(path, component=component, architecture=architecture) for path in (tuned, base))
    common = common_channels([{name: part.shape for name, part in m.locations.items()} for m in (first, second)])
    check_same_tensors(first, second, except_for=common, in_any_layout=True)
    chosen = _targets(second, targets)
    pairs = _Pairs(first, second, common, noise_aware=noise_aware)
    modules: dict[str, Delta] = {}
    results: dict[str, ExtractedModule] = {}
    for done, name in enumerate(chosen):
        difference, noise = pairs.difference(f"{name}.weight")
        delta, result = _module(difference, noise, budget, kind, generator(seed, "extract", name))
        bias = pairs.difference(f"{name}.bias")[0] if with_rest and f"{name}.bias" in first.locations else None
        if bias is not None and bool(bias.any()):
            delta = _with_bias(delta, bias)
        if result.norm > 0.0:
            results[name] = result
        if delta is not None:
            modules[name] = delta
        progress(done + 1, len(chosen), {"error": result.error})
    if with_rest:
        modules |= pairs.norms()
    if not modules:
        raise AdapterError(
            "the models differ in no module by more than rounding",
            where=f"{tuned}, {base}",
            remedy="check that these are the two models, or choose other targets",
        )
    extracted = {f"{name}.{part}" for name, delta in modules.items() for part in _parts(delta)}
    covered = extracted | {f"{name}.weight" for name in chosen}
    left_out = [name for name in first.locations if name not in covered and pairs.is_different(name)]
    report = ExtractReport(results, _total(results), left_out, common)
    return Adapter(modules, second.family, second.fingerprint()), report


class _Pairs:
    """Reads the same weights of two models."""

    def __init__(self, tuned: StoredModel, base: StoredModel, common: Mapping[str, int], *, noise_aware: bool) -> None:
        self._tuned, self._base, self._common, self._noise_aware = tuned, base, common, noise_aware

    def difference(self, name: str) -> tuple[Tensor, Noise | None]:
        """Returns the difference in float32 and the base's shape, and the bound of its rounding noise."""
        places = self._tuned.locations[name], self._base.locations[name]
        tuned, base = map(read_location, places)
        shape, channels = base.shape, self._common.get(name)
        if channels is not None:
            tuned, base = tuned[:, :channels], base[:, :channels]
        difference = pad_channels(tuned.float() - base.float(), shape)
        if not all(math.isfinite(float(end)) for end in torch.aminmax(difference)):
            raise AdapterError(
                "the difference is not finite",
                where=f"tensor {name!r}",
                allowed="finite weights in both models",
                remedy="check both files",
            )
        if not self._noise_aware or difference.dim() < 2:
            return difference, None
        first, second = map(location_variance, places)
        if channels is not None:
            first, second = first[:, :channels], second[:, :channels]
        return difference, Noise.of(pad_channels(first + second, shape).flatten(1))

    def is_different(self, name: str) -> bool:
        """Returns True if the values of a tensor differ."""
        tuned, base = self._tuned.locations[name], self._base.locations[name]
        if tuned.stored.dtype not in FLOATS or base.stored.dtype not in FLOATS:
            return False
        return not torch.equal(read_location(tuned).float(), read_location(base).float())

    def norms(self) -> dict[str, Delta]:
        """Returns the differences of the norms in all components that an adapter can change."""
        deltas: dict[str, Delta] = {}
        for name, shape in self._base.module_shapes.items():
            if len(shape) == 1 and not name.startswith("vae."):
                parts = [part for part in ("weight", "bias") if f"{name}.{part}" in self._base.locations]
                changes = {part: self.difference(f"{name}.{part}")[0] for part in parts}
                if any(bool(change.any()) for change in changes.values()):
                    deltas[name] = FullDelta(changes["weight"], changes.get("bias"))
        return deltas


def _module(
    difference: Tensor, noise: Noise | None, budget: Budget | None, kind: str, source: torch.Generator
) -> tuple[Delta | None, ExtractedModule]:
    norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    if norm == 0.0:
        return None, ExtractedModule(0, 0.0, 0.0)
    if kind == "full":
        return FullDelta(difference), ExtractedModule(None, 0.0, norm)
    part = leading_part(difference.flatten(1), budget, generator=source, noise=noise)
    result = ExtractedModule(part.rank, part.error, norm)
    if part.rank == 0:
        return None, result
    up, down = part.balanced()
    ones = [1 for _ in difference.shape[2:]]
    down = down.reshape(part.rank, *difference.shape[1:]).contiguous()
    return LoraDelta(down, up.reshape(*up.shape, *ones).contiguous(), float(part.rank)), result


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
            "the models have no linear or convolution layer that an adapter can change", where=str(model.path)
        )
    return chosen


def _budget(
    rank: int | None, energy: float | None, frobenius: float | None, kind: str, *, is_noise_enough: bool
) -> Budget | None:
    if kind not in _KINDS:
        raise SettingsError(
            f"the kind {kind!r} cannot be extracted", allowed=", ".join(_KINDS), remedy="choose another"
        )
    if rank is None and energy is None and frobenius is None and (is_noise_enough or kind == "full"):
        return None
    return Budget(rank=rank, energy=energy, error=frobenius)


def _total(modules: dict[str, ExtractedModule]) -> float:
    total = sum(module.norm**2 for module in modules.values())
    lost = sum((module.error * module.norm) ** 2 for module in modules.values())
    return math.sqrt(lost / total) if total else 0.0
