"""Defines the entry of a merge method: it returns coefficients, or merges dense deltas elementwise.

Also parses the options of a method by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lora_engine.errors import SettingsError
from lora_engine.merging.spec import MergeOptions, Weight
from lora_engine.registries import Registry

if TYPE_CHECKING:
    from torch import Tensor

Gram = Callable[[], "Tensor"]
"""Computes the inner products of the deltas, `[n, n]` in float64; called only by methods that need them."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A method of merging: the base of `Combination` and `Elementwise`.

    Attributes:
        spec: The class of its options; its field `method` is the name.
        title: Its effect, in a few words, for help texts and tables.
        adapters: Required number of adapters; None means any number.
        normalizes: True if only the ratios of the weights count.
        learn: (adapters, weights, base, dataset, work folder, options, seed) -> the weights to merge with; such a
            method needs the base and captioned images. None means that the weights are the user's.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    spec: type[MergeOptions]
    title: str
    adapters: int | None = None
    normalizes: bool = False
    learn: Callable[..., Sequence[Weight]] | None = None
    revision: int = 0

    @property
    def name(self) -> str:
        """Name in specs and on the command line."""
        return str(self.spec.model_fields["method"].default)


@dataclass(frozen=True, kw_only=True)
class Combination(MergeMethod):
    """A method whose result is a linear combination of the deltas.

    LoRA adapters are combined exactly by concatenated factors; other kinds as dense deltas.

    Attributes:
        coefficients: (weights, gram, options by name) -> one coefficient per delta.
        lora_only: True if other kinds are an error.
        sees_deltas: True if the coefficients depend on the deltas (the Gram matrix), not only on the weights.
    """

    coefficients: Callable[..., list[float]]
    lora_only: bool = False
    sees_deltas: bool = False


@dataclass(frozen=True, kw_only=True)
class Elementwise(MergeMethod):
    """A method that works on the elements of dense deltas, module by module.

    Attributes:
        merge: (deltas, weights, options by name[, generators]) -> the merged delta.
        draws: True if it needs `generators`, one per delta.
    """

    merge: Callable[..., Tensor]
    draws: bool = False


METHODS: Registry[MergeMethod] = Registry(
    "merge method", entry=MergeMethod, source="lora_engine.merging.methods", group="loraline.merge_methods"
)


def parse_options(method: str, options: Mapping[str, Any] | None = None) -> MergeOptions:
    """Returns the options of a method, parsed from plain values of a command line or a file.

    Raises:
        SettingsError: The method or an option is unknown, or a value is invalid.
    """
    spec = METHODS[method].spec
    try:
        return spec.model_validate({**(options or {}), "method": method})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][-1]) if first["loc"] else ""
        options_of_method = [field for field in spec.model_fields if field != "method"]
        if first["type"] == "extra_forbidden":
            raise SettingsError(
                f"merge method {method!r} has no option {name!r}",
                allowed=", ".join(options_of_method),
                remedy="leave it out",
            ) from None
        problem = first["msg"].removeprefix("Value error, ")
        where = f"merge method {method!r}" + (f", {name}" if name else "")
        raise SettingsError(problem, where=where, remedy="fix the value") from None
