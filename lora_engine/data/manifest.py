"""Defines the manifest of a dataset: its images with captions, and the quarantined files with reasons.

Imports neither torch nor image code: specs, flows and tasks import it. `images` decodes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lora_engine.data.part import DatasetPart
from lora_engine.data.preparation import Preparation
from lora_engine.data.rights import Rights
from lora_engine.documents import read_json_object
from lora_engine.errors import DataError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.framing import Framing

_NAME = "manifest.json"
MAX_SIDE = 100_000_000
MAX_CAPTION = 2_000
MAX_REPEATS = 10_000
MAX_ALTERNATIVES = 100

Split = Literal["train", "heldout", "class"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ImageEntry(BaseModel):
    """One usable image.

    Attributes:
        sha256: Digest of the ORIGINAL file's bytes: the image's identity in all steps.
        file: Path of the PNG inside the artifact.
        width: In pixels, of the file inside the artifact.
        height: In pixels, of the file inside the artifact.
        caption: One line; empty if there is none yet.
        source: Name in the user's folder, made printable; for display only.
        caption_origin: Where ingest found the caption: `.caption`, `.json`, the name of a metadata file, or `folder
            name`; None means a `.txt` file, or that there is none.
        split: `heldout` images are never trained on; `class` images show the class, not the concept.
        consent: Id of the consent for the image; None means none is stated.
        repeats: Number of times that the image occurs per epoch.
        mask: Path of the mask inside the artifact: gray, of the image's size, white for full weight and black for none;
            None gives every pixel full weight.
        rights: Stated rights and evidence of generation; None if there is neither.
        part: Number of its dataset in `parts`; None if the dataset was not combined of others.
        framing: The part of the original image that it shows; None if preprocess did not record it.
        preparation: How the image was made, as far as that is not the same for all images with these settings.
        alternatives: Further captions; a training draws one of all each time that it uses the image. None means none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    # The pattern ensures that no path in a manifest points outside the artifact.
    file: str = Field(pattern=r"^pictures/[0-9a-f]{16}\.png$")
    width: int = Field(gt=0, le=MAX_SIDE)
    height: int = Field(gt=0, le=MAX_SIDE)
    caption: str = Field(default="", max_length=MAX_CAPTION)
    caption_origin: str | None = Field(default=None, max_length=300)
    source: str
    split: Split = "train"
    consent: str | None = None
    repeats: int = Field(default=1, ge=1, le=MAX_REPEATS)
    mask: str | None = Field(default=None, pattern=r"^masks/[0-9a-f]{16}\.png$")
    rights: Rights | None = None
    framing: Framing | None = None
    part: int | None = Field(default=None, ge=0, le=10_000)
    preparation: Preparation | None = None
    alternatives: tuple[Annotated[str, Field(max_length=MAX_CAPTION)], ...] | None = Field(
        default=None, max_length=MAX_ALTERNATIVES
    )

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(serialize(self), "rights", "caption_origin", "framing", "part", "preparation", "alternatives")

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption and its alternatives."""
        return (self.caption, *(self.alternatives or ()))

    @property
    def files(self) -> tuple[str, ...]:
        """The files inside the artifact that belong to the image."""
        return (self.file,) if self.mask is None else (self.file, self.mask)


class Quarantined(BaseModel):
    """An unused file of the folder, with the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reason: str


