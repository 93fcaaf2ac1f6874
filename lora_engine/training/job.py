"""Runs one training job, from settings to an adapter in memory: loads, prepares, attaches, fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_engine.adapters import Adapter, Attachment, attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats import Bundle, Card
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress
from lora_engine.settings import without_later
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.continuing import EPOCH, ORIGIN
from lora_engine.training.device import compile_network, prepare_network
from lora_engine.training.distributed import ProcessGroup, ReadOnlyCheckpoints
from lora_engine.training.examples import Encoder, Example, text_encoder
from lora_engine.training.identity import identity_loss
from lora_engine.training.images import TrainingImages, class_images, read_images
from lora_engine.training.init import init_adapter, init_embeddings
from lora_engine.training.initial import InitialAdapter, read_initial
from lora_engine.training.loop import History, fit, rates_of
from lora_engine.training.losses import LossTerm
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.objective import check_objective
from lora_engine.training.optimizers import require_optimizer
from lora_engine.training.record import card_of
from lora_engine.training.resolve import base_options, count_epoch, fit_options, in_steps
from lora_engine.training.samples import SampleWriter
from lora_engine.training.saved import SavedAdapters
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.continuing import fixed_settings
from lora_engine.training.states import StateFolder, WarmStart, find_optimizer_state
from lora_engine.training.validation import image_losses
from lora_engine.training.watching import with_measurements

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        bundle: The adapter with its card and learned tokens.
        history: Losses and rates.
        trained_on: Digests of the user's images that were trained on.
        saved: Step and validation loss of each adapter that was saved on the way.
    """

    bundle: Bundle
    history: History
    trained_on: Sequence[str]
    saved: Sequence[tuple[int, float | None]] = ()


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
    init: Path | None
    vae: str | None
    state: StateFolder

    def run(self, base_name: str) -> TrainingResult:
        """Prepares, attaches and fits."""
        require_optimizer(self.settings.rates.optimiser.name)
        source = resolve_base(base_name)
        manifest = Manifest.load(self.dataset)
        examples, heldout = read_images(self.settings, self.dataset, manifest)
        settings = in_steps(self.settings, count_epoch(self.settings, examples))
        return replace(self, settings=settings)._run(source, manifest, examples, heldout)

    def _run(
        self, source: BaseSource, manifest: Manifest, examples: tuple[Example, ...], heldout: tuple[Example, ...]
    ) -> TrainingResult:
        settings = self.settings
        self._check()
        dtype, quantise = _PRECISIONS[settings.precision], settings.running.quantise
        options = base_options(settings, self.vae)
        offload = settings.running.offload
        base = load_base(
            source, device=self.group.device, dtype=dtype, quantise=quantise, options=options, offload=offload
        )
        prepare_network(base, settings.running)
        self._check_base(base, (*examples, *heldout))
        initial = read_initial(self.init, base) if self.init else None
        warm = find_optimizer_state(settings, initial.sha256 if initial else None, self.state)
        adapter = init_adapter(base, settings, initial)
        tokens = init_embeddings(base, settings, manifest, examples, initial)
        encoder = Encoder(base, self.cache, settings.captions, settings.seed)
        with self.group.main_process_first():
            classes = class_images(
                settings,
                base,
                manifest,
                examples,
                dataset=self.dataset,
                class_dataset=self.class_dataset,
                work=self.work / "class",
                on_drawn=self._report_drawn,
            )
            images = TrainingImages(examples, classes, heldout)
            texts = [""] if settings.caption_dropout else []
            encoder.prepare(images.examples, texts, self._report_encoded, (*images.classes, *images.heldout))
        others = self.class_dataset is not None
        card = card_of(settings, base, manifest, classes, has_class_dataset=others, initial=initial)
        prepared = _Prepared(base, adapter, tokens, encoder, images, manifest, card, initial, warm)
        return self._fit(prepared)

    def _fit(self, prepared: _Prepared) -> TrainingResult:
        settings, base, images = self.settings, prepared.base, prepared.images
        group, method, options = self.group, methods[settings.method.name], fit_options(settings, images)
        with ExitStack() as stack:
            adapter = prepared.adapter
            attachment = stack.enter_context(attach(base, adapter, trainable=True)) if adapter.modules else None
            attached_tokens = stack.enter_context(attach_embeddings(base, prepared.tokens, trainable=True))
            compile_network(base, settings.running)
            context = self._context(prepared, attachment, dict(attached_tokens.named_parameters()))
            phases = [group.phase(phase) for phase in method.phases(context)]
            job = self._digest(base, images, prepared.initial)
            run = sha256_bytes(canonical_json([job, [rates.to_json() for rates in rates_of(phases, options)]]))

            def current() -> tuple[Adapter, tuple[Embedding, ...]]:
                exported = attachment.adapter().to(device="cpu").to_export() if attachment else adapter
                return exported, attached_tokens.embeddings()

            samples, saved = self._samples(base, run), self._saved(current, prepared.card, run)
            if samples:
                samples.draw(0)  # also on a resume: `fit` has not restored the trained factors yet
            history = fit(
                phases,
                base.modules.values(),
                options,
                checkpoints=self._checkpoints(job, {"run": run, **self._about(images)}),
                validate=lambda: self._validate(prepared, context),
                progress=self._step_progress(),
                stop=lambda: group.any(self.stop()),
                average=group.average,
                observe=samples.draw if samples else lambda done: None,
                save_weights=saved.save if saved else lambda done, loss: None,
                continue_from=lambda checkpoint, done: _take_over(checkpoint, done, samples, saved),
                begin=prepared.warm.restore if prepared.warm else lambda optimizer: None,
            )
            if samples:
                samples.copy(self.out)
            files = saved.copy(self.out, settings.total_steps) if saved else ()
            result, embeddings = current()
        trained_on = sorted({image.sha256 for image in prepared.manifest.of_split("train")})
        return TrainingResult(Bundle(result, prepared.card, embeddings), history, trained_on, files)

    def _checkpoints(self, job: str, about: Mapping[str, Any]) -> Checkpoints:
        kind = Checkpoints if self.group.is_main_process else ReadOnlyCheckpoints
        return kind(self.state.checkpoints, job, self.state.others, about)

    def _validate(self, prepared: _Prepared, context: MethodContext) -> float:
        """Returns the mean validation loss of the held-out images."""
        settings, base = self.settings, prepared.base
        losses = image_losses(
            base,
            prepared.encoder.latents,
            context.conditioner,
            prepared.images.heldout,
            seed=settings.seed,
            transform=methods[settings.method.name].validation(base, settings),
        )
        return sum(losses) / len(losses)

    def _context(
        self, prepared: _Prepared, attachment: Attachment | None, tokens: dict[str, torch.nn.Parameter]
    ) -> MethodContext:
        base, encoder, images, manifest = prepared.base, prepared.encoder, prepared.images, prepared.manifest
        trains_text = bool(tokens) or any(name.startswith("text_encoder") for name in prepared.adapter.modules)
        return MethodContext(
            base=base,
            settings=self.settings,
            parameters=dict(attachment.named_parameters()) if attachment else {},
            examples=images.examples,
            class_examples=images.classes,
            latents=encoder.latents,
            conditioner=text_encoder(base, self.settings.captions) if trains_text else encoder.conditioning,
            adapter_dropout=attachment.adapter_dropout if attachment else lambda share, seed: nullcontext(),
            limit_norms=attachment.limit_norms if attachment else None,
            tokens=tokens,
            adapter_disabled=lambda: _adapter_disabled(attachment),
            teacher=encoder.conditioning,
            trigger=manifest.trigger,
            class_word=manifest.class_word,
            extra_terms=self._extra_terms(base, images),
        )

    def _about(self, images: TrainingImages) -> dict[str, Any]:
        """Returns what checkpoints say about the run, for plans."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        return {"settings": settings, EPOCH: count_epoch(self.settings, images.examples), ORIGIN: self.state.origin}

    def _samples(self, base: BaseModel, run: str) -> SampleWriter | None:
        samples = self.settings.samples if self.group.is_main_process else None
        return SampleWriter(base, samples, self.state.folder / "samples", run, self.on_samples) if samples else None

    def _saved(
        self, current: Callable[[], tuple[Adapter, tuple[Embedding, ...]]], card: Card, run: str
    ) -> SavedAdapters | None:
        every = self.settings.save_every if self.group.is_main_process else 0
        return SavedAdapters(current, card, self.state.folder / "saved", run, every) if every else None

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
        self.progress(0, self.settings.total_steps, {"class_images": float(number)})

    def _report_encoded(self, done: int, total: int) -> None:
        self._check()
        if self.group.is_main_process:
            self.progress(0, self.settings.total_steps, {"encoded": float(done), "to_encode": float(total)})

    def _check(self) -> None:
        if self.stop():
            raise InterruptedRun("stopped during preparation; finished parts are kept")

    def _digest(self, base: BaseModel, images: TrainingImages, initial: InitialAdapter | None) -> str:
        """Returns a digest of everything that the steps depend on, except their rates."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        job = {
            "format": 3,
            "settings": fixed_settings(settings),
            "base": base.fingerprint,
            "device": base.device.type,
            "pictures": [[example.identity() for example in group] for group in (images.examples, images.classes)],
            "init": initial and initial.sha256,
            "origin": self.state.origin,
        }
        vae = base.options.vae
        job |= {"vae": vae.fingerprint()} if vae else {}
        return sha256_bytes(canonical_json(job))


@dataclass(frozen=True)
class _Prepared:
    """Everything that a training needs before its first step."""

    base: BaseModel
    adapter: Adapter
    tokens: tuple[Embedding, ...]
    encoder: Encoder
    images: TrainingImages
    manifest: Manifest
    card: Card
    initial: InitialAdapter | None
    warm: WarmStart | None


def _take_over(checkpoint: Checkpoint, done: int, samples: SampleWriter | None, saved: SavedAdapters | None) -> None:
    """Copies the samples and saved adapters of the run that the checkpoint is of, up to its step."""
    for writer, name in ((samples, "samples"), (saved, "saved")):
        if writer and checkpoint.folder:
            writer.take_over(checkpoint.folder.parent / name, checkpoint.facts["run"], done)


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
