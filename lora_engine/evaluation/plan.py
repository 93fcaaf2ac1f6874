"""What an evaluation will draw: prompts, seeds and the real pictures to compare with. Torch-free; draws nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.errors import DataError
from lora_engine.evaluation.prompts import without_trigger
from lora_engine.evaluation.spec import EvaluateSettings


@dataclass(frozen=True)
class Request:
    """One prompt to draw with every one of its seeds.

    Attributes:
        prompt: As the model gets it.
        reading: The prompt without the trigger: what CLIP, which never saw the trigger, is asked about.
        seeds: One a picture; derived from prompt and settings, so independent of the other prompts.
        picture: The real picture of the same caption.
    """

    prompt: str
    reading: str
    seeds: tuple[int, ...]
    picture: ImageEntry | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that an evaluation draws and compares.

    Attributes:
        folder: The dataset that the real pictures are in.
        measured_on: `training` where no picture was held out: the numbers are then flattering.
        paired: Captions of real pictures.
        asked: The prompts.
        unasked: The prompts without the trigger.
        size: (height, width) in pixels.
        trigger: See `Manifest`.
        class_word: See `Manifest`.
    """

    folder: Path
    measured_on: Literal["heldout", "training"]
    paired: tuple[Request, ...]
    asked: tuple[Request, ...]
    unasked: tuple[Request, ...]
    size: tuple[int, int]
    trigger: str | None
    class_word: str | None

    def all_requests(self) -> tuple[Request, ...]:
        """Paired, asked and unasked; some of them may ask for the same pictures."""
        return self.paired + self.asked + self.unasked


def make_plan(
    settings: EvaluateSettings,
    dataset: Path,
    *,
    heldout: Path | None,
    prompts: Sequence[str],
    trained_on: Sequence[str] = (),
) -> Plan:
    """Decides what is drawn; the same settings and inputs give the same plan.

    Args:
        settings: See `EvaluateSettings`.
        dataset: What the adapter was trained on, with its held-out split.
        heldout: Another dataset to take the held-out pictures from.
        prompts: What to draw besides the captions of the real pictures; empty takes these captions.
        trained_on: Digests of the pictures that the adapter has seen.

    Raises:
        DataError: Nothing to compare with, pictures of several sizes, or a held-out picture that was trained on.
    """
    manifest = Manifest.load(dataset)
    folder, measured_on, pictures = _choose(manifest, dataset, heldout, settings.max_pictures, frozenset(trained_on))
    trigger, class_word = manifest.trigger, manifest.class_word

    def request(prompt: str, picture: ImageEntry | None = None) -> Request:
        reading = without_trigger(prompt, trigger, class_word)
        seeds = tuple(derive_seed(settings.seed, "picture", k, prompt) for k in range(settings.seeds))
        return Request(prompt, reading, seeds, picture)

    paired = tuple(request(picture.caption, picture) for picture in pictures)
    asked = tuple(request(text) for text in dict.fromkeys(prompts or [picture.caption for picture in pictures]))
    unasked = tuple(request(text) for text in dict.fromkeys(item.reading for item in asked))
    return Plan(folder, measured_on, paired, asked, unasked, _size(pictures), trigger, class_word)


def read_trained_on(adapter: Path) -> tuple[str, ...]:
    """Digests of the pictures that an adapter was trained on, from the `training.json` beside it; empty without one.

    Raises:
        DataError: The file is there and cannot be read.
    """
    path = (adapter if adapter.is_dir() else adapter.parent) / "training.json"
    if not path.exists():
        return ()
    try:
        found = json.loads(path.read_bytes()).get("trained_on", [])
        return tuple(str(digest) for digest in found)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path), remedy="train again") from None


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^31) that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4]) & 0x7FFFFFFF


def _choose(
    manifest: Manifest, dataset: Path, heldout: Path | None, limit: int, trained_on: frozenset[str]
) -> tuple[Path, Literal["heldout", "training"], list[ImageEntry]]:
    folder, source = dataset, manifest
    if heldout is not None:
        folder, source = heldout, Manifest.load(heldout)
    pictures = source.of_split("heldout") or (source.pictures if heldout is not None else ())
    if not pictures:
        if heldout is not None or not manifest.pictures:
            raise DataError("the dataset holds no picture to compare with", where=str(folder))
        return folder, "training", _first(manifest.pictures, limit)
    if seen := [picture.source for picture in pictures if picture.sha256 in trained_on]:
        raise DataError(
            f"{len(seen)} of {len(pictures)} held-out pictures were trained on, first {seen[0]!r}",
            where=str(folder),
            remedy="hold out other pictures, or train again without these",
        )
    return folder, "heldout", _first(pictures, limit)


def _first(pictures: Sequence[ImageEntry], limit: int) -> list[ImageEntry]:
    return sorted(pictures, key=lambda picture: picture.sha256)[:limit]


def _size(pictures: Sequence[ImageEntry]) -> tuple[int, int]:
    sizes = {(picture.height, picture.width) for picture in pictures}
    if len(sizes) > 1:
        raise DataError(
            f"the pictures to compare with have {len(sizes)} sizes, such as {min(sizes)} and {max(sizes)}",
            allowed="one (height, width)",
            remedy="run preprocess first and evaluate on what it wrote",
        )
    return sizes.pop()
