"""The manifest: which pictures a dataset holds, under which captions, and which files were left out and why.

Torch-free and without image code: specs, flows and the registry's side may import it. Decoding lives in `images`.
"""

from __future__ import annotations

import json
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

from lora_engine.data.rights import Rights
from lora_engine.errors import DataError
from lora_engine.files import atomic_write, canonical_json

NAME = "manifest.json"
MAX_CAPTION = 2_000
MAX_REPEATS = 10_000

Split = Literal["train", "heldout"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ImageEntry(BaseModel):
    """One usable picture.

    Attributes:
        sha256: Digest of the ORIGINAL file's bytes: the picture's identity through the whole line.
        file: Where the pixels are inside the artifact.
        width: In pixels, of the file inside the artifact.
        height: In pixels, of the file inside the artifact.
        caption: One line; empty where none is known yet.
        source: The name in the person's folder, made printable; for showing only.
        split: `heldout` pictures are never trained on.
        consent: The id of the consent that covers the picture.
        repeats: How often it comes up in training while a picture with 1 comes up once.
        mask: Where its mask is inside the artifact: grey, of the picture's size, white where the picture counts in
            full and black where it does not count; None counts everywhere.
        rights: What is stated about it, and what its file gave away; None where there is neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    # The pattern is a promise: nothing in a manifest can point outside the artifact.
    file: str = Field(pattern=r"^pictures/[0-9a-f]{16}\.png$")
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    caption: str = Field(default="", max_length=MAX_CAPTION)
    source: str
    split: Split = "train"
    consent: str | None = None
    repeats: int = Field(default=1, ge=1, le=MAX_REPEATS)
    mask: str | None = Field(default=None, pattern=r"^masks/[0-9a-f]{16}\.png$")
    rights: Rights | None = None

    @model_serializer(mode="wrap")
    def _without_empty_rights(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A picture about which nothing is stated is written as it always was: same dataset, same digest.
        written: dict[str, Any] = serialize(self)
        if self.rights is None:
            written.pop("rights", None)
        return written

    @property
    def files(self) -> tuple[str, ...]:
        """Everything inside the artifact that belongs to the picture."""
        return (self.file,) if self.mask is None else (self.file, self.mask)


class Quarantined(BaseModel):
    """A file of the folder that is not used, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reason: str


class Manifest(BaseModel):
    """A dataset: used pictures + quarantined files = all files of the folder that could be pictures.

    The mask of a used picture belongs to that picture and counts as neither.

    Attributes:
        pictures: Ordered by source name.
        quarantined: Files left out, with reasons; carried on through every step.
        trigger: The word that stands for the concept in the captions.
        class_word: What the concept is an instance of ("star", "dog").
        format: Version of this file's layout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: tuple[ImageEntry, ...]
    quarantined: tuple[Quarantined, ...] = ()
    trigger: str | None = None
    class_word: str | None = None
    format: Literal[1] = 1

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Manifest:
        seen: dict[str, str] = {}
        for picture in self.pictures:
            if picture.file in seen:
                raise ValueError(f"{seen[picture.file]!r} and {picture.source!r} share the file {picture.file}")
            seen[picture.file] = picture.source
        return self

    def of_split(self, split: Split) -> tuple[ImageEntry, ...]:
        """The pictures of one split, in the manifest's order."""
        return tuple(picture for picture in self.pictures if picture.split == split)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a dataset folder.

        Raises:
            DataError: There is none, it is not valid, or pictures that it names are missing.
        """
        path = folder / NAME
        try:
            manifest = cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise DataError(
                f"{str(folder)!r} is not a dataset: it has no {NAME}",
                remedy="run ingest on the folder of pictures first and use what it wrote",
            ) from None
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from None
        except ValidationError as error:
            raise DataError(_first_problem(error), where=str(path), remedy="run ingest again") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON ({error})", where=str(path), remedy="run ingest again") from None
        files = [file for picture in manifest.pictures for file in picture.files]
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(files)} pictures are missing, first {', '.join(missing[:3])}",
                where=str(folder),
                remedy="run ingest again",
            )
        return manifest

    def save(self, folder: Path) -> None:
        """Writes the manifest into the folder: same manifest, same bytes."""
        atomic_write(folder / NAME, canonical_json(self.model_dump(mode="json")))


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "the manifest"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {first['msg']}, not {str(first['input'])[:100]!r}{more}"
