"""What a person may set about training. Torch-free; the work lives beside this file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.kinds import Kind, Lora
from lora_engine.training.specs.methods import Dreambooth, Method, Prior, TokenSettings
from lora_engine.training.specs.objective import Objective
from lora_engine.training.specs.rates import Rates
from lora_engine.training.specs.running import Running
from lora_engine.training.specs.samples import Samples
from lora_engine.training.specs.schedules import AnySchedule, Cosine

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class Override(BaseModel):
    """Other settings for some of the layers; what is left out is as for all.

    Attributes:
        kind: The adapter kind.
        rank: Of these layers.
        alpha: Of these layers; where rank is set and alpha is not, the kind's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | None = None
    rank: int | None = Field(default=None, ge=1, le=4096)
    alpha: _Finite | None = Field(default=None, gt=0.0)


class TrainSettings(BaseModel):
    """How an adapter is trained.

    Attributes:
        method: What is done, by name or with its options (`{name: pivotal, inversion: 0.3}`); see `specs.methods`.
        kind: The adapter kind, by name or with its options (`{name: lokr, factor: 8}`).
        rank: Of every adapted layer.
        alpha: The factors act with alpha / rank; None is the rank.
        targets: A preset (`attention`, `attention+ff`, `linear`, `all`, `norms`, `text`), a pattern, or a list of both.
        overrides: Preset or pattern to other settings for those of the targets that it means; the last one counts.
        dropout: Share of each layer's input that the adapter does not see while it is trained.
        steps: Optimizer steps.
        batch: Images a forward pass; prior preservation adds as many class pictures.
        learning_rate: The highest of the schedule.
        schedule: How the rate goes on after the warmup, by name or with its options (`{name: polynomial, power: 3}`).
        warmup: Steps in which the rate rises.
        weight_decay: Of the optimiser.
        clip: Largest norm of the gradient; 0 does not clip.
        accumulate: Batches an optimiser step.
        seed: Of the factors, the order, the noise and the class pictures.
        caption_dropout: Share of the captions that are left out, so that guidance keeps working.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations on the held-out pictures; 0 never validates.
        prior: Class pictures; None takes the defaults of `Prior` in `dreambooth`, and is none in other methods.
        precision: Of the frozen base; the adapter is always trained in fp32.
        objective: Which noise at which timesteps, and how an error counts.
        captions: How captions change from batch to batch.
        rates: Learning rates of parts, the optimiser, averages of the weights.
        running: Devices, memory and speed.
        samples: Images drawn while training, into the folder `samples` of the artifact; None draws none.
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
    warmup: int = Field(default=0, ge=0)
    weight_decay: _Finite = Field(default=0.0, ge=0.0)
    clip: _Finite = Field(default=1.0, ge=0.0)
    accumulate: int = Field(default=1, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    caption_dropout: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    checkpoint_every: int = Field(default=100, ge=1)
    validate_every: int = Field(default=0, ge=0)
    prior: Prior | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    objective: Objective = Objective()
    captions: Captions = Captions()
    rates: Rates = Rates()
    running: Running = Running()
    samples: Samples | None = None

    @property
    def class_images(self) -> Prior | None:
        """How class pictures hold the class; None where there are none."""
        return self.prior or (Prior() if self.method.name == "dreambooth" else None)

    @model_validator(mode="after")
    def _prior_fits_the_method(self) -> TrainSettings:
        if self.prior is not None and not self.method.takes_prior:
            raise ValueError(f"prior belongs to method 'dreambooth', not to {self.method.name!r}; leave it out")
        if self.class_images is not None and self.method.preservation is not None:
            raise ValueError(
                "preservation and class pictures hold the same thing in two ways; choose one "
                "(method finetune has no class pictures)"
            )
        return self

    @model_validator(mode="after")
    def _optimiser_fits(self) -> TrainSettings:
        self.rates.check(self.schedule, self.learning_rate)
        optimiser = self.rates.optimiser
        if optimiser.finds_rate and isinstance(self.method, TokenSettings):
            raise ValueError(
                f"optimiser {optimiser.name} finds one rate for all parameters, and method {self.method.name!r} has "
                "a rate of its own for the word; choose another optimiser"
            )
        return self

    @model_validator(mode="after")
    def _processes_share_a_batch(self) -> TrainSettings:
        if self.batch % self.running.processes:
            raise ValueError(
                f"batch {self.batch} cannot be shared among running.processes {self.running.processes}; "
                "make it a multiple"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainSettings:
        if self.warmup >= self.steps and self.warmup:
            raise ValueError(f"warmup {self.warmup} must be less than steps {self.steps}")
        return self


__all__ = ["Override", "Prior", "TrainSettings"]
