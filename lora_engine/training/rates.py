"""Assigns learning rates to parameters by name: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lora_engine.adapters.select import select_modules
from lora_engine.errors import SettingsError
from lora_engine.training.phases import ParameterGroup
from lora_engine.training.specs.rates import Rates

# The factor that is initialized with zero, B in the paper.
_UP = "up"
_BY_SHAPE = ("linear", "all", "norms")


def groups_for(
    parameters: Mapping[str, nn.Parameter], rates: Rates, learning_rate: float
) -> tuple[ParameterGroup, ...]:
    """Returns the groups of an adapter's factors, one per rate, that of `learning_rate` first.

    Args:
        parameters: `<module>.<factor>` to parameter.
        rates: See `Rates`.
        learning_rate: Rate of all factors that `rates` does not mention.

    Returns:
        Groups that hold each parameter once, without those whose rate is 0.

    Raises:
        SettingsError: A pattern matches no module, no factor is an `up`, or all rates are 0.
    """
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, rate in learning_rates(list(parameters), rates, learning_rate).items():
        if rate:
            groups.setdefault(rate, {})[name] = parameters[name]
    # The common rate first, since curves show the rate of the first group.
    ordered = sorted(groups, key=lambda rate: rate != learning_rate)
    return tuple(ParameterGroup(groups[rate], rate) for rate in ordered)


def learning_rates(names: Sequence[str], rates: Rates, learning_rate: float) -> dict[str, float]:
    """Returns the highest learning rate of each factor, in the order of the names.

    Args:
        names: `<module>.<factor>`.
        rates: See `Rates`.
        learning_rate: Rate of all factors that `rates` does not mention.

    Raises:
        SettingsError: See `groups_for`.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    by_module = _module_rates(modules, rates, learning_rate)
    by_factor: dict[str, float] = {}
    for name in names:
        module, _, factor = name.rpartition(".")
        by_factor[name] = by_module[module] * (rates.up_ratio if factor == _UP else 1.0)
    if rates.up_ratio != 1.0 and not any(name.endswith(f".{_UP}") for name in names):
        raise SettingsError(
            f"up_ratio is {rates.up_ratio}, but the adapter has no factor 'up'",
            where="rates.up_ratio",
            remedy="remove it, or choose kind lora, rslora, lora-fa, pissa or dora",
        )
    if not any(by_factor.values()):
        raise SettingsError(
            f"all {len(names)} factors have a learning rate of 0",
            where="rates",
            remedy="set a rate above 0 for some of them",
        )
    return by_factor


def _module_rates(modules: list[str], rates: Rates, learning_rate: float) -> dict[str, float]:
    by_module = dict.fromkeys(modules, learning_rate)
    if rates.text is not None:
        text_modules = [name for name in modules if name.startswith("text_encoder")]
        if not text_modules:
            raise SettingsError(
                f"rates.text is {rates.text}, but no layer of a text encoder is adapted",
                where="rates.text",
                remedy="add text to the targets, or remove rates.text",
            )
        by_module |= dict.fromkeys(text_modules, rates.text)
    for pattern, rate in rates.layers.items():
        if pattern in _BY_SHAPE:
            raise SettingsError(
                f"{pattern!r} selects layers by shape, but rates are assigned by name",
                where="rates.layers",
                allowed="attention, attention+ff, text, a glob such as 'unet.*.to_q', or 're:' and an expression",
            )
        by_module |= dict.fromkeys(select_modules(dict.fromkeys(modules, ()), pattern), rate)
    return by_module
