"""Factor keys of (IA)3: LyCORIS stores the gain minus one, PEFT the gain."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lora_engine.adapters import Delta, Ia3Delta, PeftIa3Delta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import LORALINE_KEYS, LYCORIS_KEYS, PEFT_KEYS, TableFactorKeys
from lora_engine.formats.peft_types import PEFT_TYPES, PeftType
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_FLAG = "on_input"


@dataclass(frozen=True)
class FlaggedKeys(TableFactorKeys):
    """The gains, and the flag `on_input`: 0 means per output, any other value per input."""

    @property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return (*super().suffixes, _FLAG)

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor or setting with this suffix."""
        return "axis" if suffix == _FLAG else super().factor(suffix)

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first missing suffix, or None."""
        return next((name for name in self.suffixes if name not in suffixes), None)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        flag = tensors[_FLAG]
        if flag.numel() != 1:
            problem = f"{_FLAG!r} has the shape {list(flag.shape)}"
            raise AdapterError(problem, allowed="one number", remedy="check the file")
        axis: Literal["output", "input"] = "input" if bool(flag.item()) else "output"
        delta_type = Ia3Delta if self.kind == Ia3Delta.kind else PeftIa3Delta
        return delta_type(tensors[self.names["scale"]], axis)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix."""
        tensors = super().write(delta)
        on_input = isinstance(delta, Ia3Delta) and delta.axis == "input"
        return tensors | {_FLAG: torch.tensor(float(on_input), dtype=next(iter(tensors.values())).dtype)}


@dataclass(frozen=True)
class ShapedKeys(TableFactorKeys):
    """Only the gains: `[out, 1]` per output, `[1, in]` per input; for convolutions the configuration decides."""

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        gains = tensors[self.names["scale"]]
        return PeftIa3Delta(gains, "input" if gains.dim() == 2 and gains.shape[0] == 1 else "output")


def ia3_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns PEFT's `IA3Config` for one component's modules (by path).

    Raises:
        AdapterError: PEFT, which compares the ends of names, would confuse two modules.
    """
    on_input = sorted(path for path, delta in modules.items() if isinstance(delta, Ia3Delta) and delta.axis == "input")
    for path in modules.keys() - set(on_input):
        if path.endswith(tuple(on_input)):
            raise AdapterError(
                f"the name of the module {path!r} ends in the name of another module, whose inputs are scaled",
                allowed="names that PEFT can tell apart by their ends",
                remedy="choose another format",
            )
    return {
        "fan_in_fan_out": False,
        "feedforward_modules": on_input,
        "inference_mode": True,
        "init_ia3_weights": True,
        "target_modules": sorted(modules),
    }


def with_shaped_gains(delta: Delta) -> Delta:
    """Returns the delta with gains as PEFT stores them, if a file has the gains of a matrix the other way around."""
    if not isinstance(delta, PeftIa3Delta) or delta.scale.dim() != 2 or delta.scale.numel() < 2:
        return delta
    is_input = delta.axis == "input"
    return replace(delta, scale=delta.scale.reshape((1, -1) if is_input else (-1, 1)))


def with_axis(delta: Delta, config: Mapping[str, Any], path: str, where: str) -> Delta:
    """Returns the delta with the axis of a configuration, if the shape of the gains does not show it.

    Raises:
        AdapterError: Shape and configuration disagree, or the configuration is not supported.
    """
    if not isinstance(delta, PeftIa3Delta):
        return delta
    check_layout(config, where)
    names = config.get("feedforward_modules") or []
    if isinstance(names, str) and not re.fullmatch(r"(\w|-|\.)+", names):
        raise AdapterError(
            f"'feedforward_modules' is the expression {names!r}",
            where=where,
            allowed="a list of module names",
            remedy="list the module names in the file",
        )
    is_input = path == names if isinstance(names, str) else path.endswith(tuple(names))
    axis: Literal["output", "input"] = "input" if is_input else "output"
    if delta.scale.dim() == 2 and delta.scale.numel() > 1 and axis != delta.axis:
        raise AdapterError(
            f"the gains of {path!r} have the shape {list(delta.scale.shape)}, which is for the {delta.axis}",
            where=where,
            allowed="[1, in] for the modules in 'feedforward_modules', [out, 1] for all others",
            remedy="put the configuration and the tensors of one adapter into the folder",
        )
    return replace(delta, axis=axis)


def check_layout(config: Mapping[str, Any], where: str) -> None:
    """Raises `AdapterError` if a configuration states transposed weights (rows are inputs)."""
    if config.get("fan_in_fan_out"):
        raise AdapterError(
            "'fan_in_fan_out' is true: the weights are transposed, as in GPT-2",
            where=where,
            allowed="false",
            remedy="give the path of an adapter of a diffusion model",
        )


LYCORIS_KEYS.add(FlaggedKeys("ia3", {"scale": "weight"}))
LORALINE_KEYS.add(FlaggedKeys("peft-ia3", {"scale": "ia3_l"}))
PEFT_KEYS.add(ShapedKeys("peft-ia3", {"scale": "ia3_l"}))
PEFT_TYPES.add("IA3", PeftType(("peft-ia3",), "", ia3_settings, with_axis))
