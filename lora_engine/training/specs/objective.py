"""Settings of the objective: noise, timesteps and loss weighting. Torch-free; `training.objective` computes it.

In a pipeline file: `objective: {weighting: min_snr, loss: {name: huber, delta: 0.2}}`. Each part is a name, or a name
and options.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.registries import NameOrOptions
from lora_engine.settings import AddedLater

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Plain(_Part):
    """Weights every timestep alike."""

    name: Literal["none"] = "none"


class MinSnr(_Part):
    """Min-SNR (Hang et al. 2023): lowers the weight of nearly clean images. For bases that predict noise or v.

    Attributes:
        gamma: Signal-to-noise ratio above which weights fall; above 0, usually 5.
    """

    name: Literal["min_snr"] = "min_snr"
    gamma: _Finite = Field(default=5.0, gt=0.0)


class SoftMinSnr(_Part):
    """Soft min-SNR (Crowson et al. 2024): min-SNR without the kink. For bases that predict noise or v.

    Attributes:
        gamma: Signal-to-noise ratio around which weights begin to fall; above 0, in the paper 4.
    """

    name: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: _Finite = Field(default=4.0, gt=0.0)


class Debiased(_Part):
    """Debiased estimation (Yu et al. 2023): raises the weight of noisy images. For bases that predict noise or v."""

    name: Literal["debiased"] = "debiased"


Weighting = Annotated[Plain | MinSnr | SoftMinSnr | Debiased, Field(discriminator="name"), NameOrOptions()]


class L2(_Part):
    """The squared error."""

    name: Literal["l2"] = "l2"


class L1(_Part):
    """The absolute error."""

    name: Literal["l1"] = "l1"


DeltaSchedule = Literal["constant", "exponential", "snr"]


class _WithDelta(_Part):
    delta: _Finite = Field(default=0.1, gt=0.0)
    schedule: Annotated[DeltaSchedule, AddedLater()] = "constant"

    @model_validator(mode="after")
    def _schedule_begins_at_one(self) -> Self:
        if self.schedule != "constant" and self.delta > 1.0:
            raise ValueError(
                f"delta {self.delta} is that of pure noise, and schedule {self.schedule!r} begins at 1 without noise; "
                "set delta to at most 1, or schedule: constant"
            )
        return self


class Huber(_WithDelta):
    """Quadratic for small errors, linear for large ones, so outliers pull less. Equals `l2` for large `delta`.

    Attributes:
        delta: Error at which it becomes linear, in the latents' units; above 0.
        schedule: `constant` has this delta at all timesteps. `exponential` is delta^t for a share t of the schedule.
            `snr` is (1 - delta) / (1 + sigma)^2 + delta, sigma = 1 / sqrt(snr); for bases that predict noise or v.
    """

    name: Literal["huber"] = "huber"


class SmoothL1(_WithDelta):
    """Absolute for large errors, quadratic for small ones: `huber` / (2 delta). Tends to `l1` for small `delta`.

    Attributes:
        delta: Error at which it becomes linear, in the latents' units; above 0.
        schedule: See `Huber`.
    """

    name: Literal["smooth_l1"] = "smooth_l1"


Loss = Annotated[L2 | L1 | Huber | SmoothL1, Field(discriminator="name"), NameOrOptions()]


class Uniform(_Part):
    """All timesteps are equally likely."""

    name: Literal["uniform"] = "uniform"


class LogitNormal(_Part):
    """Favors the middle (Esser et al. 2024, eq. 19): sigmoid of a normal variable.

    Attributes:
        mean: Mean of the normal variable; above 0 favors noisier timesteps.
        std: Its standard deviation; above 0, larger is flatter.
    """

    name: Literal["logit_normal"] = "logit_normal"
    mean: _Finite = 0.0
    std: _Finite = Field(default=1.0, gt=0.0)


class Mode(_Part):
    """Favors the middle and keeps every timestep likely (Esser et al. 2024, eq. 20).

    Attributes:
        scale: -1 favors the ends, 0 is uniform, 1.75 favors the middle.
    """

    name: Literal["mode"] = "mode"
    scale: _Finite = Field(default=1.29, ge=-1.0, le=1.75)


Distribution = Annotated[Uniform | LogitNormal | Mode, Field(discriminator="name"), NameOrOptions()]


class Timesteps(_Part):
    """Range and distribution of the trained timesteps.

    Attributes:
        distribution: Distribution over the range.
        low: Start of the range; 0 is the image, 1 is noise.
        high: End of the range. An adapter for composition trains the upper part, one for detail the lower.
        shift: Flow matching only: shift of timesteps towards noise (Esser et al. 2024, eq. 23); 1 is no shift. None is
            the base's own, which may depend on the image size.
    """

    distribution: Distribution = Uniform()
    low: _Finite = Field(default=0.0, ge=0.0, lt=1.0)
    high: _Finite = Field(default=1.0, gt=0.0, le=1.0)
    shift: _Finite | None = Field(default=None, gt=0.0, le=100.0)

    @model_validator(mode="after")
    def _range_is_valid(self) -> Timesteps:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Pyramid(_Part):
    """Multi-resolution noise (Whitaker 2023): adds coarse noise to the fine, which moves large areas together.

    Attributes:
        discount: Strength of each coarser level relative to the previous one; 0 to 1.
        levels: Largest number of coarser levels; stops at one pixel.
    """

    discount: _Finite = Field(default=0.35, gt=0.0, le=1.0)
    levels: int = Field(default=6, ge=1, le=16)


class Objective(_Part):
    """The objective of the denoising methods; the defaults are the plain mean squared error over all timesteps.

    Applies to the user's images and to class images alike.

    Attributes:
        weighting: Weight of an error by its timestep.
        loss: Loss of an error by its size.
        timesteps: Distribution of the timesteps.
        noise_offset: Deviation of a number added to the noise of a whole channel (Guttenberg 2023), which lets images
            become very dark or bright; 0 to 1, usually 0.05 to 0.1.
        pyramid: Multi-resolution noise; None is white noise.
        input_perturbation: Deviation of extra noise added to the input but not to the target (Ning et al. 2023); 0 to
            1, in the paper 0.1.
        random_offset: Draws the strength of each image's offset between 0 and `noise_offset`.
        random_perturbation: Draws the strength of each image's perturbation between 0 and `input_perturbation`.
    """

    weighting: Weighting = Plain()
    loss: Loss = L2()
    timesteps: Timesteps = Timesteps()
    noise_offset: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    pyramid: Pyramid | None = None
    input_perturbation: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    random_offset: Annotated[bool, AddedLater()] = False
    random_perturbation: Annotated[bool, AddedLater()] = False

    @model_validator(mode="after")
    def _there_is_a_strength_to_draw(self) -> Objective:
        for switch, strength in (("random_offset", "noise_offset"), ("random_perturbation", "input_perturbation")):
            if getattr(self, switch) and not getattr(self, strength):
                raise ValueError(f"{switch} draws a strength up to {strength}, which is 0; set {strength}")
        return self
