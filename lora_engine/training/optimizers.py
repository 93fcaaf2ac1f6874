"""Builds optimizers by name. The loop uses them; `optimizer_state` saves and restores their state.

Optimizers of third-party packages need the extra `optimisers`.
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


class OptimizerBuilder(Protocol):
    """Builds an optimizer."""

    def __call__(self, groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
        """Returns the optimizer of some groups.

        Args:
            groups: Trained parameters.
            weight_decay: Weight decay of groups without their own; always decoupled from the gradient.
            **options: The optimizer's own options; see `specs.rates`.
        """
        ...


optimizers: Registry[OptimizerBuilder] = Registry("optimizer")

# Optimizer to its third-party package: (import name, name on PyPI).
_PACKAGES = {
    "adamw-8bit": ("bitsandbytes", "bitsandbytes"),
    "lion": ("pytorch_optimizer", "pytorch-optimizer"),
    "prodigy": ("pytorch_optimizer", "pytorch-optimizer"),
    "d-adaptation": ("pytorch_optimizer", "pytorch-optimizer"),
    "schedule-free": ("pytorch_optimizer", "pytorch-optimizer"),
    "came": ("pytorch_optimizer", "pytorch-optimizer"),
    "ademamix": ("pytorch_optimizer", "pytorch-optimizer"),
}


def require_optimizer(name: str) -> None:
    """Checks that an optimizer is known and its package installed; cheap, for use before any work.

    Raises:
        SettingsError: It is not; the message names the extra.
    """
    optimizers[name]
    module, package = _PACKAGES.get(name, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        built_in = sorted(optimizer for optimizer in optimizers if optimizer not in _PACKAGES)
        raise SettingsError(
            f"optimizer {name!r} needs the package {package!r}, which is not installed",
            where="rates.optimiser",
            allowed=f"without it: {', '.join(built_in)}",
            remedy='install the extra: pip install "loraline[optimisers]"',
        )


def build_optimizer(
    name: str, groups: Sequence[ParameterGroup], weight_decay: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Returns an optimizer by name; see `OptimizerBuilder`.

    Raises:
        SettingsError: It is unknown or not installed.
    """
    require_optimizer(name)
    return optimizers[name](groups, weight_decay, **options)


def _param_groups(groups: Sequence[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
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
    return torch.optim.AdamW(_param_groups(groups, weight_decay), fused=devices <= {"cpu", "cuda"}, **options)


def _adamw_8bit(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    if not options.pop("paged", False):
        return _checked(AdamW8bit(_param_groups(groups, weight_decay), **options))
    devices = {value.device.type for group in groups for value in group.parameters.values()}
    if devices != {"cuda"}:
        raise SettingsError(
            f"paged state needs a GPU, but the training runs on {' and '.join(sorted(devices))}",
            where="rates.optimiser.paged",
            allowed="device cuda",
            remedy="leave paged out: the memory of a CPU is not paged",
        )
    return _checked(PagedAdamW8bit(_param_groups(groups, weight_decay), **options))


def _adafactor(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    # torch's Adafactor always scales by the parameter's size, so factors initialized with zero would never move.
    return _checked(
        Adafactor(
            _param_groups(groups, weight_decay),
            lr=groups[0].learning_rate,
            clip_threshold=options.get("clip_threshold", 1.0),
            decay_rate=options.get("decay", -0.8),
            scale_parameter=False,
            relative_step=False,
        )
    )


def _lion(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return _checked(Lion(_param_groups(groups, weight_decay), weight_decouple=True, **options))


def _prodigy(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Prodigy

    _require_one_rate("prodigy", groups)
    return _checked(Prodigy(_param_groups(groups, weight_decay), weight_decouple=True, **options))


def _d_adaptation(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import DAdaptAdam

    _require_one_rate("d-adaptation", groups)
    growth = options.pop("growth", None)
    options["growth_rate"] = math.inf if growth is None else growth
    return _checked(DAdaptAdam(_param_groups(groups, weight_decay), weight_decouple=True, **options))


def _schedule_free(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScheduleFreeAdamW

    return _checked(ScheduleFreeAdamW(_param_groups(groups, weight_decay), **options))


class _DecoupledSgd(torch.optim.SGD):
    """SGD whose weight decay is decoupled from the gradient, as that of the other optimizers."""

    def step(self, closure: Any = None) -> Any:
        """Decays the weights by rate times decay, then takes the step."""
        with torch.no_grad():
            for group in self.param_groups:
                for value in group["params"]:
                    if group["decoupled_decay"] and value.grad is not None:
                        value.mul_(1.0 - group["lr"] * group["decoupled_decay"])
        return super().step(closure)


def _sgd(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    settings = _param_groups(groups, weight_decay)
    decoupled = [{**group, "weight_decay": 0.0, "decoupled_decay": group["weight_decay"]} for group in settings]
    return _DecoupledSgd(decoupled, weight_decay=0.0, **options)


def _muon(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    others = {name: value for group in groups for name, value in group.parameters.items() if value.dim() != 2}
    if others:
        name, value = next(iter(others.items()))
        raise SettingsError(
            f"optimizer 'muon' trains matrices, but {len(others)} parameters have other shapes, first {name!r} "
            f"{list(value.shape)}",
            where="rates.optimiser",
            allowed="linear layers, and kinds whose factors are matrices, such as lora",
            remedy="set targets to attention or linear, or choose another optimizer",
        )
    return torch.optim.Muon(_param_groups(groups, weight_decay), **options)


def _came(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import CAME

    return _checked(CAME(_param_groups(groups, weight_decay), weight_decouple=True, **options))


def _ademamix(groups: Sequence[ParameterGroup], weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdEMAMix

    grow = options.pop("grow", None)
    return _checked(AdEMAMix(_param_groups(groups, weight_decay), weight_decouple=True, t_alpha_beta3=grow, **options))


def _checked(optimizer: Any) -> torch.optim.Optimizer:
    # These libraries have no type hints.
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a torch optimizer")
    return optimizer


def _require_one_rate(name: str, groups: Sequence[ParameterGroup]) -> None:
    rates = sorted({group.learning_rate for group in groups})
    if len(rates) > 1:
        raise SettingsError(
            f"optimizer {name!r} estimates one rate for all parameters, but {len(rates)} are set: "
            + ", ".join(f"{rate:g}" for rate in rates),
            where="rates.optimiser",
            remedy="set one rate for all parts, or choose another optimizer",
        )


optimizers.add("adamw", _adamw)
optimizers.add("adamw-8bit", _adamw_8bit)
optimizers.add("lion", _lion)
optimizers.add("adafactor", _adafactor)
optimizers.add("prodigy", _prodigy)
optimizers.add("d-adaptation", _d_adaptation)
optimizers.add("schedule-free", _schedule_free)
optimizers.add("sgd", _sgd)
optimizers.add("came", _came)
optimizers.add("ademamix", _ademamix)
optimizers.add("muon", _muon)
