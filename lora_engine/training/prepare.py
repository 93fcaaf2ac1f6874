"""Prepares a training: loads the base, makes the adapter to train, and encodes images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import BaseSource
from lora_engine.data.manifest import Manifest
from lora_engine.errors import InterruptedRun, SettingsError
from lora_engine.training.choice_images import choice_images
from lora_engine.training.device import prepare_network
from lora_engine.training.examples import Encoder, Example
from lora_engine.training.images import TrainingImages, class_images
from lora_engine.training.init import init_adapter, init_embeddings
from lora_engine.training.initial import read_initial
from lora_engine.training.job import TrainingJob
from lora_engine.training.methods import methods
from lora_engine.training.objective import check_objective
from lora_engine.training.prepared import Prepared
from lora_engine.training.prior import find_clip
from lora_engine.training.resolve import base_options
from lora_engine.training.sharding import place_beside_network
from lora_engine.training.states import find_optimizer_state

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_training(
    job: TrainingJob,
    source: BaseSource,
    manifest: Manifest,
    examples: tuple[Example, ...],
    heldout: tuple[Example, ...],
) -> Prepared:
    """Loads the base, makes the adapter, and encodes images and texts.

    Args:
        job: The training.
        source: The base.
        manifest: The dataset.
        examples: Its training images.
        heldout: Its held-out images.

    Raises:
        InterruptedRun: A stop was requested; finished parts are kept.
        SettingsError: The settings do not suit the base or the dataset.
    """
    settings = job.settings
    _check_stop(job)
    scored = settings.best_checkpoint is not None or bool(job.automatic)
    choice = choice_images(settings, job.dataset, manifest) if scored else None
    dtype, quantise = _PRECISIONS[settings.precision], settings.running.quantise
    options = base_options(settings, job.vae)
    offload, shard = settings.running.offload, settings.running.shard
    has_class_images = job.class_dataset is not None or manifest.of_split("class")
    if shard and settings.class_images is not None and not has_class_images:
        raise SettingsError(
            "running.shard is set, and the class images would be drawn by one process",
            where="class_dataset",
            remedy="give class images as class_dataset, or choose a method without them",
        )
    device = "cpu" if shard else job.group.device
    base = load_base(source, device=device, dtype=dtype, quantise=quantise, options=options, offload=offload)
    if shard:
        place_beside_network(base, torch.device(job.group.device or "cpu"))
    prepare_network(base, settings.running)
    _check_base(job, base, (*examples, *heldout, *(choice.examples if choice else ())))
    initial = read_initial(job.init, base) if job.init else None
    warm = find_optimizer_state(settings, initial.sha256 if initial else None, job.state)
    adapter = init_adapter(base, settings, initial)
    tokens = init_embeddings(base, settings, manifest, examples, initial)
    encoder = Encoder(base, job.cache, settings.captions, settings.seed)
    with job.group.main_process_first():
        classes = class_images(
            settings,
            base,
            manifest,
            examples,
            dataset=job.dataset,
            class_dataset=job.class_dataset,
            work=job.work / "class",
            on_drawn=partial(_report_drawn, job),
            clip=find_clip(job.embedder, source),
        )
        images = TrainingImages(examples, classes, heldout)
        texts = [""] if settings.caption_dropout else []
        unaugmented = (*images.classes, *images.heldout, *((*choice.examples, *choice.trained) if choice else ()))
        encoder.prepare(images.examples, texts, partial(_report_encoded, job), list(dict.fromkeys(unaugmented)))
    return Prepared(base, adapter, tokens, encoder, images, manifest, initial, warm, choice)


def _check_base(job: TrainingJob, base: BaseModel, examples: Sequence[Example]) -> None:
    check_objective(job.settings.objective, base.noise)
    for size in {example.size for example in examples}:
        base.latent_shape(size)
    name = job.settings.method.name
    if base.inpaints and not job.settings.method.hides_parts:
        raise SettingsError(
            f"the base {base.name!r} is an inpainting model, but method {name!r} has no masks",
            allowed=f"method {_named('hides_parts')}, or a base without a mask input",
        )
    if job.class_dataset is not None and job.settings.class_images is None:
        raise SettingsError(
            f"class_dataset is set, but method {name!r} uses no class images",
            remedy=f"leave it out, set prior, or choose method {_named('uses_class_images')}",
        )


def _report_drawn(job: TrainingJob, number: int) -> None:
    _check_stop(job)
    job.progress(0, job.settings.total_steps, {"class_images": float(number)})


def _report_encoded(job: TrainingJob, done: int, total: int) -> None:
    _check_stop(job)
    if job.group.is_main_process:
        job.progress(0, job.settings.total_steps, {"encoded": float(done), "to_encode": float(total)})


def _check_stop(job: TrainingJob) -> None:
    if job.stop():
        raise InterruptedRun("stopped during preparation; finished parts are kept")


def _named(declared: str) -> str:
    """Returns the names of the methods that declare a property."""
    return " or ".join(name for name, method in methods.items() if getattr(method.spec, declared))
