"""A phase of training: its parameters, batches, loss terms and length. The loop runs phases in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from lora_engine.training.batches import Batch
from lora_engine.training.losses import LossTerm


def no_context(number: int) -> AbstractContextManager[None]:
    """Returns an empty context for a batch."""
    del number
    return nullcontext()


def no_hook(factor: float) -> None:
    """Does nothing after a step."""
    del factor


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        parameters: Parameters by name; names are unique within the run and the same in every phase.
        learning_rate: Highest learning rate of the schedule.
        weight_decay: Weight decay; None is that of the run.
    """

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Attributes:
        name: Name for messages and checkpoints.
        steps: Optimizer steps.
        groups: Trained parameters; all others are frozen.
        batch: Batch number, from 0 within the phase, -> batch; a pure function.
        predict: Batch -> (predicted, target).
        terms: Loss terms; their sum is minimized.
        batch_context: Batch number -> context of its forward and backward pass, such as seeded dropout.
        after_step: Hook after a step that may change the parameters; takes the schedule's factor on the rates.
    """

    name: str
    steps: int
    groups: tuple[ParameterGroup, ...]
    batch: Callable[[int], Batch]
    predict: Callable[[Batch], tuple[Tensor, Tensor]]
    terms: tuple[LossTerm, ...]
    batch_context: Callable[[int], AbstractContextManager[None]] = no_context
    after_step: Callable[[float], None] = no_hook

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All trained parameters by name."""
        return {name: value for group in self.groups for name, value in group.parameters.items()}
