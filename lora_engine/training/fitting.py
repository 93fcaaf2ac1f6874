"""Runs one training job, from settings to an adapter in memory: prepares, chooses the automatic settings, fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lora_engine.adapters import Adapter
from lora_engine.adapters.regularization import cut_ranks
from lora_engine.bases.base import BaseModel
from lora_engine.bases.defaults import training_defaults
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats import Bundle, Card
from lora_engine.formats.embeddings import Embedding
from lora_engine.progress import Progress, no_progress
from lora_engine.training.automatic import choose_rank, prefixes_up_to, with_first_values
from lora_engine.training.checkpoint import Checkpoint
from lora_engine.training.distributed import ProcessGroup
from lora_engine.training.examples import Example
from lora_engine.training.fit_options import History, rates_of
from lora_engine.training.images import read_images
from lora_engine.training.init import init_adapter
from lora_engine.training.job import TrainingJob
from lora_engine.training.loop import fit
from lora_engine.training.optimizers import require_optimizer
from lora_engine.training.prepare import prepare_training
from lora_engine.training.prepared import Prepared
from lora_engine.training.rank_prefixes import highest_rank
from lora_engine.training.record import card_of, describe_choices, with_choices, with_recipe
from lora_engine.training.resolve import count_epoch, fit_options, in_steps
from lora_engine.training.samples import SampleWriter
from lora_engine.training.saved import SavedAdapters
from lora_engine.training.trials import choose_learning_rate, choose_targets
from lora_engine.training.watching import with_measurements


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


def run_job(job: TrainingJob, base_name: str) -> TrainingResult:
    """Prepares, chooses the automatic settings, attaches and fits."""
    require_optimizer(job.settings.rates.optimiser.name)
    source = resolve_base(base_name)
    manifest = Manifest.load(job.dataset)
    examples, heldout = read_images(job.settings, job.dataset, manifest)
    settings = in_steps(job.settings, count_epoch(job.settings, examples))
    job = replace(job, settings=settings, automatic=job.settings.automatic)
    if not job.automatic:
        return _fit(job, prepare_training(job, source, manifest, examples, heldout))
    return _run_automatic(job, base_name, source, manifest, examples, heldout)


def _run_automatic(
    job: TrainingJob,
    base_name: str,
    source: BaseSource,
    manifest: Manifest,
    examples: tuple[Example, ...],
    heldout: tuple[Example, ...],
) -> TrainingResult:
    if job.init is not None and "rank" in job.automatic:
        raise SettingsError("rank auto starts from no adapter", where="init", remedy="set a rank, or leave init out")
    defaults, evidence = training_defaults(base_name), dict[str, Any]()
    job = replace(job, settings=with_first_values(job.settings, defaults.learning_rate))
    prepared = prepare_training(job, source, manifest, examples, heldout)
    if "targets" in job.automatic:
        targets, evidence["targets"] = choose_targets(prepared, job.settings)
        job, prepared = _with(job, prepared, targets=targets)
    if "rank" in job.automatic:
        job, prepared = _with(job, prepared, rank=highest_rank(prepared, job.settings))
    if "learning_rate" in job.automatic:
        rate, evidence["learning_rate"] = choose_learning_rate(job, prepared, defaults.learning_rate)
        job, prepared = _with(job, prepared, learning_rate=rate)
    return _fit(job, prepared, evidence)


def _with(job: TrainingJob, prepared: Prepared, **changes: Any) -> tuple[TrainingJob, Prepared]:
    """Returns the job with other settings, and what it starts from."""
    job = replace(job, settings=job.settings.model_copy(update=changes))
    return job, replace(prepared, adapter=init_adapter(prepared.base, job.settings, prepared.initial))


def _fit(job: TrainingJob, prepared: Prepared, evidence: Mapping[str, Any] = MappingProxyType({})) -> TrainingResult:
    settings, base, images = job.settings, prepared.base, prepared.images
    group, chooser = job.group, job.chooser(prepared)
    options, card = fit_options(settings, images, chooser), _card(job, prepared)
    with job.attached(prepared) as attached:
        digest, phases = job.digest(prepared), attached.phases
        planned = [rates.to_json() for rates in rates_of(phases, options)]
        run = sha256_bytes(canonical_json([digest, planned]))

        def current() -> tuple[Adapter, tuple[Embedding, ...]]:
            return attached.export(prepared.adapter)

        samples, saved = _samples(job, base, run), _saved(job, current, card, run)
        if samples:
            samples.draw(0)  # also on a resume: `fit` has not restored the trained factors yet
        history = fit(
            phases,
            base.modules.values(),
            options,
            checkpoints=job.checkpoints_in(job.state.checkpoints, digest, {"run": run, **job.about(prepared)}),
            validate=lambda: _mean(prepared.losses(attached.context, images.heldout)),
            progress=_step_progress(job),
            stop=lambda: group.any(job.stop()),
            average=group.average,
            observe=samples.draw if samples else lambda done: None,
            save_weights=saved.save if saved else lambda done, loss: None,
            continue_from=lambda checkpoint, done: _take_over(checkpoint, done, samples, saved),
            begin=prepared.warm.restore if prepared.warm else lambda optimizer: None,
            score=lambda done: job.check(done, prepared, attached),
        )
        if samples:
            samples.copy(job.out)
        files = saved.copy(job.out, settings.total_steps) if saved else ()
        (result, embeddings), choices = current(), dict(evidence)
        if attached.attachment is not None and "rank" in job.automatic:
            losses = job.scores(prepared, attached)
            rank, choices["rank"] = choose_rank(dict(zip(prefixes_up_to(settings.rank), losses, strict=True)))
            result, card = cut_ranks(result, rank), with_recipe(card, rank=rank)
    outcome = describe_choices(chooser, history.checks, settings, job.automatic, choices)
    trained_on = sorted({image.sha256 for image in prepared.manifest.of_split("train")})
    bundle = Bundle(result, with_choices(card, outcome), embeddings)
    return TrainingResult(bundle, history, trained_on, files, outcome)


def _card(job: TrainingJob, prepared: Prepared) -> Card:
    return card_of(
        job.settings,
        prepared.base,
        prepared.manifest,
        prepared.images.classes,
        has_class_dataset=job.class_dataset is not None,
        initial=prepared.initial,
    )


def _samples(job: TrainingJob, base: BaseModel, run: str) -> SampleWriter | None:
    samples, is_split = job.settings.samples, job.settings.running.shard
    if samples is None or not (job.group.is_main_process or is_split):
        return None
    group = job.group if is_split else ProcessGroup()
    return SampleWriter(base, samples, job.state.folder / "samples", run, job.on_samples, group)


def _saved(
    job: TrainingJob, current: Callable[[], tuple[Adapter, tuple[Embedding, ...]]], card: Card, run: str
) -> SavedAdapters | None:
    every = job.settings.save_every if job.group.is_main_process else 0
    return SavedAdapters(current, card, job.state.folder / "saved", run, every) if every else None


def _step_progress(job: TrainingJob) -> Progress:
    images = job.settings.batch * job.settings.accumulate
    return with_measurements(job.progress, images) if job.group.is_main_process else no_progress


def _take_over(checkpoint: Checkpoint, done: int, samples: SampleWriter | None, saved: SavedAdapters | None) -> None:
    """Copies the samples and saved adapters of the run that the checkpoint is of, up to its step."""
    for writer, name in ((samples, "samples"), (saved, "saved")):
        if writer and checkpoint.folder:
            writer.take_over(checkpoint.folder.parent / name, checkpoint.facts["run"], done)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
