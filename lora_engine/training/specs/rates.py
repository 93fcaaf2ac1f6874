"""Optimisers, learning rates by part and layer, averages of the weights. Torch-free; `training` does it.

In a pipeline file: `rates: {optimiser: lion, text: 1e-5, layers: {unet.mid_block.*: 5e-4}}`; an optimiser by its name
alone, or by its name and options.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lora_engine.training.specs.schedules import Constant, Schedule

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, lt=1.0)]
_Rate = Annotated[float, Field(allow_inf_nan=False, ge=0.0)]
_Small = Annotated[float, Field(allow_inf_nan=False, gt=0.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Optimizer(_Part):
    """An optimiser and its options, which go to its builder as they are.

    Attributes:
        finds_rate: Whether it finds the rate itself, so that `learning_rate` is a factor on that.
        averages: Whether it averages the weights, which takes the place of a falling rate.
    """

    finds_rate: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    name: str

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return self.model_dump(exclude={"name"})


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), in one kernel for all tensors.

    Attributes:
        betas: How long the means of the gradient and of its square remember; 0 to below 1.
        eps: Added to the denominator.
    """

    name: Literal["adamw"] = "adamw"
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    eps: _Small = 1e-8


class AdamW8bit(Optimizer):
    """The same with its state in 8 bits (Dettmers et al. 2022): a quarter of the memory; factors below 4096 stay whole.

    Attributes:
        betas: As of `adamw`.
        eps: As of `adamw`.
    """

    name: Literal["adamw-8bit"] = "adamw-8bit"
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    eps: _Small = 1e-8


class Lion(Optimizer):
    """Lion (Chen et al. 2023): the sign of a mean; wants a third to a tenth of AdamW's rate, and half of its state.

    Attributes:
        betas: How much of the mean goes into a step, and how long it remembers; 0 to below 1.
    """

    name: Literal["lion"] = "lion"
    betas: tuple[_Share, _Share] = (0.9, 0.99)


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) with the rate that is set: rows and columns of squares instead of all of them.

    Attributes:
        clip_threshold: Largest root mean square of an update before the rate.
        decay: Power by which the memory grows; below 0.
    """

    name: Literal["adafactor"] = "adafactor"
    clip_threshold: _Small = 1.0
    decay: Annotated[float, Field(allow_inf_nan=False, ge=-1.0, lt=0.0)] = -0.8


class Prodigy(Optimizer):
    """Prodigy (Mishchenko & Defazio 2023): finds the rate itself; `learning_rate` is a factor on it, 1 to begin with.

    Attributes:
        betas: As of `adamw`.
        d_coef: Factor on the estimate; 0.5 to 2 are usual.
        d0: What the estimate begins at.
        bias_correction: Adam's, which starts more gently.
        safeguard_warmup: Whether a warmup is kept out of the estimate; for runs with one.
    """

    finds_rate: ClassVar[bool] = True
    name: Literal["prodigy"] = "prodigy"
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    d_coef: _Small = 1.0
    d0: _Small = 1e-6
    bias_correction: bool = False
    safeguard_warmup: bool = False


class DAdaptation(Optimizer):
    """Adam with D-Adaptation (Defazio & Mishchenko 2023): finds the rate itself, more carefully than Prodigy.

    Attributes:
        betas: As of `adamw`.
        d0: What the estimate begins at.
        growth: How much larger it may become in a step; None does not bound it.
        bias_correction: Adam's.
    """

    finds_rate: ClassVar[bool] = True
    name: Literal["d-adaptation"] = "d-adaptation"
    betas: tuple[_Share, _Share] = (0.9, 0.999)
    d0: _Small = 1e-6
    growth: Annotated[float, Field(allow_inf_nan=False, gt=1.0)] | None = None
    bias_correction: bool = False


class ScheduleFree(Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024): a mean of the weights in place of a falling rate.

    What is validated, drawn and written is the mean.

    Attributes:
        betas: How far the gradients are taken on the way to the mean, above 0, and as of `adamw`.
        eps: As of `adamw`.
    """

    averages: ClassVar[bool] = True
    name: Literal["schedule-free"] = "schedule-free"
    betas: tuple[Annotated[float, Field(allow_inf_nan=False, gt=0.0, lt=1.0)], _Share] = (0.9, 0.999)
    eps: _Small = 1e-8


AnyOptimizer = Annotated[
    AdamW | AdamW8bit | Lion | Adafactor | Prodigy | DAdaptation | ScheduleFree,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


class Ema(_Part):
    """A running mean of the adapter's factors (Polyak & Juditsky 1992), steadier than the last step.

    Validations and sample pictures are of the mean.

    Attributes:
        decay: How much of the mean stays in a step; 0 to below 1.
        warmup: Whether it begins with a short memory: in step n, from 0, at most (1 + n) / (10 + n) stays.
        written: Whether the mean or the last step's factors become the adapter.
    """

    decay: _Share = 0.999
    warmup: bool = True
    written: Literal["mean", "last"] = "mean"


class Rates(_Part):
    """The optimiser, learning rates of parts of the adapter, and averages of it; by default AdamW and one rate for all.

    Attributes:
        optimiser: By name, or with its options.
        text: Learning rate of the text encoders' factors; None is that of the rest, 0 lets them stand still.
        layers: Pattern of modules (`unet.mid_block.*`, `re:...`, `attention`, `text`) to their learning rate; 0 lets
            them stand still. The last one that means a module counts, before `text`.
        up_ratio: LoRA+ (Hayou et al. 2024): the rate of the factor `up` over that of the others; 1 to 1000, in the
            paper 16. Kinds with `up` factors.
        ema: A running mean of the factors; None has none.
    """

    optimiser: AnyOptimizer = AdamW()
    text: _Rate | None = None
    layers: dict[str, _Rate] = {}
    up_ratio: _Finite = Field(default=1.0, ge=1.0, le=1000.0)
    ema: Ema | None = None

    @model_validator(mode="after")
    def _one_rate_where_it_is_found(self) -> Rates:
        several = [name for name in ("text", "layers") if getattr(self, name)] + ["up_ratio"] * (self.up_ratio != 1.0)
        if self.optimiser.finds_rate and several:
            raise ValueError(
                f"{self.optimiser.name} finds one rate for all parameters; leave out {' and '.join(several)}, "
                "or choose another optimiser"
            )
        if self.optimiser.averages and self.ema is not None:
            raise ValueError(f"{self.optimiser.name} averages the weights itself; leave out ema")
        return self

    def check(self, schedule: Schedule, learning_rate: float) -> None:
        """Does nothing where an optimiser goes with a schedule and a rate.

        Raises:
            ValueError: It does not; says what to set.
        """
        optimiser = self.optimiser
        if optimiser.averages and not isinstance(schedule, Constant):
            raise ValueError(
                f"optimiser {optimiser.name} takes the place of schedule {schedule.name!r}; set schedule: constant"
            )
        if optimiser.finds_rate and not 0.01 <= learning_rate <= 100.0:
            raise ValueError(
                f"learning_rate {learning_rate} is a factor on the rate that optimiser {optimiser.name} finds; "
                "set learning_rate: 1.0 (0.01 to 100)"
            )
