"""Defines the settings of crops, masks and enlargement in preprocess. Must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from lora_engine.registries import NameOrOptions

_Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
_Margin = Annotated[float, Field(ge=1.0, le=8.0, allow_inf_nan=False)]


def _is_one_line(text: str) -> str:
    if not text.strip() or any(not character.isprintable() for character in text):
        raise ValueError(f"{text!r} must be one line of text")
    return text


Model = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(_is_one_line)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class RandomCrop(_Options):
    """A window at a random place, the same in every run with the same seed; see `Preparation.box`.

    Attributes:
        seed: Seed of the places; that of an image also depends on its digest.
    """

    name: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, lt=2**63)


class SubjectCrop(_Options):
    """The part that the mask marks: an image without a mask, or with a black one, is quarantined.

    Attributes:
        margin: Side of the window by that of the smallest square around the subject.
    """

    name: Literal["subject"] = "subject"
    margin: _Margin = 1.2


class FaceCrop(_Options):
    """The part around the face: an image without a face is quarantined.

    Attributes:
        margin: Side of the window by that of the face (eyebrows to chin).
        several: An image with several faces is quarantined, or cropped around the largest one.
        level: Turns the image so that the eyes are level, if the window stays inside the image.
        min_score: Least confidence of the detector.
    """

    name: Literal["face"] = "face"
    margin: _Margin = 1.8
    several: Literal["quarantine", "largest"] = "quarantine"
    level: bool = False
    min_score: _Share = 0.7


class _Mask(_Options):
    """The options that all masks have.

    Attributes:
        invert: Exchanges what counts and what does not.
        expand: Widens the white parts by this number of pixels of the prepared image.
        feather: Blurs the border with a Gaussian of this standard deviation, in pixels of the prepared image.
        minimum: Least weight, which black parts have; 1 would be the weight of white parts.
    """

    invert: bool = False
    expand: int = Field(default=0, ge=0, le=512)
    feather: float = Field(default=0.0, ge=0.0, le=512.0, allow_inf_nan=False)
    minimum: _Share = 0.0


class FileMask(_Mask):
    """The mask of the dataset: from a file or from transparency. An image without one counts in full."""

    name: Literal["files"] = "files"


class NoMask(_Options):
    """No mask: all images count in full."""

    name: Literal["none"] = "none"


class MadeMask(_Mask):
    """The options of masks that are made. An image whose mask is black is quarantined.

    Attributes:
        replace: Makes masks for images with a mask of their own too.
    """

    replace: bool = False


class FaceMask(MadeMask):
    """White ellipses around all faces.

    Attributes:
        margin: Size of the ellipse by that of the face (eyebrows to chin).
        min_score: Least confidence of the detector.
    """

    name: Literal["faces"] = "faces"
    margin: _Margin = 1.6
    min_score: _Share = 0.7


class TextMask(MadeMask):
    """White where a model finds what a text describes; CLIPSeg (Lüddecke and Ecker 2022), by defaults as OneTrainer.

    Attributes:
        prompt: What to find, such as `a dog`.
        model: Hub id, optionally with `@revision`, or folder of a `CLIPSegForImageSegmentation`.
        threshold: Least probability of white.
        smooth: Radius of the average over the probabilities, in pixels of the model's image (352 for CLIPSeg).
    """

    name: Literal["text"] = "text"
    prompt: Annotated[str, Field(max_length=300), AfterValidator(_is_one_line)]
    model: Model = "CIDAS/clipseg-rd64-refined"
    threshold: _Share = 0.3
    smooth: int = Field(default=5, ge=0, le=64)
    expand: int = Field(default=10, ge=0, le=512)


class BackgroundMask(MadeMask):
    """Black where a model finds background, white elsewhere.

    Attributes:
        model: Hub id, optionally with `@revision`, or folder of a model for semantic segmentation, such as SegFormer.
        labels: Labels of the model that are background; their case does not matter.
        threshold: Least probability of white.
    """

    name: Literal["background"] = "background"
    model: Model
    labels: tuple[Annotated[str, Field(max_length=200)], ...] = Field(default=("background",), min_length=1)
    threshold: _Share = 0.5


class Swin2SR(_Options):
    """Enlarges with a model: Swin2SR (Conde et al. 2022).

    Attributes:
        model: Hub id, optionally with `@revision`, or folder of a `Swin2SRForImageSuperResolution`.
    """

    name: Literal["swin2sr"] = "swin2sr"
    model: Model = "caidas/swin2SR-classical-sr-x2-64"


class _Plain(_Options):
    """An entry without options; its value in a spec is its name."""


class CenterCrop(_Plain):
    """The square in the center."""

    name: Literal["center"] = "center"


class SalientCrop(_Plain):
    """The square with the highest gradient energy."""

    name: Literal["salient"] = "salient"


class BucketCrop(_Plain):
    """Nearly all of the image, in the bucket of the nearest shape."""

    name: Literal["bucket"] = "bucket"


class Bicubic(_Plain):
    """Bicubic interpolation."""

    name: Literal["bicubic"] = "bicubic"


class Lanczos(_Plain):
    """Lanczos interpolation: sharper, with faint halos."""

    name: Literal["lanczos"] = "lanczos"


def _name_if_plain(options: _Options) -> str | _Options:
    return options.name if isinstance(options, _Plain) else options


def _dump(value: str | _Options) -> Any:
    return value if isinstance(value, str) else value.model_dump(mode="json")


if TYPE_CHECKING:
    CropSetting = Literal["center", "salient", "bucket"] | RandomCrop | SubjectCrop | FaceCrop
    UpscaleSetting = Literal["bicubic", "lanczos"] | Swin2SR
    MaskSetting = FileMask | NoMask | FaceMask | TextMask | BackgroundMask
else:
    # Entries without options are names in specs, as before others had options: cache keys stay.
    _NAMED = (Field(discriminator="name"), NameOrOptions(), AfterValidator(_name_if_plain), PlainSerializer(_dump))
    CropSetting = Annotated[CenterCrop | SalientCrop | BucketCrop | RandomCrop | SubjectCrop | FaceCrop, *_NAMED]
    UpscaleSetting = Annotated[Bicubic | Lanczos | Swin2SR, *_NAMED]
    MaskSetting = Annotated[
        FileMask | NoMask | FaceMask | TextMask | BackgroundMask, Field(discriminator="name"), NameOrOptions()
    ]
