"""Holds everything that a training needs before its first step, and what it computes from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_engine.adapters import Adapter, Attachment
from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.textual_inversion import EmbeddingAttachment
from lora_engine.training.choice_images import ChoiceImages
from lora_engine.training.examples import Encoder, Example, text_encoder
from lora_engine.training.identity import identity_loss
from lora_engine.training.images import TrainingImages
from lora_engine.training.initial import InitialAdapter
from lora_engine.training.losses import LossTerm
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.phases import Phase
from lora_engine.training.spec import TrainSettings
from lora_engine.training.states import WarmStart
from lora_engine.training.validation import image_losses


@dataclass(frozen=True)
class Prepared:
    """Everything that a training needs before its first step.

    Attributes:
        base: The base, with nothing attached.
        adapter: The adapter before its first step.
        tokens: The learned token before its first step.
        encoder: Encoded images and texts.
        images: The images of the run.
        manifest: The dataset.
        initial: The adapter that the training starts from.
        warm: The state of the optimizer that it starts with.
        choice: The images that score candidates; None without a choice.
    """

    base: BaseModel
    adapter: Adapter
    tokens: tuple[Embedding, ...]
    encoder: Encoder
    images: TrainingImages
    manifest: Manifest
    initial: InitialAdapter | None
    warm: WarmStart | None
    choice: ChoiceImages | None = None

    def context(
        self,
        settings: TrainSettings,
        attachment: Attachment | None,
        tokens: Mapping[str, torch.nn.Parameter],
        embedder: Path | None,
    ) -> MethodContext:
        """Returns the context that the method makes its phases from."""
        base, encoder, manifest = self.base, self.encoder, self.manifest
        trains_text = bool(tokens) or any(name.startswith("text_encoder") for name in self.adapter.modules)
        return MethodContext(
            base=base,
            settings=settings,
            parameters=dict(attachment.named_parameters()) if attachment else {},
            examples=self.images.examples,
            class_examples=self.images.classes,
            latents=encoder.latents,
            conditioner=text_encoder(base, settings.captions) if trains_text else encoder.conditioning,
            adapter_dropout=attachment.adapter_dropout if attachment else lambda share, seed: nullcontext(),
            limit_norms=attachment.limit_norms if attachment else None,
            tokens=dict(tokens),
            adapter_disabled=lambda: _adapter_disabled(attachment),
            teacher=encoder.conditioning,
            trigger=manifest.trigger,
            class_word=manifest.class_word,
            extra_terms=self._extra_terms(settings, embedder),
        )

    def losses(self, context: MethodContext, examples: tuple[Example, ...]) -> list[float]:
        """Returns the loss of each image at fixed noise and timesteps, with the method's masks."""
        settings = context.settings
        return image_losses(
            self.base,
            self.encoder.latents,
            context.conditioner,
            examples,
            seed=settings.seed,
            transform=methods[settings.method.name].validation(self.base, settings),
            mask=settings.method.mask,
        )

    def unit_losses(self, context: MethodContext) -> list[float]:
        """Returns the loss of each unit of the images that score candidates; empty without a choice."""
        return [] if self.choice is None else self.choice.unit_losses(self.losses(context, self.choice.examples))

    def _extra_terms(self, settings: TrainSettings, embedder: Path | None) -> tuple[LossTerm, ...]:
        identity = settings.method.identity
        return () if identity is None else (identity_loss(self.base, identity, self.images.examples, embedder),)


@dataclass(frozen=True)
class Attached:
    """What is trained, attached to the base.

    Attributes:
        attachment: The adapter; None for a method without one.
        tokens: The learned tokens.
        context: What the method makes its phases from.
        phases: The phases.
    """

    attachment: Attachment | None
    tokens: EmbeddingAttachment
    context: MethodContext
    phases: Sequence[Phase]

    def export(self, empty: Adapter) -> tuple[Adapter, tuple[Embedding, ...]]:
        """Returns the adapter and the learned tokens as they would be written now.

        Args:
            empty: The result of a method without an adapter.
        """
        adapter = self.attachment.adapter().to(device="cpu").to_export() if self.attachment else empty
        return adapter, self.tokens.embeddings()


@contextmanager
def _adapter_disabled(attachment: Attachment | None) -> Iterator[None]:
    """Disables the adapter inside the block, so that the base predicts alone."""
    if attachment is None:
        yield
        return
    before = attachment.multiplier
    attachment.multiplier = 0.0
    try:
        yield
    finally:
        attachment.multiplier = before
