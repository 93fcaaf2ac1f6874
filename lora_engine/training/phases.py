"""A phase: what moves, for how long, on which batches, to lower what. The loop runs phases one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lora_engine.training.batches import Batch
from lora_engine.training.losses import LossTerm


def no_surroundings(number: int) -> AbstractContextManager[None]:
    """Nothing holds while a batch goes through the network."""
    del number
    return nullcontext()


def nothing_after(factor: float) -> None:
    """Nothing is done after a step."""
    del factor


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: By a name that is unique within the run; a parameter keeps its name from phase to phase.
        learning_rate: The highest of the schedule.
        weight_decay: Of the optimiser; None is that of the run.
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: For messages and checkpoints.
        steps: Optimizer steps.
        groups: What moves; everything else stands still.
        batch: Number -> batch: a pure function, counted from 0 within the phase.
        predict: Batch -> (predicted, target).
        terms: What is lowered: their sum.
        around: Number of a batch -> what holds while it goes through the network, such as dropout with its seed.
        after: The schedule's factor on the rates -> what is done to the parameters when a step has been taken.
    """

    name: str
    steps: int
    groups: tuple[ParameterGroup, ...]
    batch: Callable[[int], Batch]
    predict: Callable[[Batch], tuple[Tensor, Tensor]]
    terms: tuple[LossTerm, ...]
    around: Callable[[int], AbstractContextManager[None]] = no_surroundings
    after: Callable[[float], None] = nothing_after

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that moves in this phase, by name."""
        return {name: value for group in self.groups for name, value in group.parameters.items()}
