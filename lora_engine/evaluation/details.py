"""Defines what a report shows beside its metrics: `details.json`. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from lora_engine.evaluation.chosen import read_record
from lora_engine.files import atomic_write, canonical_json

DETAILS = "details.json"
MAX_SPECTRUM = 16
"""Largest number of singular values of a module that are stored."""

_Text = Annotated[str, Field(max_length=2_000)]
_Image = Annotated[str, Field(max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Band(_Part):
    """The mean losses in one band of timesteps.

    Attributes:
        low: Start, as a share of the schedule from 0 (the image) to 1 (noise).
        high: End.
        losses: Role -> mean loss on the real images.
        training: Role -> mean loss on training images; empty if it was not measured.
    """

    low: float = Field(ge=0.0, le=1.0)
    high: float = Field(ge=0.0, le=1.0)
    losses: dict[_Text, FiniteFloat]
    training: dict[_Text, FiniteFloat] = {}


class Neighbors(_Part):
    """A generated image beside the nearest real ones.

    Attributes:
        prompt: Its prompt.
        image: Its file.
        training: File of the nearest training image.
        training_similarity: Cosine with it.
        heldout: File of the nearest held-out image; None without any.
        heldout_similarity: Cosine with it.
        is_copy: True if the perceptual hashes of the image and a training image are nearly equal.
    """

    prompt: _Text
    image: _Image
    training: _Image
    training_similarity: FiniteFloat
    heldout: _Image | None = None
    heldout_similarity: FiniteFloat | None = None
    is_copy: bool = False


class Strength(_Part):
    """The images of one strength of the adapter.

    Attributes:
        strength: Factor of the adapter; 0 is the base alone.
        images: One file per prompt.
        agreement: Mean cosine with the prompts; None without an embedder.
        likeness: Mean cosine with the real images; None without an embedder.
    """

    strength: FiniteFloat
    images: tuple[_Image, ...]
    agreement: FiniteFloat | None = None
    likeness: FiniteFloat | None = None


class Sweep(_Part):
    """The same prompts and seeds at several strengths.

    Attributes:
        prompts: The prompts.
        strengths: In ascending order.
        zero_is_base: True if strength 0 gives the base's images bit for bit; None if 0 is not among the strengths.
    """

    prompts: tuple[_Text, ...]
    strengths: tuple[Strength, ...]
    zero_is_base: bool | None = None


class ModuleWeights(_Part):
    """The weights of one module; see `ModuleHealth`."""

    kind: _Text
    rank: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    effective_rank: FiniteFloat | None = None
    norm: FiniteFloat | None = None
    largest: FiniteFloat
    notes: tuple[_Text, ...] = ()
    spectrum: tuple[FiniteFloat, ...] = Field(default=(), max_length=MAX_SPECTRUM)


class Details(_Part):
    """What a report shows beside its metrics.

    Attributes:
        bands: Losses by timestep band.
        neighbors: Generated images beside their nearest real ones, the most suspicious first.
        sweep: The strength sweep; None if it was not asked for.
        modules: The adapter's weights by module.
        reconstruction: Peak signal-to-noise ratio in decibels of the real images after the base's autoencoder, the
            best that any adapter for this base could draw; None if it was not measured.
        notes: What a reader has to know first, such as that the base cannot draw such images.
    """

    bands: tuple[Band, ...] = ()
    neighbors: tuple[Neighbors, ...] = ()
    sweep: Sweep | None = None
    modules: dict[_Text, ModuleWeights] = {}
    reconstruction: FiniteFloat | None = None
    notes: tuple[_Text, ...] = ()


def write_details(folder: Path, details: Details) -> None:
    """Writes `details.json` into the folder of a report."""
    atomic_write(folder / DETAILS, canonical_json(details.model_dump(mode="json")))


def read_details(folder: Path) -> Details:
    """Reads the details of a report; those of earlier releases have none.

    Raises:
        DataError: The file exists and is broken.
    """
    return read_record(Details, folder / DETAILS, remedy="evaluate again")
