"""What a person may set about each merge method. Torch-free; the methods live beside this file, one a file."""

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
    """What all methods have: how far the result is compressed.

    Attributes:
        rank: The rank of the result, or where energy or error is set too, the largest one. None keeps an exact result
            exact; the result of a method that works element by element gets the sum of the ranks.
        energy: The least rank that keeps this share of the squared norm.
        error: The least rank whose relative error is at most this.
        kind: What the result is stored as: `lora`, or `full` (the dense difference, which is never compressed).
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
        """Whether anything is said about how far to compress."""
        return (self.rank, self.energy, self.error) != (None, None, None)

    def parameters(self) -> dict[str, Any]:
        """The method's own parameters, by name."""
        shared = {*MergeOptions.model_fields, "method"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}

    @model_validator(mode="after")
    def _full_is_not_compressed(self) -> MergeOptions:
        if self.kind == "full" and self.compresses:
            raise ValueError("rank, energy and error belong to kind lora; leave them out, or choose lora")
        return self


class Concatenate(MergeOptions):
    """The weighted sum, exact: ranks side by side. LoRA alone."""

    method: Literal["concatenate"] = "concatenate"


class Linear(MergeOptions):
    """The weighted sum, exact, of adapters of any kinds."""

    method: Literal["linear"] = "linear"


class Interpolate(MergeOptions):
    """The weighted mean: the weights are divided by their sum."""

    method: Literal["interpolate"] = "interpolate"


class Svd(MergeOptions):
    """The weighted sum, then the best approximation at a rank."""

    method: Literal["svd"] = "svd"

    @model_validator(mode="after")
    def _says_how_far(self) -> Svd:
        if not self.compresses:
            raise ValueError("svd needs rank, energy or error")
        return self


class Ties(MergeOptions):
    """TIES (Yadav et al. 2023): trim, elect signs, mean of those that agree.

    Attributes:
        density: Share of the elements that the trim keeps, the largest, in each adapter and module.
        scale: What the result is multiplied by (lambda in the paper).
    """

    method: Literal["ties"] = "ties"
    density: _Density = 0.2
    scale: _Finite = 1.0


class Dare(MergeOptions):
    """DARE (Yu et al. 2024): drop elements by chance, rescale the rest, add up.

    Attributes:
        density: The chance of an element to stay.
    """

    method: Literal["dare"] = "dare"
    density: _Density = 0.5


class DareTies(MergeOptions):
    """DARE's drop, then TIES' election and mean.

    Attributes:
        density: The chance of an element to stay.
        scale: What the result is multiplied by.
    """

    method: Literal["dare-ties"] = "dare-ties"
    density: _Density = 0.5
    scale: _Finite = 1.0


class Della(MergeOptions):
    """DELLA (Deep et al. 2024): the larger an element in its row, the likelier it stays; then TIES' election and mean.

    Attributes:
        density: The mean chance of an element to stay.
        window: The difference of chances between the largest and the smallest element of a row.
        scale: What the result is multiplied by.
    """

    method: Literal["della"] = "della"
    density: _Density = 0.5
    window: _Finite = Field(default=0.2, ge=0.0, lt=1.0)
    scale: _Finite = 1.0

    @model_validator(mode="after")
    def _chances_are_chances(self) -> Della:
        if self.density - self.window / 2 <= 0.0 or self.density + self.window / 2 > 1.0:
            low, high = self.density - self.window / 2, self.density + self.window / 2
            raise ValueError(
                f"density {self.density} and window {self.window} give chances from {low:g} to {high:g}; "
                "they must be above 0 and at most 1"
            )
        return self


class MagnitudePrune(MergeOptions):
    """Keeps the largest elements of each adapter and adds up.

    Attributes:
        density: Share of the elements that stay.
    """

    method: Literal["magnitude-prune"] = "magnitude-prune"
    density: _Density = 0.5


class Slerp(MergeOptions):
    """Spherical interpolation of two adapters, module by module: the weights say where on the arc."""

    method: Literal["slerp"] = "slerp"


class ModelStock(MergeOptions):
    """Model Stock (Jang et al. 2024): the mean, drawn towards the base by how far the adapters disagree."""

    method: Literal["model-stock"] = "model-stock"


class GeometricMedian(MergeOptions):
    """The point with the smallest sum of weighted distances to the adapters' deltas, module by module.

    Attributes:
        tolerance: Ends the iteration when the sum of distances falls by less than this share.
        iterations: At most so many.
    """

    method: Literal["geometric-median"] = "geometric-median"
    tolerance: _Finite = Field(default=1e-10, gt=0.0, lt=1.0)
    iterations: int = Field(default=200, ge=1, le=100_000)


class Learned(MergeOptions):
    """The weighted sum whose weights make the denoising loss on a few pictures smallest, from the given ones.

    Attributes:
        per: One weight an adapter, or one for each block of the model (`unet.down_blocks.1`, `text_encoder`).
        steps: Steps of Adam.
        learning_rate: Of Adam.
        timesteps: How many timesteps of each picture, in the middles of equal parts of the schedule.
        pull: Weight of the squared distance to the start, beside the loss.
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
"""Name of a method to what may be set about it."""

_any: TypeAdapter[MergeOptions] = TypeAdapter(AnyMergeOptions)


def parse_options(method: str, options: Mapping[str, Any] | None = None) -> MergeOptions:
    """The options of a method from plain values, as a command line or a file gives them.

    Raises:
        SettingsError: No such method, an option that it does not have, or a value that it does not take.
    """
    if method not in SPECS:
        raise SettingsError(f"unknown merge method {method!r}", allowed=", ".join(SPECS), remedy="choose one of these")
    spec = SPECS[method]
    try:
        return _any.validate_python({**(options or {}), "method": method})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][-1]) if len(first["loc"]) > 1 else ""
        own = [field for field in spec.model_fields if field != "method"]
        if first["type"] == "extra_forbidden":
            raise SettingsError(
                f"merge method {method!r} has no option {name!r}", allowed=", ".join(own), remedy="leave it out"
            ) from None
        problem = first["msg"].removeprefix("Value error, ")
        where = f"merge method {method!r}" + (f", {name}" if name else "")
        raise SettingsError(problem, where=where, remedy="mend the value") from None
