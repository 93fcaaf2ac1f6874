"""Factor keys of rotations: LyCORIS' OFT and BOFT, which differ only in dimensions, and PEFT's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lora_engine.adapters import BoftDelta, Delta, OftDelta, OftPartsDelta, PeftBoftDelta, PeftOftDelta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import (
    KOHYA_KEYS,
    LORALINE_KEYS,
    LYCORIS_KEYS,
    PEFT_KEYS,
    TableFactorKeys,
    alpha_tensor,
)
from lora_engine.formats.key_layouts.ia3 import check_layout
from lora_engine.formats.peft_types import PEFT_TYPES, PeftType
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
_TERMS, _EPS = "oft_R.terms", "oft_R.eps"
_DIAG, _TOLERANCE = "oft_diag", 2e-2  # float16 has three digits
ANGLES = "oft_R.weight"
OF_EMBEDDING = "oft_embedding_R.weight"
"""PEFT's suffix for embeddings, whose rows are rotated instead of the columns, with the opposite sign."""
_PARTS = tuple(f"oft_blocks.{number}" for number in range(8))
_SINCE = "0.18.0"
"""First PEFT version whose rotation series is supported."""


@dataclass(frozen=True)
class BlocksKeys(TableFactorKeys):
    """`oft_blocks` and perhaps `rescale`: `[n, b, b]` is OFT, `[stages, n, b, b]` BOFT; alpha is the constraint.

    Instead of `oft_blocks`, the first OFT of LyCORIS has the rotations as `oft_diag`, and an alpha without meaning.
    """

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix.

        Raises:
            AdapterError: The tensors of `oft_diag` are no rotations.
        """
        if _DIAG in tensors:
            tensors = {**tensors, self.names["blocks"]: _blocks_of(tensors[_DIAG])}
            return OftDelta.from_factors({"blocks": tensors[self.names["blocks"]]}, None)
        delta_type = BoftDelta if tensors[self.names["blocks"]].dim() == 4 else OftDelta
        return delta_type.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)


@dataclass(frozen=True)
class PartsKeys:
    """kohya's blocks of each part of a fused layer: `oft_blocks.0`, `oft_blocks.1`, ...

    Attributes:
        kind: Name of the kind. A layer of one part is read as plain OFT.
    """

    kind: str = OftPartsDelta.kind

    @property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return _PARTS

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first suffix that is missing, or None."""
        return next((name for name in _PARTS[: len(suffixes) or 1] if name not in suffixes), None)

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor with this suffix."""
        return f"blocks_{_PARTS.index(suffix)}"

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix; in kohya's form, a constraint of 0 allows no rotation."""
        if alpha == 0:
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        if len(tensors) == 1:
            return OftDelta.from_factors({"blocks": tensors[_PARTS[0]]}, alpha)
        return OftPartsDelta.from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix, without alpha."""
        return dict(zip(_PARTS, delta.factors().values(), strict=False))


def _blocks_of(rotations: Tensor) -> Tensor:
    """Returns the blocks whose Cayley transforms are the rotations: `Q = (R - I)(R + I)^-1`, and half of it."""
    wide = rotations.to(torch.float64)
    is_square = wide.dim() == 3 and wide.shape[-1] == wide.shape[-2] and wide.numel() > 0
    if is_square:
        identity = torch.eye(wide.shape[-1], dtype=wide.dtype)
        change, info = torch.linalg.solve_ex(wide + identity, wide - identity)
        if not bool(info.any()) and bool(((wide @ wide.mT - identity).abs() < _TOLERANCE).all()):
            blocks: Tensor = (0.5 * change).to(torch.promote_types(rotations.dtype, torch.float32))
            return blocks
    raise AdapterError(
        f"the tensor {_DIAG!r} of shape {list(rotations.shape)} holds no rotations",
        allowed="orthogonal matrices [n, b, b] without a half turn",
        remedy="merge the adapter with the program that made it, and extract the difference",
    )


@dataclass(frozen=True)
class AnglesKeys(TableFactorKeys):
    """PEFT's angles, plus PEFT's configuration values as tensors of one number."""

    @property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return (ANGLES, _TERMS, _EPS)

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor or setting with this suffix."""
        return {ANGLES: "angles", _TERMS: "terms", _EPS: "eps"}[suffix]

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first missing required suffix, or None."""
        return next((name for name in (ANGLES, _TERMS) if name not in suffixes), None)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        numbers: dict[str, float] = {}
        for name in {_TERMS, _EPS} & tensors.keys():
            if tensors[name].numel() != 1:
                problem = f"{name!r} has the shape {list(tensors[name].shape)}"
                raise AdapterError(problem, allowed="one number", remedy="check the file")
            numbers[name] = float(tensors[name].item())
        if not numbers[_TERMS].is_integer():
            problem = f"{_TERMS!r} is {numbers[_TERMS]!r}"
            raise AdapterError(problem, allowed="a whole number", remedy="check the file")
        return PeftOftDelta(tensors[ANGLES], int(numbers[_TERMS]), numbers.get(_EPS))

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix."""
        tensors = super().write(delta)
        if isinstance(delta, PeftOftDelta):
            tensors[_TERMS] = alpha_tensor(float(delta.terms), delta.angles.dtype)
            if delta.eps is not None:
                tensors[_EPS] = torch.tensor(delta.eps, dtype=torch.float64)
        return tensors


