"""Defines a method's registry entry, and the context that its phases are made from. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.registries import Registry
from lora_engine.training.specs.methods import MethodSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_engine.bases.base import BaseModel
    from lora_engine.training.batches import Batch
    from lora_engine.training.examples import Conditioner, Example
    from lora_engine.training.losses import LossTerm
    from lora_engine.training.phases import Phase
    from lora_engine.training.spec import TrainSettings

BatchTransform = Callable[["Batch", int], "Batch"]
"""A transform of a batch: (batch, batch number) -> batch; a pure function."""


@dataclass(frozen=True)
class MethodContext:
    """Everything from which a method makes its phases.

    Attributes:
        base: Base with the adapter attached.
        settings: The user's settings.
        parameters: The adapter's factors by name; empty for a method without an adapter.
        examples: Training images.
        class_examples: Class images; empty unless the method uses prior preservation.
        latents: Returns the latents of an example, on the CPU.
        conditioner: Encodes captions.
        adapter_dropout: `Attachment.adapter_dropout`.
        limit_norms: `Attachment.limit_norms`.
        tokens: Learned vectors by name; empty unless the method learns a token.
        adapter_disabled: Returns a context in which the base predicts without the adapter.
        teacher: Encodes captions by the base alone; None is `conditioner`.
        trigger: Token of the subject in the captions.
        class_word: Class of the subject.
        extra_terms: Loss terms that the settings add to the method's own.
    """

    base: BaseModel
    settings: TrainSettings
    parameters: Mapping[str, nn.Parameter]
    examples: tuple[Example, ...]
    class_examples: tuple[Example, ...]
    latents: Callable[[Example], Tensor]
    conditioner: Conditioner
    adapter_dropout: Callable[..., AbstractContextManager[None]]
    tokens: Mapping[str, nn.Parameter] | None = None
    adapter_disabled: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher: Conditioner | None = None
    trigger: str | None = None
    class_word: str | None = None
    extra_terms: tuple[LossTerm, ...] = ()
    limit_norms: Callable[[float], None] | None = None


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        spec: The class of its options; its field `name` is the name.
        title: What it trains on and for, in a few words, for help texts and tables.
        phases: Returns the phases of a run.
        validation: (base, settings) -> transform of the batches of a validation, or None.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    spec: type[MethodSpec]
    title: str
    phases: Callable[[MethodContext], list[Phase]]
    validation: Callable[[BaseModel, TrainSettings], BatchTransform | None] = lambda base, settings: None
    revision: int = 0

    @property
    def name(self) -> str:
        """Name in settings."""
        return str(self.spec.model_fields["name"].default)


methods: Registry[Method] = Registry(
    "training method", entry=Method, source="lora_engine.training.methods", group="loraline.training_methods"
)
