"""Plans an evaluation: prompts, seeds, sizes and the real images to compare with. Torch-free."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lora_engine.data.manifest import Manifest
from lora_engine.evaluation.chosen import Chosen, TrainingRecord
from lora_engine.evaluation.evidence import RealImage, RequestSet
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.prompt_lists import class_prompts, unrelated_prompts
from lora_engine.evaluation.prompts import remove_trigger
from lora_engine.evaluation.real_images import (
    DatasetImage,
    LeftOut,
    find_heldout_images,
    leave_out_images,
    to_real_image,
    with_groups,
)
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.framing import Framing


@dataclass(frozen=True)
class Request:
    """One prompt and the seeds of its images.

    Attributes:
        prompt: The prompt for the model.
        prompt_without_trigger: The prompt for the embedder, which never saw the trigger.
        seeds: One seed per image; derived from prompt and settings, independent of the other prompts.
        size: (height, width) in pixels.
        group: Group of the request; see `Measured`.
        image: Digest of the real image with this caption; empty for other prompts.
        file: Its file; None for other prompts.
        mask: The file of its mask; None without one.
        framing: The part of the original image that it shows; None if that is not known.
    """

    prompt: str
    prompt_without_trigger: str
    seeds: tuple[int, ...]
    size: tuple[int, int]
    group: str
    image: str = ""
    file: Path | None = None
    mask: Path | None = None
    framing: Framing | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """The images that an evaluation generates and compares.

    Attributes:
        measured_on: `training` if no image was held out, which makes the metrics too optimistic.
        reference: Captions of real images.
        with_trigger: The prompts.
        without_trigger: The prompts without the trigger.
        further: Prompts that are drawn for optional metrics alone, by set.
        training: Captions of training images, whose losses are computed; nothing is drawn for them.
        trained_on: The training images.
        left_out: Held-out images that are not compared with.
        chosen: The choice of the checkpoint, if it used images that are compared with; None otherwise.
        trigger: See `Manifest`.
        class_word: See `Manifest`.
    """

    measured_on: Literal["heldout", "training"]
    reference: tuple[Request, ...]
    with_trigger: tuple[Request, ...]
    without_trigger: tuple[Request, ...]
    further: Mapping[RequestSet, tuple[Request, ...]] = field(default_factory=dict)
    training: tuple[Request, ...] = ()
    trained_on: tuple[RealImage, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    chosen: Chosen | None = None
    trigger: str | None = None
    class_word: str | None = None

    def all_requests(self) -> tuple[Request, ...]:
        """Returns the requests of all sets; some of them may have the same images."""
        further = tuple(request for requests in self.further.values() for request in requests)
        return self.reference + self.with_trigger + self.without_trigger + further

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes (height, width) of all images, ascending."""
        return sorted({request.size for request in self.all_requests()})


def make_plan(
    settings: EvaluateSettings,
    dataset: Path,
    *,
    heldout: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    training: TrainingRecord | None = None,
    base: str = "",
) -> EvaluationPlan:
    """Plans the requests; the same settings and inputs give the same plan.

    Args:
        settings: See `EvaluateSettings`.
        dataset: The training dataset of the adapter, with its held-out split.
        heldout: Other datasets with held-out images; empty takes the split of `dataset`.
        prompts: Prompts besides the captions of the real images; empty takes these captions.
        training: What the adapter was trained on and chosen by.
        base: Name of the base; decides the list of unrelated prompts.

    Raises:
        DataError: No image to compare with, or a held-out image that was trained on.
    """
    record = training or TrainingRecord()
    manifest = Manifest.load(dataset)
    trained = [DatasetImage(entry, dataset) for entry in manifest.of_split("train")]
    measured_on, images = find_heldout_images(manifest, dataset, heldout, frozenset(record.trained_on))
    left_out: list[LeftOut] = []
    chosen = record.chosen
    if measured_on == "training":
        trained = images = with_groups(images)
    else:
        grouped = with_groups([*trained, *images])
        trained, images = grouped[: len(trained)], grouped[len(trained) :]
        images, left_out, chosen = leave_out_images(images, trained, chosen)
    plan = _Planner(settings, manifest.trigger, manifest.class_word)
    reference = plan.reference(_first(images, settings))
    with_trigger = plan.with_trigger(prompts, reference)
    return EvaluationPlan(
        measured_on,
        reference,
        with_trigger,
        plan.without_trigger(with_trigger),
        further=plan.further(base, with_trigger[0].size),
        training=plan.reference(_first(trained, settings)) if measured_on == "heldout" else (),
        trained_on=tuple(to_real_image(image) for image in trained),
        left_out=tuple(left_out),
        chosen=chosen,
        trigger=manifest.trigger,
        class_word=manifest.class_word,
    )


def derive_evaluation_seed(*parts: object) -> int:
    """Returns a seed in [0, 2^31) that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4]) & 0x7FFFFFFF


@dataclass(frozen=True)
class _Planner:
    settings: EvaluateSettings
    trigger: str | None
    class_word: str | None

    def request(self, prompt: str, size: tuple[int, int], copy: int = 0) -> Request:
        """Returns the request of a prompt; `copy` counts the images with this caption, which have other seeds."""
        bare = remove_trigger(prompt, self.trigger, self.class_word)
        parts = (prompt, copy) if copy else (prompt,)
        seeds = tuple(
            derive_evaluation_seed(self.settings.seed, "picture", k, *parts) for k in range(self.settings.seeds)
        )
        return Request(prompt, bare, seeds, size, f"prompt {prompt}")

    def reference(self, images: Iterable[DatasetImage]) -> tuple[Request, ...]:
        seen: Counter[str] = Counter()
        requests = []
        for image in images:
            entry = image.entry
            request = self.request(entry.caption, image.size, seen[entry.caption])
            seen[entry.caption] += 1
            mask = image.folder / entry.mask if entry.mask else None
            file = image.folder / entry.file
            requests.append(
                replace(request, group=image.group, image=entry.sha256, file=file, mask=mask, framing=entry.framing)
            )
        return tuple(requests)

    def with_trigger(self, prompts: Sequence[str], reference: Sequence[Request]) -> tuple[Request, ...]:
        if prompts:
            size = _commonest(request.size for request in reference)
            return tuple(self.request(text, size) for text in dict.fromkeys(prompts))
        first: dict[str, Request] = {}
        for request in reference:
            first.setdefault(request.prompt, request)
        return tuple(self.request(text, request.size) for text, request in first.items())

    def without_trigger(self, with_trigger: Sequence[Request]) -> tuple[Request, ...]:
        first: dict[str, Request] = {}
        for request in with_trigger:
            first.setdefault(request.prompt_without_trigger, request)
        return tuple(self.request(text, request.size) for text, request in first.items())

    def further(self, base: str, size: tuple[int, int]) -> dict[RequestSet, tuple[Request, ...]]:
        """Returns the prompts that the measured metrics draw for themselves."""
        lists: dict[RequestSet, tuple[str, ...]] = {
            "of_class": class_prompts(self.class_word),
            "unrelated": unrelated_prompts(base, (self.trigger, self.class_word)),
        }
        drawn = {name for key, metric in METRICS.items() if self.settings.measures(key) for name in metric.draws}
        return {
            name: tuple(self.request(prompt, size) for prompt in prompts)
            for name, prompts in lists.items()
            if name in drawn
        }


def _first(images: Iterable[DatasetImage], settings: EvaluateSettings) -> list[DatasetImage]:
    return sorted(images, key=lambda image: image.entry.sha256)[: settings.max_pictures]


def _commonest(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    counts = Counter(sizes)
    return max(counts, key=lambda size: (counts[size], size))
