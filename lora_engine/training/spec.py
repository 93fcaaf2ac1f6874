"""User-facing training settings. Must not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lora_engine.catalog.kinds import KINDS, KindSpec, Lora
from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.tags import parse_arguments
from lora_engine.registries import NameOrOptions, spec_union
from lora_engine.settings import AddedLater, NoEffect, PredictionTarget
from lora_engine.training.methods import methods
from lora_engine.training.methods.dreambooth import Dreambooth
from lora_engine.training.specs.captions import Captions
from lora_engine.training.specs.choosing import AUTO, BestCheckpoint, OrAuto, check_choice
from lora_engine.training.specs.continuing import Stage
from lora_engine.training.specs.lengths import Interval, Steps, Warmup, to_steps
from lora_engine.training.specs.methods import MethodSpec, Prior, TokenSettings
from lora_engine.training.specs.objective import Objective
from lora_engine.training.specs.rates import Rates
from lora_engine.training.specs.running import Precision, Running
from lora_engine.training.specs.samples import Samples
from lora_engine.training.specs.schedules import AnySchedule, Constant, Cosine

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


def _check_recommended(text: str | None) -> str | None:
    if text is not None:
        try:
            parse_arguments("NAME", text)
        except SettingsError as error:
            raise ValueError(str(error)) from None
    return text


class TrainSettings(BaseModel):
    """Settings of a training run.

    Attributes:
        method: Method by name, or by name and options (`{name: pivotal, inversion: 0.3}`); see `training.methods`.
        kind: Adapter kind by name, or by name and options (`{name: lokr, factor: 8}`).
        rank: Rank of every adapted layer. `auto` trains prefixes of 32 ranks, and keeps the smallest of 1 to 32 whose
            loss is within one standard error of the best.
        alpha: The factors act with alpha / rank; None is the rank.
        targets: A preset (`attention`, `attention+ff`, `linear`, `all`, `norms`, `text`), a pattern, or a list of both.
            `auto` is `all` without the blocks that hardly change the loss.
        overrides: Preset or pattern to settings of the targets that it matches; the last match wins.
        dropout: Share of each layer's input that is hidden from the adapter during training.
        rank_dropout: Share of the ranks of each layer that a batch drops; for kinds lora, rslora and lora-fa.
        module_dropout: Share of the layers that a batch computes without the adapter; at least one has it.
        norm_limit: Largest Frobenius norm of the change of a layer's weight: after each step, `up` and `down` of a
            larger one are scaled down (sd-scripts' `scale_weight_norms`). For the kinds of `rank_dropout`. None
            disables it.
        steps: Optimizer steps, or epochs such as `10 epochs`. An epoch shows every image once, repeats included.
            `auto` stops by `best_checkpoint`, at the latest after 200 epochs.
        batch: Images per forward pass; joint prior preservation adds as many class images.
        learning_rate: Highest learning rate of the schedule. `auto` tries five rates for a quarter of the steps, and
            takes the one below the best.
        schedule: Schedule after the warmup by name, or by name and options (`{name: polynomial, power: 3}`).
        warmup: Steps of linear warmup, epochs, or a share of each phase such as `10%`.
        weight_decay: The optimizer's weight decay.
        clip: Largest gradient norm; 0 disables clipping.
        accumulate: Gradient accumulation: batches per optimizer step.
        seed: Seed of factors, data order, noise and class images.
        caption_dropout: Share of the captions that are emptied, which keeps guidance working.
        checkpoint_every: Steps between checkpoints, or epochs.
        validate_every: Steps between validations on the held-out images, or epochs; 0 disables validation.
        prior: Class images; None takes the defaults of `Prior` in methods that use class images by default
            (`dreambooth`), and disables them in others.
        precision: Precision of the frozen base; the adapter is always trained in fp32. `auto` is bf16 on a GPU that
            computes in it, else fp32; the adapter's card has the precision that was used.
        objective: Noise, timesteps and loss weighting.
        captions: Caption and image augmentation.
        rates: Optimizer, learning rates of parts, and EMA.
        running: Devices, memory and speed.
        samples: Sample images drawn during training into the artifact's folder `samples`; None draws none.
        then: Stages after `steps`, each with more steps at another rate or with another schedule.
        save_every: Steps, or epochs, between adapters that are written into the artifact's folder `saved`; 0 writes
            none.
        clip_skip: Layer of the CLIP text encoders that the network reads, counted from the last, which is 1; None is
            the base's own: 1 for Stable Diffusion 1 and 2, 2 for SDXL. `evaluate` and `generate` use the same layer.
        prediction: What the network predicts, `epsilon` or `v_prediction`; None is what the base's scheduler says.
        zero_terminal_snr: Rescales the noise schedule so that the last timestep has no signal (Lin et al. 2023); for
            bases that predict v.
        optimizer_state: True starts with the state of the optimizer that trained `init`.
        best_checkpoint: Keeps the best of several steps, and stops early; None keeps the last step. With
            `steps: auto` it has its defaults.
        recommended: Weights that prompts give the adapter if their tag has a name alone: what a tag has after the name,
            such as `0.8` or `0@0,1@1:curve=cosine`. The card has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Dreambooth()
    kind: Kind = Lora()
    rank: Annotated[int, Field(ge=1, le=4096), OrAuto()] = 8
    alpha: _Finite | None = Field(default=None, gt=0.0)
    targets: str | list[str] = "attention"
    overrides: dict[str, Override] = {}
    dropout: _Finite = Field(default=0.0, ge=0.0, lt=1.0)
    steps: Annotated[Steps, OrAuto()]
    batch: int = Field(default=4, ge=1, le=4096)
    learning_rate: Annotated[_Finite, Field(gt=0.0), OrAuto()] = 1e-3
    schedule: AnySchedule = Cosine()
    warmup: Warmup = 0
    weight_decay: _Finite = Field(default=0.0, ge=0.0)
    clip: _Finite = Field(default=1.0, ge=0.0)
    accumulate: int = Field(default=1, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    caption_dropout: _Finite = Field(default=0.0, ge=0.0, le=1.0)
    checkpoint_every: Annotated[Steps, NoEffect(is_visible=False)] = 100
    validate_every: Annotated[Interval, NoEffect()] = 0
    prior: Prior | None = None
    precision: Precision = "fp32"
    objective: Objective = Objective()
    captions: Captions = Captions()
    rates: Rates = Rates()
    running: Running = Running()
    samples: Annotated[Samples | None, NoEffect()] = None
    rank_dropout: Annotated[_Finite, AddedLater()] = Field(default=0.0, ge=0.0, lt=1.0)
    module_dropout: Annotated[_Finite, AddedLater()] = Field(default=0.0, ge=0.0, lt=1.0)
    norm_limit: Annotated[_Finite | None, AddedLater()] = Field(default=None, gt=0.0, le=1e6)
    then: Annotated[tuple[Stage, ...], AddedLater(), Field(max_length=100)] = ()
    save_every: Annotated[Interval, AddedLater(), NoEffect()] = 0
    optimizer_state: Annotated[bool, AddedLater()] = False
    clip_skip: Annotated[int | None, AddedLater()] = Field(default=None, ge=1, le=100)
    prediction: Annotated[PredictionTarget | None, AddedLater()] = None
    zero_terminal_snr: Annotated[bool, AddedLater()] = False
    best_checkpoint: Annotated[BestCheckpoint | None, AddedLater()] = None
    recommended: Annotated[str | None, AddedLater(), AfterValidator(_check_recommended)] = Field(
        default=None, min_length=1, max_length=2_000
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yields the settings that were set; the others have their defaults."""
        return ((name, value) for name, value in super().__repr_args__() if name in self.model_fields_set)

    @property
    def class_images(self) -> Prior | None:
        """Prior preservation with class images; None if disabled."""
        return self.prior or (Prior() if self.method.uses_class_images else None)

    @model_validator(mode="after")
    def _choice_sets_the_schedule(self) -> TrainSettings:
        choice = self.best_checkpoint or (BestCheckpoint() if self.is_auto("steps") else None)
        if choice is not None and choice.anneal and "schedule" not in self.model_fields_set:
            # The default falls over all steps, whose number is not known here. Frozen models have no other way.
            object.__setattr__(self, "schedule", Constant())
        return self

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
        usual = 1.0 if self.rates.optimiser.finds_rate else 1e-3
        rate = usual if self.is_auto("learning_rate") else self.learning_rate
        self.rates.check(self.schedule, rate)
        for stage in self.then:
            self.rates.check(stage.schedule, stage.learning_rate or rate)
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
    def _all_processes_run_a_split_network(self) -> TrainSettings:
        if self.running.shard and self.automatic:
            raise ValueError(f"{self.automatic[0]} auto needs the whole network in every process; set it, or leave "
                             "shard out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _choice_fits(self) -> TrainSettings:
        check_choice(self)
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainSettings:
        self._check_warmups()
        return self

    def _check_warmups(self) -> None:
        if isinstance(self.steps, int):
            self._check_warmup("warmup", self.warmup, self.method.phase_steps(self.steps))
        for number, stage in enumerate(self.then):
            if isinstance(stage.steps, int):
                self._check_warmup(f"then.{number}.warmup", stage.warmup, {f"stage {number + 1} of then": stage.steps})

    def _check_warmup(self, name: str, warmup: int | str, phases: Mapping[str, int]) -> None:
        for phase, steps in phases.items():
            if isinstance(warmup, int) and warmup >= steps and warmup:
                where = "" if len(phases) == 1 else f" of phase {phase!r}, which would never reach its rate"
                raise ValueError(
                    f"{name} {warmup} must be less than steps {steps}{where}; set a share such as '10%', which "
                    "scales with the steps"
                )

    def is_auto(self, setting: str) -> bool:
        """Returns True if the training chooses the value of a setting."""
        return bool(getattr(self, setting) == AUTO)

    @property
    def automatic(self) -> tuple[str, ...]:
        """Names of the settings that the training chooses."""
        return tuple(name for name in ("targets", "steps", "learning_rate", "rank") if self.is_auto(name))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases and stages; all lengths must be in steps."""
        return self.steps + sum(stage.steps for stage in self.then)

    def in_steps(self, epoch: int) -> TrainSettings:
        """Returns the settings with all lengths in steps.

        Args:
            epoch: Steps of an epoch.

        Raises:
            ValueError: A warmup does not fit the steps.
        """
        changes: dict[str, Any] = {name: to_steps(getattr(self, name), epoch) for name in _LENGTHS}
        changes["then"] = tuple(
            stage.model_copy(update={name: to_steps(getattr(stage, name), epoch) for name in ("steps", "warmup")})
            for stage in self.then
        )
        if self.best_checkpoint is not None and self.best_checkpoint.every is not None:
            every = to_steps(self.best_checkpoint.every, epoch)
            changes["best_checkpoint"] = self.best_checkpoint.model_copy(update={"every": every})
        if self.samples is not None:
            every = to_steps(self.samples.every, epoch)
            changes["samples"] = self.samples.model_copy(update={"every": every})
        resolved = self.model_copy(update=changes)
        resolved._check_warmups()
        return resolved


_LENGTHS = ("steps", "warmup", "checkpoint_every", "validate_every", "save_every")
__all__ = ["Override", "Prior", "TrainSettings"]
