"""User-facing training settings. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.catalog.kinds import KINDS, KindSpec, Lora
from lora_engine.registries import NameOrOptions, spec_union
from lora_engine.training.methods import methods
from lora_engine.training.methods.dreambooth import Dreambooth
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.methods import MethodSpec, Prior, TokenSettings
from lora_engine.training.specs.objective import Objective
from lora_engine.training.specs.rates import Rates
from lora_engine.training.specs.running import Precision, Running
from lora_engine.training.specs.samples import Samples
from lora_engine.training.specs.schedules import AnySchedule, Cosine

_Finite = Annotated[float, Field(allow_inf_nan=False)]


if TYPE_CHECKING:
    Kind = KindSpec
    Method = MethodSpec
else:
    Kind = Annotated[spec_union(KINDS, "name"), NameOrOptions()]
    Method = Annotated[spec_union(methods, "name"), NameOrOptions()]


class Override(BaseModel):
    """Settings of some of the layers; omitted ones are inherited.

    Attributes:
        kind: Adapter kind; None inherits it.
        rank: Rank; None inherits it.
        alpha: Alpha; None inherits it, or is the kind's default if rank is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | None = None
    rank: int | None = Field(default=None, ge=1, le=4096)
    alpha: _Finite | None = Field(default=None, gt=0.0)


class TrainSettings(BaseModel):
    """Settings of a training run.

    Attributes:
        method: Method by name, or by name and options (`{name: pivotal, inversion: 0.3}`); see `training.methods`.
        kind: Adapter kind by name, or by name and options (`{name: lokr, factor: 8}`).
        rank: Rank of every adapted layer.
        alpha: The factors act with alpha / rank; None is the rank.
        targets: A preset (`attention`, `attention+ff`, `linear`, `all`, `norms`, `text`), a pattern, or a list of both.
        overrides: Preset or pattern to settings of the targets that it matches; the last match wins.
        dropout: Share of each layer's input that is hidden from the adapter during training.
        steps: Optimizer steps.
        batch: Images per forward pass; joint prior preservation adds as many class images.
        learning_rate: Highest learning rate of the schedule.
        schedule: Schedule after the warmup by name, or by name and options (`{name: polynomial, power: 3}`).
        warmup: Steps of linear warmup.
        weight_decay: The optimizer's weight decay.
        clip: Largest gradient norm; 0 disables clipping.
        accumulate: Gradient accumulation: batches per optimizer step.
        seed: Seed of factors, data order, noise and class images.
        caption_dropout: Share of the captions that are emptied, which keeps guidance working.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations on the held-out images; 0 disables validation.
        prior: Class images; None takes the defaults of `Prior` in methods that use class images by default
            (`dreambooth`), and disables them in others.
        precision: Precision of the frozen base; the adapter is always trained in fp32. `auto` is bf16 on a GPU that
            computes in it, else fp32; the adapter's card has the precision that was used.
        objective: Noise, timesteps and loss weighting.
        captions: Caption and image augmentation.
        rates: Optimizer, learning rates of parts, and EMA.
        running: Devices, memory and speed.
        samples: Sample images drawn during training into the artifact's folder `samples`; None draws none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Dreambooth()
    kind: Kind = Lora()
    rank: int = Field(default=8, ge=1, le=4096)
    alpha: _Finite | None = Field(default=None, gt=0.0)
    targets: str | list[str] = "attention"
    overrides: dict[str, Override] = {}
    dropout: _Finite = Field(default=0.0, ge=0.0, lt=1.0)
    steps: int = Field(ge=1, le=10_000_000)
    batch: int = Field(default=4, ge=1, le=4096)
    learning_rate: _Finite = Field(default=1e-3, gt=0.0)
    schedule: AnySchedule = Cosine()
    warmup: int = Field(default=0, ge=0, le=10_000_000)
    weight_decay: _Finite = Field(default=0.0, ge=0.0)
    clip: _Finite = Field(default=1.0, ge=0.0)
    accumulate: int = Field(default=1, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    caption_dropout: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    checkpoint_every: int = Field(default=100, ge=1, le=10_000_000)
    validate_every: int = Field(default=0, ge=0, le=10_000_000)
    prior: Prior | None = None
    precision: Precision = "fp32"
    objective: Objective = Objective()
    captions: Captions = Captions()
    rates: Rates = Rates()
    running: Running = Running()
    samples: Samples | None = None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yields the settings that were set; the others have their defaults."""
        return ((name, value) for name, value in super().__repr_args__() if name in self.model_fields_set)

    @property
    def class_images(self) -> Prior | None:
        """Prior preservation with class images; None if disabled."""
        return self.prior or (Prior() if self.method.uses_class_images else None)

    @model_validator(mode="after")
    def _prior_fits_the_method(self) -> TrainSettings:
        if self.prior is not None and not self.method.takes_prior:
            raise ValueError(f"prior belongs to methods with class images, not to {self.method.name!r}; leave it out")
        if self.class_images is not None and self.method.preservation is not None:
            raise ValueError(
                "preservation and class images both preserve the class; choose one "
                "(method finetune has no class images)"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> TrainSettings:
        self.rates.check(self.schedule, self.learning_rate)
        optimizer = self.rates.optimiser
        if optimizer.finds_rate and isinstance(self.method, TokenSettings):
            raise ValueError(
                f"optimizer {optimizer.name!r} estimates one rate for all parameters, but method {self.method.name!r} "
                "has a separate rate for the learned token; choose another optimizer"
            )
        return self

    @model_validator(mode="after")
    def _processes_share_a_batch(self) -> TrainSettings:
        if self.batch % self.running.processes:
            raise ValueError(f"batch {self.batch} is not a multiple of running.processes {self.running.processes}")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainSettings:
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup {self.warmup} must be less than steps {self.steps}")
        return self


__all__ = ["Override", "Prior", "TrainSettings"]
