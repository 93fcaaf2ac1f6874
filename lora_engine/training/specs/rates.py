"""Settings of optimizers, learning rates by part and layer, and EMA. Torch-free; `training` implements them.

In a pipeline file: `rates: {optimiser: lion, text: 1e-5, layers: {unet.mid_block.*: 5e-4}}`. An optimizer is a name, or
a name and options.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lora_engine.registries import NameOrOptions
from lora_engine.settings import AddedLater
from lora_engine.training.specs.schedules import Constant, Schedule

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, lt=1.0)]
_Rate = Annotated[float, Field(allow_inf_nan=False, ge=0.0)]
_Small = Annotated[float, Field(allow_inf_nan=False, gt=0.0)]


def _to_tuple(value: Any) -> Any:
    # A union by name validates the lists of a file as Python values, where a strict tuple refuses them.
    return tuple(value) if isinstance(value, list) else value


_Betas = Annotated[tuple[_Share, _Share], BeforeValidator(_to_tuple)]
_ThreeBetas = Annotated[tuple[_Share, _Share, _Share], BeforeValidator(_to_tuple)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimizer(_Part):
    """An optimizer and its options, which are passed to its builder.

    Attributes:
        finds_rate: The optimizer estimates the rate; `learning_rate` is a factor on the estimate.
        averages: The optimizer averages the weights, which replaces a falling rate.
    """

    finds_rate: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    name: str

    def options(self) -> dict[str, Any]:
        """Returns every field but the name."""
        return self.model_dump(exclude={"name"})


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), fused into one kernel for all tensors.

    Attributes:
        betas: Decay of the means of the gradient and of its square; 0 to below 1.
        eps: Added to the denominator.
    """

    name: Literal["adamw"] = "adamw"
    betas: _Betas = (0.9, 0.999)
    eps: _Small = 1e-8


class AdamW8bit(Optimizer):
    """AdamW with 8-bit state (Dettmers et al. 2022): a quarter of the memory, for factors of 4096 elements or more.

    Attributes:
        betas: See `AdamW`.
        eps: See `AdamW`.
        paged: Moves the state to the CPU's memory when the GPU has none left; needs a GPU.
    """

    name: Literal["adamw-8bit"] = "adamw-8bit"
    betas: _Betas = (0.9, 0.999)
    eps: _Small = 1e-8
    paged: Annotated[bool, AddedLater()] = False


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of a mean; needs 1/10 to 1/3 of AdamW's rate and half of its state.

    Attributes:
        betas: Weight of the mean in a step, and decay of the mean; 0 to below 1.
    """

    name: Literal["lion"] = "lion"
    betas: _Betas = (0.9, 0.99)


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) at the set rate: stores row and column means of the squares only.

    Attributes:
        clip_threshold: Largest root mean square of an update before the rate.
        decay: Exponent by which the averaging time grows; below 0.
    """

    name: Literal["adafactor"] = "adafactor"
    clip_threshold: _Small = 1.0
    decay: Annotated[float, Field(allow_inf_nan=False, ge=-1.0, lt=0.0)] = -0.8


class Prodigy(Optimizer):
    """Prodigy (Mishchenko & Defazio 2023): estimates the rate; `learning_rate` is a factor on it, 1 by convention.

    Attributes:
        betas: See `AdamW`.
        d_coef: Factor on the estimate; 0.5 to 2 are usual.
        d0: Initial estimate.
        bias_correction: Applies Adam's bias correction, which starts more gently.
        safeguard_warmup: Excludes the warmup from the estimate; for runs with a warmup.
    """

    finds_rate: ClassVar[bool] = True
    name: Literal["prodigy"] = "prodigy"
    betas: _Betas = (0.9, 0.999)
    d_coef: _Small = 1.0
    d0: _Small = 1e-6
    bias_correction: bool = False
    safeguard_warmup: bool = False


class DAdaptation(Optimizer):
    """Adam with D-Adaptation (Defazio & Mishchenko 2023): estimates the rate, more carefully than Prodigy.

    Attributes:
        betas: See `AdamW`.
        d0: Initial estimate.
        growth: Largest factor by which the estimate grows in a step; None is unbounded.
        bias_correction: Applies Adam's bias correction.
    """

    finds_rate: ClassVar[bool] = True
    name: Literal["d-adaptation"] = "d-adaptation"
    betas: _Betas = (0.9, 0.999)
    d0: _Small = 1e-6
    growth: Annotated[float, Field(allow_inf_nan=False, gt=1.0)] | None = None
    bias_correction: bool = False


