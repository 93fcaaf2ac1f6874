"""Chooses the real images that an evaluation compares with. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_engine.data.duplicates import group_files
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.errors import DataError
from lora_engine.evaluation.chosen import Chosen
from lora_engine.evaluation.evidence import RealImage

MIN_GROUPS_TO_SPLIT = 8
"""Least number of groups of held-out images of which those that a checkpoint was chosen on are left out."""


@dataclass(frozen=True)
class LeftOut:
    """A held-out image that is not compared with.

    Attributes:
        source: Name in the user's folder.
        sha256: Digest of the original file.
        reason: Why.
    """

    source: str
    sha256: str
    reason: str


@dataclass(frozen=True)
class DatasetImage:
    """An image of a dataset, with its folder and its group of kin."""

    entry: ImageEntry
    folder: Path
    group: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.entry.height, self.entry.width


def find_heldout_images(
    manifest: Manifest, dataset: Path, heldout: Sequence[Path], trained_on: frozenset[str]
) -> tuple[Literal["heldout", "training"], list[DatasetImage]]:
    """Returns the held-out images; without any, the training images.

    Args:
        manifest: The training dataset.
        dataset: Its folder.
        heldout: Folders of other datasets with held-out images; empty takes the split of `manifest`.
        trained_on: Digests of the images that the adapter was trained on.

    Raises:
        DataError: There is no image, or one was trained on.
    """
    images = list(_of_datasets(manifest, dataset, heldout))
    if not images:
        train = manifest.of_split("train")
        if heldout or not train:
            raise DataError(
                "the dataset has no image to compare with", where=", ".join(map(str, heldout)) or str(dataset)
            )
        return "training", [DatasetImage(entry, dataset) for entry in train]
    if seen := [image for image in images if image.entry.sha256 in trained_on]:
        raise DataError(
            f"{len(seen)} of {len(images)} held-out images were trained on, first {seen[0].entry.source!r}",
            where=str(seen[0].folder),
            remedy="hold out other images, or train again without these",
        )
    return "heldout", images


def _of_datasets(manifest: Manifest, dataset: Path, heldout: Sequence[Path]) -> Iterator[DatasetImage]:
    """Yields the held-out images, each digest once; a dataset without a held-out split is held out as a whole."""
    if not heldout:
        yield from (DatasetImage(entry, dataset) for entry in manifest.of_split("heldout"))
        return
    seen: set[str] = set()
    for folder in heldout:
        source = Manifest.load(folder)
        for entry in source.of_split("heldout") or source.of_split("train"):
            if entry.sha256 not in seen:
                seen.add(entry.sha256)
                yield DatasetImage(entry, folder)


def with_groups(images: Sequence[DatasetImage]) -> list[DatasetImage]:
    """Returns the images with their groups of kin; a group is named by its smallest digest."""
    grouped = list(images)
    for members in group_files([image.folder / image.entry.file for image in images]):
        name = min(images[index].entry.sha256 for index in members)
        for index in members:
            grouped[index] = replace(images[index], group=name)
    return grouped


def leave_out_images(
    images: Sequence[DatasetImage], trained: Sequence[DatasetImage], chosen: Chosen | None
) -> tuple[list[DatasetImage], list[LeftOut], Chosen | None]:
    """Leaves out kin of training images, and the images that the checkpoint was chosen on if enough remain."""
    kin = {image.group: image.entry.source for image in reversed(trained)}
    left_out = [
        _left_out(image, f"near-duplicate of the training image {kin[image.group]!r}")
        for image in images
        if image.group in kin
    ]
    remaining = [image for image in images if image.group not in kin]
    if not remaining:
        raise DataError(
            f"all {len(images)} held-out images are near-duplicates of training images, first {left_out[0].source!r} "
            f"({left_out[0].reason})",
            where=str(images[0].folder),
            remedy="hold out images that show something else, or train again without these",
        )
    if chosen is None:
        return remaining, left_out, None
    used = {image.group for image in remaining if image.entry.sha256 in chosen.on}
    if not used:
        return remaining, left_out, None
    untouched = [image for image in remaining if image.group not in used]
    if len({image.group for image in remaining}) < MIN_GROUPS_TO_SPLIT or not untouched:
        return remaining, left_out, chosen
    reason = "the checkpoint was chosen on it"
    left_out += [_left_out(image, reason) for image in remaining if image.group in used]
    return untouched, left_out, None


def _left_out(image: DatasetImage, reason: str) -> LeftOut:
    return LeftOut(image.entry.source, image.entry.sha256, reason)


def to_real_image(image: DatasetImage) -> RealImage:
    """Returns the image as evidence has it."""
    return RealImage(image.entry.sha256, image.entry.source, image.folder / image.entry.file, image.group)
