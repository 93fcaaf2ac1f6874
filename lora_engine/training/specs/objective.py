"""What training lowers: which noise at which timesteps, and how an error counts. Torch-free; `objective` computes it.

In a pipeline file: `objective: {weighting: min_snr, loss: {name: huber, delta: 0.2}}`; each part by its name alone, or
by its name and options.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Plain(_Part):
    """Every timestep counts as it is drawn."""

    name: Literal["none"] = "none"


class MinSnr(_Part):
    """Min-SNR (Hang et al. 2023): nearly clean pictures count less. Bases that predict noise or v.

    Attributes:
        gamma: Ratio of signal to noise from which on they do; above 0, usually 5.
    """

    name: Literal["min_snr"] = "min_snr"
    gamma: _Finite = Field(default=5.0, gt=0.0)


class SoftMinSnr(_Part):
    """Soft min-SNR (Crowson et al. 2024): the same without the corner. Bases that predict noise or v.

    Attributes:
        gamma: Ratio of signal to noise around which they begin to; above 0, in the paper 4.
    """

    name: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: _Finite = Field(default=4.0, gt=0.0)


class Debiased(_Part):
    """Debiased estimation (Yu et al. 2023): very noisy pictures count more. Bases that predict noise or v."""

    name: Literal["debiased"] = "debiased"


Weighting = Annotated[Plain | MinSnr | SoftMinSnr | Debiased, Field(discriminator="name"), BeforeValidator(_named)]


class L2(_Part):
    """The square of the error."""

    name: Literal["l2"] = "l2"


class L1(_Part):
    """The size of the error."""

    name: Literal["l1"] = "l1"


class Huber(_Part):
    """The square of small errors, a straight line beyond: outliers pull less. As `l2` for large `delta`.

    Attributes:
        delta: Where the line begins, in the latents' units; above 0.
    """

    name: Literal["huber"] = "huber"
    delta: _Finite = Field(default=0.1, gt=0.0)


class SmoothL1(_Part):
    """The size of large errors, with a round bottom: `huber` / (2 delta). As `l1` for small `delta`.

    Attributes:
        delta: Where the bottom ends, in the latents' units; above 0.
    """

    name: Literal["smooth_l1"] = "smooth_l1"
    delta: _Finite = Field(default=0.1, gt=0.0)


Loss = Annotated[L2 | L1 | Huber | SmoothL1, Field(discriminator="name"), BeforeValidator(_named)]


class Uniform(_Part):
    """All timesteps alike."""

    name: Literal["uniform"] = "uniform"


class LogitNormal(_Part):
    """The middle more often (Esser et al. 2024, eq. 19): sigmoid of a normal number.

    Attributes:
        mean: Of the normal number; above 0 the noisier timesteps come more often.
        std: Its deviation; above 0, the larger the flatter.
    """

    name: Literal["logit_normal"] = "logit_normal"
    mean: _Finite = 0.0
    std: _Finite = Field(default=1.0, gt=0.0)


class Mode(_Part):
    """The middle more often, with every timestep kept likely (Esser et al. 2024, eq. 20).

    Attributes:
        scale: From -1 (the ends more often) over 0 (uniform) to 1.75 (the middle).
    """

    name: Literal["mode"] = "mode"
    scale: _Finite = Field(default=1.29, ge=-1.0, le=1.75)


Distribution = Annotated[Uniform | LogitNormal | Mode, Field(discriminator="name"), BeforeValidator(_named)]


class Timesteps(_Part):
    """Which timesteps are trained, and how often.

    Attributes:
        distribution: Over the range.
        low: Where the range begins: 0 is the picture, 1 is noise.
        high: Where it ends. An adapter for composition takes the upper part, one for detail the lower.
        shift: Of flow matching: how far timesteps move towards noise (Esser et al. 2024, eq. 23); 1 does not move them,
            None is the base's own, which may depend on the picture's size. Not for bases that predict noise or v.
    """

    distribution: Distribution = Uniform()
    low: _Finite = Field(default=0.0, ge=0.0, lt=1.0)
    high: _Finite = Field(default=1.0, gt=0.0, le=1.0)
    shift: _Finite | None = Field(default=None, gt=0.0, le=100.0)

    @model_validator(mode="after")
    def _range_is_one(self) -> Timesteps:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Pyramid(_Part):
    """Multi-resolution noise (Whitaker 2023): coarse noise on top of the fine, so that large areas move together.

    Attributes:
        discount: Strength of each coarser level beside the one before; 0 to 1.
        levels: At most so many coarser levels; it ends at one pixel.
    """

    discount: _Finite = Field(default=0.35, gt=0.0, le=1.0)
    levels: int = Field(default=6, ge=1, le=16)


class Objective(_Part):
    """The objective of the denoising methods; the defaults are the plain mean squared error over all timesteps.

    All of it holds for the person's pictures and for class pictures alike.

    Attributes:
        weighting: How an error counts at its timestep.
        loss: How an error counts by its size.
        timesteps: Which timesteps come how often.
        noise_offset: Deviation of a number added to a whole channel's noise (Guttenberg 2023), which lets pictures
            become very dark or bright; 0 to 1, usually 0.05 to 0.1.
        pyramid: Multi-resolution noise; None is white noise.
        input_perturbation: Deviation of further noise that the input gets and the target does not know of (Ning et al.
            2023); 0 to 1, in the paper 0.1.
    """

    weighting: Weighting = Plain()
    loss: Loss = L2()
    timesteps: Timesteps = Timesteps()
    noise_offset: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    pyramid: Pyramid | None = None
    input_perturbation: _Finite = Field(default=0.0, ge=0.0, le=1.0)
