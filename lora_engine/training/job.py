"""Runs one training job, from settings to an adapter in memory: loads, prepares, attaches, fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_engine.adapters import Adapter, Attachment, attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import resolve_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats import Bundle
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress
from lora_engine.training.checkpoint import Checkpoints
from lora_engine.training.device import compile_network, prepare_network
from lora_engine.training.distributed import ProcessGroup, ReadOnlyCheckpoints
from lora_engine.training.examples import Encoder, Example, text_encoder
from lora_engine.training.identity import identity_loss
from lora_engine.training.images import TrainingImages, class_images, read_images
from lora_engine.training.init import init_adapter, init_embeddings
from lora_engine.training.loop import FitOptions, History, fit
from lora_engine.training.losses import LossTerm
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.objective import check_objective
from lora_engine.training.optimizers import require_optimizer
from lora_engine.training.record import card_of
from lora_engine.training.samples import SampleWriter
from lora_engine.training.spec import TrainSettings
from lora_engine.training.validation import image_losses
from lora_engine.training.watching import with_measurements

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A mean over pixels makes gradients underflow float16. A power of two is exact.
_FP16_LOSS_SCALE = 4096.0


@dataclass(frozen=True)
class TrainingJob:
    """A training run: the arguments of `train` and its process group.

    Args:
        group: The processes of the run, this one included.
        out: Folder of the artifact.
        others: See `train`.
    """

    settings: TrainSettings
    dataset: Path
    work: Path
    cache: Path
    class_dataset: Path | None
    embedder: Path | None
    progress: Progress
    on_samples: Callable[[int, Sequence[Path]], None]
    stop: Callable[[], bool]
    group: ProcessGroup
    out: Path

    def run(self, base_name: str) -> tuple[Bundle, History]:
        """Prepares, attaches and fits; returns the adapter with its card and learned tokens, and the history."""
        settings = self.settings
        require_optimizer(settings.rates.optimiser.name)
        source = resolve_base(base_name)
        manifest = Manifest.load(self.dataset)
        examples, heldout = read_images(settings, self.dataset, manifest)
        self._check()
        dtype, quantise = _PRECISIONS[settings.precision], settings.running.quantise
        base = load_base(source, device=self.group.device, dtype=dtype, quantise=quantise)
        prepare_network(base, settings.running)
        self._check_base(base, (*examples, *heldout))
        initial = init_adapter(base, settings)
        tokens = init_embeddings(base, settings, manifest, examples)
        encoder = Encoder(base, self.cache, settings.captions, settings.seed)
        with self.group.main_process_first():
            classes = class_images(
                settings,
                base,
                manifest,
                examples,
                dataset=self.class_dataset,
                work=self.work / "class",
                on_drawn=self._report_drawn,
            )
            images = TrainingImages(examples, classes, heldout)
            texts = [""] if settings.caption_dropout else []
            encoder.prepare(images.examples, texts, self._report_encoded, (*images.classes, *images.heldout))
        adapter, embeddings, history = self._fit(base, initial, tokens, encoder, images, manifest)
        return Bundle(adapter, card_of(settings, base, manifest), embeddings), history

    def _fit(
        self,
        base: BaseModel,
        initial: Adapter,
        tokens: tuple[Embedding, ...],
        encoder: Encoder,
        images: TrainingImages,
        manifest: Manifest,
    ) -> tuple[Adapter, tuple[Embedding, ...], History]:
        settings = self.settings
        trains_text = bool(tokens) or any(name.startswith("text_encoder") for name in initial.modules)
        conditioner = text_encoder(base, settings.captions) if trains_text else encoder.conditioning
        group, digest = self.group, self._digest(base, images)
        with ExitStack() as stack:
            attachment = stack.enter_context(attach(base, initial, trainable=True)) if initial.modules else None
            attached_tokens = stack.enter_context(attach_embeddings(base, tokens, trainable=True))
            compile_network(base, settings.running)
            context = MethodContext(
                base=base,
                settings=settings,
                parameters=dict(attachment.named_parameters()) if attachment else {},
                examples=images.examples,
                class_examples=images.classes,
                latents=encoder.latents,
                conditioner=conditioner,
                adapter_dropout=attachment.adapter_dropout if attachment else lambda share, seed: nullcontext(),
                tokens=dict(attached_tokens.named_parameters()),
                adapter_disabled=lambda: _adapter_disabled(attachment),
                teacher=encoder.conditioning,
                trigger=manifest.trigger,
                class_word=manifest.class_word,
                extra_terms=self._extra_terms(base, images),
            )
            samples = self._samples(base, digest)
            if samples:
                samples.draw(0)  # also on a resume: `fit` has not restored the trained factors yet
            method = methods[settings.method.name]
            history = fit(
                [group.phase(phase) for phase in method.phases(context)],
                base.modules.values(),
                _options(settings),
                checkpoints=(Checkpoints if group.is_main_process else ReadOnlyCheckpoints)(
                    self.work / "checkpoints", digest
                ),
                validate=lambda: _mean(
                    image_losses(
                        base,
                        encoder.latents,
                        conditioner,
                        images.heldout,
                        seed=settings.seed,
                        transform=method.validation(base, settings),
                    )
                ),
                progress=self._step_progress(),
                stop=lambda: group.any(self.stop()),
                average=group.average,
                observe=samples.draw if samples else lambda done: None,
            )
            if samples:
                samples.copy(self.out)
            adapter = attachment.adapter().to(device="cpu").to_export() if attachment else initial
            return adapter, attached_tokens.embeddings(), history

    def _samples(self, base: BaseModel, digest: str) -> SampleWriter | None:
        samples = self.settings.samples if self.group.is_main_process else None
        return SampleWriter(base, samples, self.work / "samples", digest, self.on_samples) if samples else None

    def _step_progress(self) -> Progress:
        images = self.settings.batch * self.settings.accumulate
        return with_measurements(self.progress, images) if self.group.is_main_process else no_progress

    def _extra_terms(self, base: BaseModel, images: TrainingImages) -> tuple[LossTerm, ...]:
        identity = self.settings.method.identity
        return () if identity is None else (identity_loss(base, identity, images.examples, self.embedder),)

    def _check_base(self, base: BaseModel, examples: Sequence[Example]) -> None:
        check_objective(self.settings.objective, base.noise)
        for size in {example.size for example in examples}:
            base.latent_shape(size)
        name = self.settings.method.name
        if base.inpaints and not self.settings.method.hides_parts:
            raise SettingsError(
                f"the base {base.name!r} is an inpainting model, but method {name!r} has no masks",
                allowed=f"method {_named('hides_parts')}, or a base without a mask input",
            )
        if self.class_dataset is not None and self.settings.class_images is None:
            raise SettingsError(
                f"class_dataset is set, but method {name!r} uses no class images",
                remedy=f"leave it out, set prior, or choose method {_named('uses_class_images')}",
            )

    def _report_drawn(self, number: int) -> None:
        self._check()
        self.progress(0, self.settings.steps, {"class_images": float(number)})

    def _report_encoded(self, done: int, total: int) -> None:
        self._check()
        if self.group.is_main_process:
            self.progress(0, self.settings.steps, {"encoded": float(done), "to_encode": float(total)})

    def _check(self) -> None:
        if self.stop():
            raise InterruptedRun("stopped during preparation; finished parts are kept")

    def _digest(self, base: BaseModel, images: TrainingImages) -> str:
        job = {
            "format": 2,
            "settings": self.settings.model_dump(mode="json"),
            "base": base.fingerprint,
            "device": base.device.type,
            "pictures": [[example.identity() for example in group] for group in images.groups],
        }
        return sha256_bytes(canonical_json(job))


def _options(settings: TrainSettings) -> FitOptions:
    return FitOptions(
        schedule=settings.schedule.name,
        schedule_options=settings.schedule.options(),
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        accumulate=settings.accumulate,
        checkpoint_every=settings.checkpoint_every,
        validate_every=settings.validate_every,
        observe_every=settings.samples.every if settings.samples else 0,
        optimizer=settings.rates.optimiser.name,
        optimizer_options=settings.rates.optimiser.options(),
        ema=settings.rates.ema,
        loss_scale=_FP16_LOSS_SCALE if settings.precision == "fp16" else 1.0,
    )


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


def _named(declared: str) -> str:
    """Returns the names of the methods that declare a property."""
    return " or ".join(name for name, method in methods.items() if getattr(method.spec, declared))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
