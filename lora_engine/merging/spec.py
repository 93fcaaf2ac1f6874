"""Options of each merge method. Must not import torch; the methods are in the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from lora_engine.errors import SettingsError

Weight = float | dict[str, float]
"""A number for the whole adapter, or numbers by pattern over module names; see `lora_engine.merging.weights`."""

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Density = Annotated[float, Field(gt=0.0, le=1.0)]


class MergeOptions(BaseModel):
    """Options of all methods: the compression of the result.

    Attributes:
        rank: Rank of the result; with energy or error, the maximum rank. None keeps an exact result exact, and uses
            the sum of the ranks for an elementwise method.
        energy: Use the least rank that keeps this share of the squared norm.
        error: Use the least rank with at most this relative error.
        kind: Kind of the result: `lora`, or `full` (the dense difference, which is never compressed).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: _Finite | None = Field(default=None, gt=0.0, le=1.0)
    error: _Finite | None = Field(default=None, ge=0.0, lt=1.0)
    kind: Literal["lora", "full"] = "lora"

    @property
    def name(self) -> str:
        """Name of the method."""
        return str(type(self).model_fields["method"].default)

    @property
    def compresses(self) -> bool:
        """True if rank, energy or error is set."""
        return (self.rank, self.energy, self.error) != (None, None, None)

    def parameters(self) -> dict[str, Any]:
        """Returns the options of the method by name, without those of all methods."""
        shared = {*MergeOptions.model_fields, "method"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}

    @model_validator(mode="after")
    def _full_is_not_compressed(self) -> MergeOptions:
        if self.kind == "full" and self.compresses:
            raise ValueError("rank, energy and error belong to kind lora; leave them out, or choose lora")
        return self


class Concatenate(MergeOptions):
    """The exact weighted sum by concatenated ranks. LoRA only."""

    method: Literal["concatenate"] = "concatenate"


class Linear(MergeOptions):
    """The exact weighted sum of adapters of any kinds."""

    method: Literal["linear"] = "linear"


class Interpolate(MergeOptions):
    """The weighted mean: the weights are divided by their sum."""

    method: Literal["interpolate"] = "interpolate"


class Svd(MergeOptions):
    """The weighted sum, then the best approximation at a rank."""

    method: Literal["svd"] = "svd"

    @model_validator(mode="after")
    def _needs_a_budget(self) -> Svd:
        if not self.compresses:
            raise ValueError("svd needs rank, energy or error")
        return self


class Ties(MergeOptions):
    """TIES (Yadav et al. 2023): trim, elect signs, mean of the elements that agree.

    Attributes:
        density: Share of the largest elements that the trim keeps, per adapter and module.
        scale: Factor of the result (lambda in the paper).
    """

    method: Literal["ties"] = "ties"
    density: _Density = 0.2
    scale: _Finite = 1.0


class Dare(MergeOptions):
    """DARE (Yu et al. 2024): drops random elements, rescales the rest, and sums.

    Attributes:
        density: Probability that an element is kept.
    """

    method: Literal["dare"] = "dare"
    density: _Density = 0.5


class DareTies(MergeOptions):
    """DARE's drop, then TIES' sign election and mean.

    Attributes:
        density: Probability that an element is kept.
        scale: Factor of the result.
    """

    method: Literal["dare-ties"] = "dare-ties"
    density: _Density = 0.5
    scale: _Finite = 1.0


class Della(MergeOptions):
    """DELLA (Deep et al. 2024): keeps larger elements of a row with higher probability; then as TIES.

    Attributes:
        density: Mean probability that an element is kept.
        window: Difference of the probabilities of the largest and the smallest element of a row.
        scale: Factor of the result.
    """

    method: Literal["della"] = "della"
    density: _Density = 0.5
    window: _Finite = Field(default=0.2, ge=0.0, lt=1.0)
    scale: _Finite = 1.0

    @model_validator(mode="after")
    def _probabilities_are_valid(self) -> Della:
        if self.density - self.window / 2 <= 0.0 or self.density + self.window / 2 > 1.0:
            low, high = self.density - self.window / 2, self.density + self.window / 2
            raise ValueError(
                f"density {self.density} and window {self.window} give probabilities from {low:g} to {high:g}; "
                "they must be above 0 and at most 1"
            )
        return self


class MagnitudePrune(MergeOptions):
    """Keeps the largest elements of each adapter, and sums.

    Attributes:
        density: Share of the elements that are kept.
    """

    method: Literal["magnitude-prune"] = "magnitude-prune"
    density: _Density = 0.5


class Slerp(MergeOptions):
    """Spherical interpolation of two adapters, module by module; the weights define the position on the arc."""

    method: Literal["slerp"] = "slerp"


class ModelStock(MergeOptions):
    """Model Stock (Jang et al. 2024): the mean, moved towards the base the more the adapters disagree."""

    method: Literal["model-stock"] = "model-stock"


class GeometricMedian(MergeOptions):
    """The point with the smallest sum of weighted distances to the adapters' deltas, module by module.

    Attributes:
        tolerance: Stop when the sum of distances falls by less than this share.
        iterations: Maximum number of iterations.
    """

    method: Literal["geometric-median"] = "geometric-median"
    tolerance: _Finite = Field(default=1e-10, gt=0.0, lt=1.0)
    iterations: int = Field(default=200, ge=1, le=100_000)


class Learned(MergeOptions):
    """The weighted sum, with weights optimized for the denoising loss on a few images.

    Attributes:
        per: One weight per adapter, or one per block of the model (`unet.down_blocks.1`, `text_encoder`).
        steps: Steps of Adam.
        learning_rate: Learning rate of Adam.
        timesteps: Timesteps per image, in the middles of equal parts of the schedule.
        pull: Weight of the squared distance to the initial weights, added to the loss.
    """

    method: Literal["learned"] = "learned"
    per: Literal["adapter", "block"] = "adapter"
    steps: int = Field(default=30, ge=1, le=100_000)
    learning_rate: _Finite = Field(default=0.05, gt=0.0)
    timesteps: int = Field(default=4, ge=1, le=1000)
    pull: _Finite = Field(default=0.0, ge=0.0)


AnyMergeOptions = Annotated[
    Concatenate
    | Linear
    | Interpolate
    | Svd
    | Ties
    | Dare
    | DareTies
    | Della
    | MagnitudePrune
    | Slerp
    | ModelStock
    | GeometricMedian
    | Learned,
    Field(discriminator="method"),
]

SPECS: Mapping[str, type[MergeOptions]] = {
    spec.model_fields["method"].default: spec for spec in get_args(get_args(AnyMergeOptions)[0])
}
"""Name of a method to the class of its options."""

_any: TypeAdapter[MergeOptions] = TypeAdapter(AnyMergeOptions)


def parse_options(method: str, options: Mapping[str, Any] | None = None) -> MergeOptions:
    """Returns the options of a method, parsed from plain values of a command line or a file.

    Raises:
        SettingsError: The method or an option is unknown, or a value is invalid.
    """
    if method not in SPECS:
        raise SettingsError(f"unknown merge method {method!r}", allowed=", ".join(SPECS), remedy="choose one of these")
    spec = SPECS[method]
    try:
        return _any.validate_python({**(options or {}), "method": method})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
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
