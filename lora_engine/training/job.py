"""Runs one training job, from settings to an adapter in memory: loads, prepares, attaches, fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lora_engine.adapters import Adapter, attach
from lora_engine.adapters.regularization import cut_ranks
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.defaults import training_defaults
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats import Bundle, Card
from lora_engine.formats.embeddings import Embedding
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress
from lora_engine.settings import without_later
from lora_engine.training.automatic import choose_rank, prefixes_up_to, scores_prefixes, with_first_values
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.choice_images import choice_images
from lora_engine.training.choosing import Chooser, make_chooser
from lora_engine.training.continuing import AUTOMATIC, EPOCH, ORIGIN, SCORE
from lora_engine.training.device import compile_network, prepare_network
from lora_engine.training.distributed import ProcessGroup, ReadOnlyCheckpoints
from lora_engine.training.examples import Encoder, Example
from lora_engine.training.fit_options import History, rates_of
from lora_engine.training.images import TrainingImages, class_images, read_images
from lora_engine.training.init import init_adapter, init_embeddings
from lora_engine.training.initial import read_initial
from lora_engine.training.loop import fit
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.objective import check_objective
from lora_engine.training.optimizers import require_optimizer
from lora_engine.training.prepared import Attached, Prepared
from lora_engine.training.prior import find_clip
from lora_engine.training.record import card_of, describe_choices, with_choices, with_recipe
from lora_engine.training.resolve import base_options, count_epoch, fit_options, in_steps
from lora_engine.training.samples import SampleWriter
from lora_engine.training.saved import SavedAdapters
from lora_engine.training.sharding import place_beside_network, shard_network
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.continuing import fixed_settings
from lora_engine.training.states import StateFolder, find_optimizer_state
from lora_engine.training.trials import choose_learning_rate, choose_targets, highest_rank, with_prefixes
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
        choices: What the training chose, with the evidence; see `describe_choices`.
    """

    bundle: Bundle
    history: History
    trained_on: Sequence[str]
    saved: Sequence[tuple[int, float | None]] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingJob:
    """A training run: the arguments of `train` and its process group.

    Args:
        group: The processes of the run, this one included.
        out: Folder of the artifact.
        automatic: Names of the settings that the training chooses.
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
    automatic: tuple[str, ...] = ()

    def run(self, base_name: str) -> TrainingResult:
        """Prepares, chooses the automatic settings, attaches and fits."""
        require_optimizer(self.settings.rates.optimiser.name)
        source = resolve_base(base_name)
        manifest = Manifest.load(self.dataset)
        examples, heldout = read_images(self.settings, self.dataset, manifest)
        settings = in_steps(self.settings, count_epoch(self.settings, examples))
        job = replace(self, settings=settings, automatic=self.settings.automatic)
        if not job.automatic:
            return job._fit(job._prepare(source, manifest, examples, heldout))
        return job._run_automatic(base_name, source, manifest, examples, heldout)

    def _run_automatic(
        self,
        base_name: str,
        source: BaseSource,
        manifest: Manifest,
        examples: tuple[Example, ...],
        heldout: tuple[Example, ...],
    ) -> TrainingResult:
        if self.init is not None and "rank" in self.automatic:
            raise SettingsError(
                "rank auto starts from no adapter", where="init", remedy="set a rank, or leave init out"
            )
        defaults, evidence = training_defaults(base_name), dict[str, Any]()
        job = replace(self, settings=with_first_values(self.settings, defaults.learning_rate))
        prepared = job._prepare(source, manifest, examples, heldout)
        if "targets" in self.automatic:
            targets, evidence["targets"] = choose_targets(prepared, job.settings)
            job, prepared = job._with(prepared, targets=targets)
        if "rank" in self.automatic:
            job, prepared = job._with(prepared, rank=highest_rank(prepared, job.settings))
        if "learning_rate" in self.automatic:
            rate, evidence["learning_rate"] = choose_learning_rate(job, prepared, defaults.learning_rate)
            job, prepared = job._with(prepared, learning_rate=rate)
        return job._fit(prepared, evidence)

    def _with(self, prepared: Prepared, **changes: Any) -> tuple[TrainingJob, Prepared]:
        """Returns the job with other settings, and what it starts from."""
        job = replace(self, settings=self.settings.model_copy(update=changes))
        return job, replace(prepared, adapter=init_adapter(prepared.base, job.settings, prepared.initial))

    def _prepare(
        self, source: BaseSource, manifest: Manifest, examples: tuple[Example, ...], heldout: tuple[Example, ...]
    ) -> Prepared:
        settings = self.settings
        self._check()
        scored = settings.best_checkpoint is not None or bool(self.automatic)
        choice = choice_images(settings, self.dataset, manifest) if scored else None
        dtype, quantise = _PRECISIONS[settings.precision], settings.running.quantise
        options = base_options(settings, self.vae)
        offload, shard = settings.running.offload, settings.running.shard
        has_class_images = self.class_dataset is not None or manifest.of_split("class")
        if shard and settings.class_images is not None and not has_class_images:
            raise SettingsError(
                "running.shard is set, and the class images would be drawn by one process",
                where="class_dataset",
                remedy="give class images as class_dataset, or choose a method without them",
            )
        device = "cpu" if shard else self.group.device
        base = load_base(source, device=device, dtype=dtype, quantise=quantise, options=options, offload=offload)
        if shard:
            place_beside_network(base, torch.device(self.group.device or "cpu"))
        prepare_network(base, settings.running)
        self._check_base(base, (*examples, *heldout, *(choice.examples if choice else ())))
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
                clip=find_clip(self.embedder, source),
            )
            images = TrainingImages(examples, classes, heldout)
            texts = [""] if settings.caption_dropout else []
            unaugmented = (*images.classes, *images.heldout, *(choice.examples if choice else ()))
            encoder.prepare(images.examples, texts, self._report_encoded, list(dict.fromkeys(unaugmented)))
        return Prepared(base, adapter, tokens, encoder, images, manifest, initial, warm, choice)

    @contextmanager
    def attached(self, prepared: Prepared) -> Iterator[Attached]:
        """Attaches adapter and tokens to the base, and yields what is trained; detaches both at the end."""
        settings, base, adapter = self.settings, prepared.base, prepared.adapter
        with ExitStack() as stack:
            attachment = stack.enter_context(attach(base, adapter, trainable=True)) if adapter.modules else None
            tokens = stack.enter_context(attach_embeddings(base, prepared.tokens, trainable=True))
            compile_network(base, settings.running)
            if settings.running.shard:
                shard_network(base, self.group)
            context = prepared.context(settings, attachment, dict(tokens.named_parameters()), self.embedder)
            phases = [self.group.phase(phase) for phase in methods[settings.method.name].phases(context)]
            if attachment is not None and "rank" in self.automatic:
                phases = [with_prefixes(phase, attachment, settings) for phase in phases]
            yield Attached(attachment, tokens, context, phases)

    def _fit(self, prepared: Prepared, evidence: Mapping[str, Any] = MappingProxyType({})) -> TrainingResult:
        settings, base, images = self.settings, prepared.base, prepared.images
        group, chooser = self.group, self._chooser(prepared)
        options, card = fit_options(settings, images, chooser), self._card(prepared)
        with self.attached(prepared) as attached:
            job, phases = self.digest(prepared), attached.phases
            planned = [rates.to_json() for rates in rates_of(phases, options)]
            run = sha256_bytes(canonical_json([job, planned]))

            def current() -> tuple[Adapter, tuple[Embedding, ...]]:
                return attached.export(prepared.adapter)

            samples, saved = self._samples(base, run), self._saved(current, card, run)
            if samples:
                samples.draw(0)  # also on a resume: `fit` has not restored the trained factors yet
            history = fit(
                phases,
                base.modules.values(),
                options,
                checkpoints=self.checkpoints_in(self.state.checkpoints, job, {"run": run, **self._about(prepared)}),
                validate=lambda: _mean(prepared.losses(attached.context, images.heldout)),
                progress=self._step_progress(),
                stop=lambda: group.any(self.stop()),
                average=group.average,
                observe=samples.draw if samples else lambda done: None,
                save_weights=saved.save if saved else lambda done, loss: None,
                continue_from=lambda checkpoint, done: _take_over(checkpoint, done, samples, saved),
                begin=prepared.warm.restore if prepared.warm else lambda optimizer: None,
                score=lambda: self.scores(prepared, attached),
            )
            if samples:
                samples.copy(self.out)
            files = saved.copy(self.out, settings.total_steps) if saved else ()
            (result, embeddings), choices = current(), dict(evidence)
            if attached.attachment is not None and "rank" in self.automatic:
                losses = self.scores(prepared, attached)
                rank, choices["rank"] = choose_rank(dict(zip(prefixes_up_to(settings.rank), losses, strict=True)))
                result, card = cut_ranks(result, rank), with_recipe(card, rank=rank)
        outcome = describe_choices(chooser, history.checks, settings, self.automatic, choices)
        trained_on = sorted({image.sha256 for image in prepared.manifest.of_split("train")})
        bundle = Bundle(result, with_choices(card, outcome), embeddings)
        return TrainingResult(bundle, history, trained_on, files, outcome)

    def scores(self, prepared: Prepared, attached: Attached) -> list[list[float]]:
        """Returns the loss of each unit of the images that score candidates, the same in all processes.

        Returns:
            One row; with `rank: auto` one per prefix of the ranks.
        """
        attachment, rows = attached.attachment, list[list[float]]()
        if attachment is None or "rank" not in self.automatic:
            return [self._unit_losses(prepared, attached.context)]
        for rank in prefixes_up_to(self.settings.rank):
            with attachment.first_ranks(rank):
                rows.append(self._unit_losses(prepared, attached.context))
        return rows

    def _unit_losses(self, prepared: Prepared, context: MethodContext) -> list[float]:
        losses = torch.tensor(prepared.unit_losses(context), dtype=torch.float32, device=self.group.device)
        self.group.average([losses])
        return [float(loss) for loss in losses.tolist()]

    def _chooser(self, prepared: Prepared) -> Chooser | None:
        choice = prepared.choice
        return None if choice is None else make_chooser(self.settings, choice.by, choice.heldout)

    def _card(self, prepared: Prepared) -> Card:
        return card_of(
            self.settings,
            prepared.base,
            prepared.manifest,
            prepared.images.classes,
            has_class_dataset=self.class_dataset is not None,
            initial=prepared.initial,
        )

    def checkpoints_in(self, folder: Path, job: str, about: Mapping[str, Any] | None = None) -> Checkpoints:
        """Returns the checkpoints in a folder; only the main process writes them."""
        kind = Checkpoints if self.group.is_main_process else ReadOnlyCheckpoints
        return kind(folder, job, self.state.others if about is not None else (), about)

    def report_probe(self, number: int, done: int, total: int) -> None:
        """Reports the progress of a short training, which is no step of the run itself."""
        values = {"probe": float(number), "probe_step": float(done), "probe_steps": float(total)}
        if self.group.is_main_process:
            self.progress(0, self.settings.total_steps, values)

    def _about(self, prepared: Prepared) -> dict[str, Any]:
        """Returns what checkpoints say about the run, for plans."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        epoch, chooser = count_epoch(self.settings, prepared.images.examples), self._chooser(prepared)
        return {
            "settings": settings,
            EPOCH: epoch,
            ORIGIN: self.state.origin,
            **({AUTOMATIC: list(self.automatic)} if self.automatic else {}),
            **({SCORE: {"by": chooser.by, "every": chooser.every}} if chooser else {}),
        }

    def _samples(self, base: BaseModel, run: str) -> SampleWriter | None:
        samples, is_split = self.settings.samples, self.settings.running.shard
        if samples is None or not (self.group.is_main_process or is_split):
            return None
        group = self.group if is_split else ProcessGroup()
        return SampleWriter(base, samples, self.state.folder / "samples", run, self.on_samples, group)

    def _saved(
        self, current: Callable[[], tuple[Adapter, tuple[Embedding, ...]]], card: Card, run: str
    ) -> SavedAdapters | None:
        every = self.settings.save_every if self.group.is_main_process else 0
        return SavedAdapters(current, card, self.state.folder / "saved", run, every) if every else None

    def _step_progress(self) -> Progress:
        images = self.settings.batch * self.settings.accumulate
        return with_measurements(self.progress, images) if self.group.is_main_process else no_progress

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

    def digest(self, prepared: Prepared) -> str:
        """Returns a digest of everything that the steps depend on, except their rates."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        images, initial, choice = prepared.images, prepared.initial, prepared.choice
        chooser = self._chooser(prepared)
        job = {
            "format": 3,
            "settings": fixed_settings(settings),
            "base": prepared.base.fingerprint,
            "device": prepared.base.device.type,
            "pictures": [[example.identity() for example in group] for group in (images.examples, images.classes)],
            "init": initial and initial.sha256,
            "origin": self.state.origin,
            **({"choice": [example.identity() for example in choice.examples]} if choice else {}),
            **({"every": chooser.every} if chooser else {}),
            **({"prefixes": prefixes_up_to(self.settings.rank)} if "rank" in self.automatic else {}),
            **({"scored": "best prefix"} if scores_prefixes(self.settings, self.automatic) else {}),
        }
        vae = prepared.base.options.vae
        job |= {"vae": vae.fingerprint()} if vae else {}
        return sha256_bytes(canonical_json(job))


def _take_over(checkpoint: Checkpoint, done: int, samples: SampleWriter | None, saved: SavedAdapters | None) -> None:
    """Copies the samples and saved adapters of the run that the checkpoint is of, up to its step."""
    for writer, name in ((samples, "samples"), (saved, "saved")):
        if writer and checkpoint.folder:
            writer.take_over(checkpoint.folder.parent / name, checkpoint.facts["run"], done)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _named(declared: str) -> str:
    """Returns the names of the methods that declare a property."""
    return " or ".join(name for name, method in methods.items() if getattr(method.spec, declared))
