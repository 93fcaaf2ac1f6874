"""Optimisers by name. What they move, and when, is the loop's affair; their state is in `optimiser_state`.

Those that come from libraries of their own need the extra `optimizers`; everything else works without it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from lora_engine.errors import SettingsError
from lora_engine.registries import Registry
from lora_engine.training.phases import ParameterGroup


class Build(Protocol):
    """Makes an optimiser."""

    def __call__(self, groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
        """The optimiser of some groups.

        Args:
            groups: What moves.
            weight_decay: Of the groups that have none of their own; decoupled from the gradient everywhere.
            **options: The optimiser's own, as in `specs.rates`.
        """
        ...


optimizers: Registry[Build] = Registry("optimiser")

# Optimizer to the package that it comes from: (name to import, name on PyPI).
_PACKAGES = {
    "adamw-8bit": ("bitsandbytes", "bitsandbytes"),
    "lion": ("pytorch_optimizer", "pytorch-optimizer"),
    "prodigy": ("pytorch_optimizer", "pytorch-optimizer"),
    "d-adaptation": ("pytorch_optimizer", "pytorch-optimizer"),
    "schedule-free": ("pytorch_optimizer", "pytorch-optimizer"),
}


def require_optimiser(name: str) -> None:
    """Does nothing where an optimiser is known and its package installed; cheap, to be asked before any work.

    Raises:
        SettingsError: It is not; names the extra.
    """
    optimizers[name]
    module, package = _PACKAGES.get(name, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        there = sorted(known for known in optimizers if known not in _PACKAGES)
        raise SettingsError(
            f"optimiser {name!r} needs the package {package!r}, which is not installed",
            where="rates.optimiser",
            allowed=f"without it: {', '.join(there)}",
            remedy='install the extra: pip install "loraline[optimisers]"',
        )


def build_optimiser(
    name: str, groups: Sequence[ParameterGroup], weight_decay: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimiser by name; see `Build`.

    Raises:
        SettingsError: It is not known or not installed.
    """
    require_optimiser(name)
    return optimizers[name](groups, weight_decay, **options)


def _settings(groups: Sequence[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
    return [
        {
            "params": list(group.parameters.values()),
            "lr": group.learning_rate,
            "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]


def _adamw(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    # One kernel for all tensors where the device has it.
    devices = {value.device.type for group in groups for value in group.parameters.values()}
    return torch.optim.AdamW(_settings(groups, weight_decay), fused=devices <= {"cpu", "cuda"}, **options)


def _adamw_8bit(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return _checked(AdamW8bit(_settings(groups, weight_decay), **options))


def _adafactor(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # torch's own always scales by the size of a parameter, which leaves factors that begin at zero where they are.
    return _checked(
        Adafactor(
            _settings(groups, weight_decay),
            lr=groups[0].learning_rate,
            clip_threshold=options.get("clip_threshold", 1.0),
            decay_rate=options.get("decay", -0.8),
            scale_parameter=False,
            relative_step=False,
        )
    )


def _lion(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return _checked(Lion(_settings(groups, weight_decay), weight_decouple=True, **options))


def _prodigy(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Prodigy

    _require_one_rate("prodigy", groups)
    return _checked(Prodigy(_settings(groups, weight_decay), weight_decouple=True, **options))


def _d_adaptation(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import DAdaptAdam

    _require_one_rate("d-adaptation", groups)
    growth = options.pop("growth", None)
    options["growth_rate"] = math.inf if growth is None else growth
    return _checked(DAdaptAdam(_settings(groups, weight_decay), weight_decouple=True, **options))


def _schedule_free(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScheduleFreeAdamW

    return _checked(ScheduleFreeAdamW(_settings(groups, weight_decay), **options))


def _checked(optimiser: Any) -> torch.optim.Optimizer:
    # Libraries without types.
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise TypeError(f"{type(optimiser).__name__} is no optimiser of torch")
    return optimiser


def _require_one_rate(name: str, groups: Sequence[ParameterGroup]) -> None:
    rates = sorted({group.learning_rate for group in groups})
    if len(rates) > 1:
        raise SettingsError(
            f"optimiser {name!r} finds one rate for all parameters, and {len(rates)} are set: "
            + ", ".join(f"{rate:g}" for rate in rates),
            where="rates.optimiser",
            remedy="set the rates of parts to the same, or choose another optimiser",
        )


optimizers.add("adamw", _adamw)
optimizers.add("adamw-8bit", _adamw_8bit)
optimizers.add("lion", _lion)
optimizers.add("adafactor", _adafactor)
optimizers.add("prodigy", _prodigy)
optimizers.add("d-adaptation", _d_adaptation)
optimizers.add("schedule-free", _schedule_free)
