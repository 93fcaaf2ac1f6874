"""Decides which jobs are drawn in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_engine.inference.draw import DrawSettings
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.serving.engine import ImageJob


def batches_of(
    jobs: Sequence[ImageJob], shares_batch: Callable[[ImageJob, ImageJob], bool], max_images: int
) -> list[list[ImageJob]]:
    """Divides jobs, in their order, into batches of jobs that all share one, up to a number of images."""
    batches: list[list[ImageJob]] = []
    for job in jobs:
        last = batches[-1] if batches else []
        images = sum(len(other.settings.seeds) for other in (*last, job))
        if last and images <= max_images and all(shares_batch(other, job) for other in last):
            last.append(job)
        else:
            batches.append([job])
    return batches


def has_one_pass(first: ImageJob, other: ImageJob, max_images: int) -> bool:
    """Returns True if two jobs have one size, sampler and number of steps, and set nothing that needs more passes."""
    images = len(first.settings.seeds) + len(other.settings.seeds)
    return images <= max_images and is_simple(first) and is_simple(other) and _shape_of(first) == _shape_of(other)


def is_simple(job: ImageJob) -> bool:
    """Returns True if a job sets nothing that the functions of this file do not know."""
    own = job.settings
    plain = DrawSettings(
        own.seeds,
        steps=own.steps,
        guidance=own.guidance,
        size=own.size,
        sampler=own.sampler,
        image=own.image,
        mask=own.mask,
        strength=own.strength,
        clip_skip=own.clip_skip,
    )
    tags = [
        AdapterTag(tag.name, tag.denoiser, tag.text_encoder, tag.blocks, tag.start, tag.stop)
        for tag in job.prompt.adapters
    ]
    return own == plain and tags == list(job.prompt.adapters)


def _shape_of(job: ImageJob) -> tuple[object, ...]:
    settings = job.settings
    size_of_image = settings.image if settings.size is None else None
    return settings.size, size_of_image, settings.steps, settings.sampler, settings.clip_skip


def have_same_adapters(first: ImageJob, other: ImageJob) -> bool:
    """Returns True if two jobs have the same adapters with the same weights, which do not change over the steps."""
    tags = [[replace(tag, name="") for tag in job.prompt.adapters] for job in (first, other)]
    files = [[file for file, _ in job.files] for job in (first, other)]
    return tags[0] == tags[1] and files[0] == files[1] and all(tag.is_constant for tag in tags[0])