class Manifest(BaseModel):
    """A dataset: its used, quarantined and skipped images are all possible image files of the folder.

    Masks and captions of used images belong to these and count as neither.

    Attributes:
        pictures: The images, sorted by source name.
        quarantined: Unused files with reasons; every later step keeps them. A file of captions among them does not
            keep its images from being used.
        skipped: Images that a dataset file of another trainer leaves out, with the reasons.
        trigger: The word for the concept in the captions; None means none.
        class_word: The class of the concept ("star", "dog"); None means none.
        layout: What archives, a dataset file or folder names say; None for a plain folder.
        parts: Settings of the datasets that it was combined of; None if it was not.
        format: Version of the file's layout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: tuple[ImageEntry, ...]
    quarantined: tuple[Quarantined, ...] = ()
    skipped: tuple[Quarantined, ...] | None = None
    trigger: str | None = None
    class_word: str | None = None
    layout: str | None = None
    parts: tuple[DatasetPart, ...] | None = None
    format: Literal[1] = 1

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without(serialize(self), "layout", "parts", "skipped")

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Manifest:
        seen: dict[str, str] = {}
        for image in self.pictures:
            if image.file in seen:
                raise ValueError(f"{seen[image.file]!r} and {image.source!r} share the file {image.file}")
            seen[image.file] = image.source
        return self

    @model_validator(mode="after")
    def _parts_exist(self) -> Manifest:
        for image in self.pictures:
            if image.part is not None and image.part >= len(self.parts or ()):
                raise ValueError(f"{image.source!r} is of part {image.part}, but there are {len(self.parts or ())}")
        return self

    def part_of(self, image: ImageEntry) -> DatasetPart | None:
        """Returns the settings of the dataset that an image is from; None if it has none."""
        return None if image.part is None or self.parts is None else self.parts[image.part]

    def of_split(self, split: Split) -> tuple[ImageEntry, ...]:
        """Returns the images of one split, in the manifest's order."""
        return tuple(image for image in self.pictures if image.split == split)

    def describe(self) -> str:
        """Returns what became of the folder's files, in one line: images, origins of captions, masks, quarantine."""
        concept = [image for image in self.pictures if image.split != "class"]
        origins = Counter(image.caption_origin or (".txt" if image.caption else "none") for image in concept)
        parts = [f"{len(concept)} images, captions: {', '.join(f'{n} {origin}' for origin, n in origins.items())}"]
        drawn = [image for image in concept if image.alternatives]
        if drawn:
            parts.append(f"{len(drawn)} with several captions ({sum(len(image.captions) for image in drawn)})")
        counts = {
            "held out": len(self.of_split("heldout")),
            "class images": len(self.of_split("class")),
            "masks": sum(image.mask is not None for image in self.pictures),
            "of them from transparency": sum(
                image.preparation is not None and image.preparation.mask == "transparency" for image in self.pictures
            ),
            "quarantined": len(self.quarantined),
            "skipped": len(self.skipped or ()),
        }
        parts += [f"{count} {noun}" for noun, count in counts.items() if count]
        return "; ".join([*parts, *([self.layout] if self.layout else [])])

    def describe_preparation(self) -> str:
        """Returns what preprocess did to the images, in one line; empty if their records say nothing."""
        records = [image.preparation for image in self.pictures if image.preparation is not None]
        faces = Counter(record.faces for record in records if record.faces is not None)
        masks = Counter(record.mask for record in records if record.mask is not None)
        scales = [record.scale for record in records if record.scale is not None]
        upscalers = sorted({record.upscaler for record in records if record.upscaler is not None})
        parts = [f"{number} with {count} face{'s' * (count != 1)}" for count, number in sorted(faces.items())]
        parts += [f"{number} masks of {label}" for label, number in sorted(masks.items())]
        if scales:
            parts.append(f"{len(scales)} enlarged up to {max(scales):.2f} times by {', '.join(upscalers)}")
        return "; ".join([f"{len(self.pictures)} images", *parts]) if parts else ""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Loads the manifest of a dataset folder.

        Raises:
            DataError: There is none, it is invalid, or images that it names are missing.
        """
        path = folder / _NAME
        try:
            manifest = cls.model_validate(
                read_json_object(path, DataError, remedy="run ingest again", max_bytes=256 << 20)
            )
        except FileNotFoundError:
            raise DataError(
                f"{str(folder)!r} is not a dataset: it has no {_NAME}",
                remedy="run ingest on the folder of images first and use its output",
            ) from None
        except ValidationError as error:
            raise DataError(_first_problem(error), where=str(path), remedy="run ingest again") from None
        files = [file for image in manifest.pictures for file in image.files]
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(files)} images are missing, first {', '.join(missing[:3])}",
                where=str(folder),
                remedy="run ingest again",
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Writes the manifest into the folder: same manifest, same bytes."""
        atomic_write(folder / _NAME, canonical_json(self.model_dump(mode="json")))


def _without(written: dict[str, Any], *keys: str) -> dict[str, Any]:
    # Omitted if unset: older manifests lack these keys, and the digest of a dataset must not change.
    return {key: value for key, value in written.items() if value is not None or key not in keys}


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or "the manifest"
    further = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {first['msg']}, not {str(first['input'])[:100]!r}{further}"