class ScheduleFree(Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024): averages the weights in place of a falling rate.

    Validation, samples and the written adapter use the average.

    Attributes:
        betas: Interpolation between the weights and their average for gradients, above 0, and the second of `AdamW`.
        eps: See `AdamW`.
    """

    averages: ClassVar[bool] = True
    name: Literal["schedule-free"] = "schedule-free"
    betas: Annotated[
        tuple[Annotated[float, Field(allow_inf_nan=False, gt=0.0, lt=1.0)], _Share], BeforeValidator(_to_tuple)
    ] = (0.9, 0.999)
    eps: _Small = 1e-8


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum: the least memory, and rates of 10 to 1000 times AdamW's.

    Attributes:
        momentum: Decay of the mean of the gradients; 0 to below 1, 0 needs no state.
        nesterov: Nesterov's form; needs a momentum.
    """

    name: Literal["sgd"] = "sgd"
    momentum: _Share = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_has_a_momentum(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set momentum: 0.9")
        return self


class Came(Optimizer):
    """CAME (Luo et al. 2023): Adafactor's memory, with steps that are scaled by how steady they are.

    Attributes:
        betas: Decay of the means of the gradient, of its square, and of the instability; 0 to below 1.
        clip_threshold: Largest root mean square of an update before the rate.
    """

    name: Literal["came"] = "came"
    betas: _ThreeBetas = (0.9, 0.999, 0.9999)
    clip_threshold: _Small = 1.0


class AdEMAMix(Optimizer):
    """AdEMAMix (Pagliardini et al. 2024): AdamW with a second, slower mean of the gradient.

    Attributes:
        betas: Decay of the mean of the gradient, of its square, and of the slow mean; 0 to below 1.
        alpha: Weight of the slow mean.
        grow: Steps in which the weight and the decay of the slow mean rise to their values; None begins with them.
        eps: See `AdamW`.
    """

    name: Literal["ademamix"] = "ademamix"
    betas: _ThreeBetas = (0.9, 0.999, 0.9999)
    alpha: Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=100.0)] = 5.0
    grow: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    eps: _Small = 1e-8


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal by Newton-Schulz steps; for factors that are matrices.

    Attributes:
        momentum: Decay of the mean of the gradients; 0 to below 1.
        nesterov: Nesterov's form.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: Factor on the rate by the shape of a matrix: `match_rms_adamw` makes steps as large as AdamW's, so
            that its rates apply; `original` is sqrt(max(1, rows / columns)).
    """

    name: Literal["muon"] = "muon"
    momentum: _Share = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, le=99)] = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"


AnyOptimizer = Annotated[
    AdamW | AdamW8bit | Lion | Adafactor | Prodigy | DAdaptation | ScheduleFree | Sgd | Came | AdEMAMix | Muon,
    Field(discriminator="name"),
    NameOrOptions(),
]


class Ema(_Part):
    """An exponential moving average of the adapter's factors (Polyak & Juditsky 1992), steadier than the last step.

    Validations and samples use the average.

    Attributes:
        decay: Share of the average that is kept in a step; 0 to below 1.
        warmup: Limits the decay in step n, counted from 0, to (1 + n) / (10 + n).
        written: Whether the average (`mean`) or the factors of the last step (`last`) become the adapter.
    """

    decay: _Share = 0.999
    warmup: bool = True
    written: Literal["mean", "last"] = "mean"


class Rates(_Part):
    """The optimizer, learning rates of parts of the adapter, and EMA; by default AdamW and one rate for all.

    Attributes:
        optimiser: Optimizer by name, or by name and options.
        text: Learning rate of the text encoders' factors; None is the common rate, 0 freezes them.
        layers: Module pattern (`unet.mid_block.*`, `re:...`, `attention`, `text`) to learning rate; 0 freezes the
            layers. The last matching pattern wins, and wins over `text`.
        up_ratio: LoRA+ (Hayou et al. 2024): rate of the factor `up` over that of the others; 1 to 1000, in the paper
            16. For kinds with `up` factors.
        ema: Exponential moving average of the factors; None disables it.
    """

    optimiser: AnyOptimizer = AdamW()
    text: _Rate | None = None
    layers: dict[str, _Rate] = {}
    up_ratio: _Finite = Field(default=1.0, ge=1.0, le=1000.0)
    ema: Ema | None = None

    @model_validator(mode="after")
    def _one_estimated_rate(self) -> Rates:
        settings = [name for name in ("text", "layers") if getattr(self, name)] + ["up_ratio"] * (self.up_ratio != 1.0)
        if self.optimiser.finds_rate and settings:
            raise ValueError(
                f"{self.optimiser.name} estimates one rate for all parameters; leave out {' and '.join(settings)}, "
                "or choose another optimiser"
            )
        if self.optimiser.averages and self.ema is not None:
            raise ValueError(f"{self.optimiser.name} already averages the weights; leave out ema")
        return self

    def check(self, schedule: Schedule, learning_rate: float) -> None:
        """Checks the optimizer against a schedule and a rate.

        Raises:
            ValueError: They do not fit; the message names the setting to change.
        """
        optimizer = self.optimiser
        if optimizer.averages and not isinstance(schedule, Constant):
            raise ValueError(
                f"optimizer {optimizer.name!r} replaces schedule {schedule.name!r}; set schedule: constant"
            )
        if optimizer.finds_rate and not 0.01 <= learning_rate <= 100.0:
            raise ValueError(
                f"learning_rate {learning_rate} is a factor on the rate that optimizer {optimizer.name!r} estimates; "
                "set learning_rate: 1.0 (0.01 to 100)"
            )