@dataclass(frozen=True)
class TransposedKeys(TableFactorKeys):
    """PEFT's angles, which have the opposite sign for embeddings: `R(-S)` is the inverse of `R(S)`."""

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        return PeftOftDelta(-tensors[OF_EMBEDDING] if OF_EMBEDDING in tensors else tensors[ANGLES])


def oft_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns PEFT's `OFTConfig` for one component's modules (by path).

    Raises:
        AdapterError: The modules differ in form; PEFT supports one form for all modules.
    """
    deltas = {path: delta for path, delta in modules.items() if isinstance(delta, PeftOftDelta)}
    terms = _single({path: delta.terms for path, delta in deltas.items()}, "number of terms")
    eps = _single({path: delta.eps for path, delta in deltas.items()}, "constraint")
    return {
        "bias": "none",
        # Shared blocks and a single block both have one row, and PEFT reads them the same.
        "block_share": all(delta.angles.shape[0] == 1 for delta in deltas.values()),
        "coft": eps is not None,
        **({} if eps is None else {"eps": eps}),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "module_dropout": 0.0,
        "num_cayley_neumann_terms": terms or 5,
        "oft_block_size": _single({path: delta.block_size for path, delta in deltas.items()}, "block size"),
        "peft_version": _SINCE,
        "r": 0,
        "target_modules": sorted(modules),
        "use_cayley_neumann": terms > 0,
    }


def with_oft_settings(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Returns the delta with the form of rotation of a configuration.

    Raises:
        AdapterError: The form is not supported, or is of an older PEFT, which rotates differently.
    """
    if not isinstance(delta, PeftOftDelta):
        return delta
    check_layout(config, where)
    is_series = bool(config.get("use_cayley_neumann"))
    if "oft_block_size" not in config or (is_series and _version(config) < (0, 18)):
        raise AdapterError(
            "the adapter was saved by an older PEFT, whose OFT is different",
            where=where,
            allowed=f"OFT of PEFT {_SINCE} or later ('peft_version' states it)",
            remedy="merge it with the PEFT version that made it, and extract the difference",
        )
    terms = config.get("num_cayley_neumann_terms", 5) if is_series else 0
    eps = config.get("eps", 6e-5) if config.get("coft") else None
    if isinstance(terms, bool) or not isinstance(terms, int) or not isinstance(eps, float | int | None):
        problem = f"'num_cayley_neumann_terms' is {terms!r}, 'eps' is {eps!r}"
        raise AdapterError(problem, where=where, allowed="numbers", remedy="fix the file")
    return replace(delta, terms=terms, eps=None if eps is None else float(eps))


def boft_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns PEFT's `BOFTConfig` for one component's modules (by path).

    Raises:
        AdapterError: The modules differ in form; PEFT supports one form for all modules.
    """
    deltas = {path: delta for path, delta in modules.items() if isinstance(delta, PeftBoftDelta)}
    butterflies = {path: delta.blocks.shape[0] for path, delta in deltas.items()}
    return {
        "bias": "none",
        "boft_block_num": 0,
        "boft_block_size": _single({path: delta.blocks.shape[-1] for path, delta in deltas.items()}, "block size"),
        "boft_dropout": 0.0,
        "boft_n_butterfly_factor": _single(butterflies, "number of butterflies"),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "target_modules": sorted(modules),
    }


def with_boft_settings(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Returns the delta unchanged: its tensors are complete.

    Raises:
        AdapterError: The weights are transposed.
    """
    check_layout(config, where)
    return delta


def _single(values: Mapping[str, _T], noun: str) -> _T:
    first, *others = values
    for path in others:
        if values[path] != values[first]:
            raise AdapterError(
                f"PEFT has one {noun} for all modules; {first!r} has {values[first]!r}, this one {values[path]!r}",
                where=path,
                allowed=f"the same {noun} for all modules",
                remedy="choose the format loraline, or train with a block size that fits all layers",
            )
    return values[first]


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the first two numbers of PEFT's version; empty if not stated, as before 0.18."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version", "")))
    return tuple(map(int, match.groups())) if match else ()


LORALINE_KEYS.add(PartsKeys())
KOHYA_KEYS.add(PartsKeys())
_BLOCKS = {"blocks": "oft_blocks", "rescale": "rescale"}
LYCORIS_KEYS.add(BlocksKeys("oft", _BLOCKS, aliases={_DIAG: "blocks"}, optional=("rescale",)))
LYCORIS_KEYS.add(BlocksKeys("boft", _BLOCKS, optional=("rescale",)))
LORALINE_KEYS.add(AnglesKeys("peft-oft", {"angles": ANGLES}))
LORALINE_KEYS.add(TableFactorKeys("peft-boft", {"blocks": "boft_R", "scale": "boft_s"}))
PEFT_KEYS.add(TransposedKeys("peft-oft", {"angles": ANGLES}, aliases={OF_EMBEDDING: "angles"}))
PEFT_KEYS.add(TableFactorKeys("peft-boft", {"blocks": "boft_R", "scale": "boft_s"}))
PEFT_TYPES.add("OFT", PeftType(("peft-oft",), "", oft_settings, with_oft_settings))
PEFT_TYPES.add("BOFT", PeftType(("peft-boft",), "", boft_settings, with_boft_settings))
