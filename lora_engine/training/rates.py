"""Which parameters learn at which rate: pure functions of their names. The optimisers themselves live beside this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lora_engine.adapters.select import select_modules
from lora_engine.errors import SettingsError
from lora_engine.training.phases import ParameterGroup
from lora_engine.training.specs.rates import Rates

# The factor that begins at zero, B in the paper.
_UP = "up"
_BY_SHAPE = ("linear", "all", "norms")


def groups_for(
    parameters: Mapping[str, nn.Parameter], rates: Rates, learning_rate: float
) -> tuple[ParameterGroup, ...]:
    """The groups of an adapter's factors, one a rate, that of `learning_rate` first.

    Args:
        parameters: `<module>.<factor>` to parameter.
        rates: See `Rates`.
        learning_rate: Of all that `rates` says nothing about.

    Returns:
        Groups that hold each parameter once, without those whose rate is 0.

    Raises:
        SettingsError: A pattern means no module, no factor is an `up`, or nothing is left that moves.
    """
    groups: dict[float, dict[str, nn.Parameter]] = {}
    for name, rate in learning_rates(list(parameters), rates, learning_rate).items():
        if rate:
            groups.setdefault(rate, {})[name] = parameters[name]
    # The plain rate first: the first group's is the one that curves show.
    ordered = sorted(groups, key=lambda rate: rate != learning_rate)
    return tuple(ParameterGroup(groups[rate], rate) for rate in ordered)


def learning_rates(names: Sequence[str], rates: Rates, learning_rate: float) -> dict[str, float]:
    """The highest learning rate of each factor, in the order of the names.

    Args:
        names: `<module>.<factor>`.
        rates: See `Rates`.
        learning_rate: Of all that `rates` says nothing about.

    Raises:
        SettingsError: See `groups_for`.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    by_module = _module_rates(modules, rates, learning_rate)
    found: dict[str, float] = {}
    for name in names:
        module, _, factor = name.rpartition(".")
        found[name] = by_module[module] * (rates.up_ratio if factor == _UP else 1.0)
    if rates.up_ratio != 1.0 and not any(name.endswith(f".{_UP}") for name in names):
        raise SettingsError(
            f"up_ratio is {rates.up_ratio}, and the adapter has no factor 'up'",
            where="rates.up_ratio",
            remedy="leave it out, or choose kind lora, rslora, lora-fa, pissa or dora",
        )
    if not any(found.values()):
        raise SettingsError(
            f"all {len(names)} factors have a learning rate of 0", where="rates", remedy="let some of them move"
        )
    return found


def _module_rates(modules: list[str], rates: Rates, learning_rate: float) -> dict[str, float]:
    found = dict.fromkeys(modules, learning_rate)
    if rates.text is not None:
        texts = [name for name in modules if name.startswith("text_encoder")]
        if not texts:
            raise SettingsError(
                f"rates.text is {rates.text}, and no layer of a text encoder is adapted",
                where="rates.text",
                remedy="add text to the targets, or leave it out",
            )
        found |= dict.fromkeys(texts, rates.text)
    for pattern, rate in rates.layers.items():
        if pattern in _BY_SHAPE:
            raise SettingsError(
                f"{pattern!r} goes by the shapes of layers, and rates go by their names",
                where="rates.layers",
                allowed="attention, attention+ff, text, a glob such as 'unet.*.to_q', or 're:' and an expression",
            )
        found |= dict.fromkeys(select_modules(dict.fromkeys(modules, ()), pattern), rate)
    return found
