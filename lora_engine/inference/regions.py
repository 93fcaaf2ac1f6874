"""Regions of an image with prompts and adapters of their own.

Each region has its own guided prediction in each step, and the predictions are added with weights that sum to 1 at each
place of the latents: MultiDiffusion (Bar-Tal et al. 2023, equation 5), which Latent Couple does for prompts. So a
region's adapters change no other prediction, and any family and kind of adapter works.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from lora_engine.data.images import open_image
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_file
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt

MAX_REGIONS, MAX_FEATHER = 20, 256
# Rounding of masks of 8 bits, or blurred ones, that cover a place together.
_COVERED = 1e-2


@dataclass(frozen=True)
class Region:
    """A region as a user names it.

    Attributes:
        prompt: What is drawn in it.
        box: Left, top, right and bottom in shares of the image, from 0 to 1; None for a mask.
        mask: A file, light in the region; None for a box.
    """

    prompt: ParsedPrompt
    box: tuple[float, float, float, float] | None = None
    mask: Path | None = None

    def cover(self, size: tuple[int, int]) -> Tensor:
        """Returns the weight of the region at each pixel, float32 [1, height, width] in [0, 1].

        Args:
            size: (height, width) of the images that are drawn; a mask is scaled and cropped to it.

        Raises:
            SettingsError: The region is empty.
            DataError: The mask cannot be read.
        """
        if self.box is not None:
            cover = torch.zeros(1, *size)
            left, top, right, bottom = (
                round(share * side) for share, side in zip(self.box, (size[1], size[0]) * 2, strict=True)
            )
            cover[:, top:bottom, left:right] = 1.0
            where = ",".join(f"{share:g}" for share in self.box)
        else:
            assert self.mask is not None
            # Averaged, because Lanczos' waves would be weights beside a border.
            image = ImageOps.fit(open_image(self.mask).convert("L"), (size[1], size[0]), Image.Resampling.BOX)
            cover = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *size) / 255.0
            where = str(self.mask)
        if not bool(cover.any()):
            raise SettingsError("the region is empty", where=where, allowed="a mask with light parts, or a larger box")
        return cover

    def facts(self, adapters: Sequence[int] = ()) -> dict[str, Any]:
        """Returns the region as JSON values; of a mask, the SHA-256 of its file.

        Args:
            adapters: Numbers of its own adapters among those of the image.
        """
        where = {"box": list(self.box)} if self.box is not None else {"mask_sha256": sha256_file(self.mask or Path())}
        return {"prompt": self.prompt.text, **where, **({"adapters": list(adapters)} if adapters else {})}


@dataclass(frozen=True)
class Regions:
    """All regions of an image.

    Attributes:
        items: The regions; where several overlap, they share the place.
        feather: Standard deviation of the blur of their borders, in pixels of the image.
        is_mask: True draws only what they cover of the image to start from.
    """

    items: tuple[Region, ...] = ()
    feather: float = 0.0
    is_mask: bool = False

    def __post_init__(self) -> None:
        if len(self.items) > MAX_REGIONS:
            raise SettingsError(f"{len(self.items)} regions", allowed=f"at most {MAX_REGIONS}")
        if not 0.0 <= self.feather <= MAX_FEATHER:
            raise SettingsError(f"feather is {self.feather:g}", allowed=f"pixels from 0 to {MAX_FEATHER}")
        if not self.items and (self.feather or self.is_mask):
            raise SettingsError("there are no regions to feather or to draw alone", remedy="name a region, too")

    def areas(self, size: tuple[int, int]) -> list[Area]:
        """Returns the regions of images of a size (height, width); see `Region.cover` for the errors."""
        return [Area(region.prompt, feathered(region.cover(size), self.feather)) for region in self.items]

    def mask(self, size: tuple[int, int]) -> Tensor:
        """Returns what the regions cover together, [1, height, width] in [0, 1], without feather."""
        return torch.stack([region.cover(size) for region in self.items]).amax(dim=0)

    def check_image(self, size: tuple[int, int]) -> None:
        """Raises an error for a mask that has not the size (width, height) of the image to start from.

        Raises:
            SettingsError: There is one.
            DataError: A mask cannot be read.
        """
        for region in self.items:
            if region.mask is not None and (image := open_image(region.mask)).size != size:
                raise SettingsError(
                    f"the mask has {image.width} x {image.height} pixels, the image {size[0]} x {size[1]}",
                    where=str(region.mask),
                    remedy="use a mask of the image's size",
                )


NO_REGIONS = Regions()


@dataclass(frozen=True)
class Area:
    """A region of images of one size.

    Attributes:
        prompt: What is drawn in it.
        cover: float32 [1, height, width] in [0, 1]: its weight at each pixel.
    """

    prompt: ParsedPrompt
    cover: Tensor


def feathered(cover: Tensor, pixels: float) -> Tensor:
    """Returns a cover [1, height, width] blurred by a Gaussian of that standard deviation; its border counts on."""
    if pixels <= 0:
        return cover
    # A radius below the image's side, which replicated borders need.
    radius = int(min(3 * pixels + 1, *(side - 1 for side in cover.shape[1:])))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / pixels) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(cover[None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[0].clamp(0.0, 1.0)


def blend_weights(covers: Sequence[Tensor], latent_size: tuple[int, int]) -> list[Tensor]:
    """Returns the weight of the base prompt and of each region at each place of the latents.

    Where regions overlap, their weights are divided by the sum; what they leave is the base prompt's.

    Args:
        covers: [1, height, width] in [0, 1] of each region.
        latent_size: (height, width) of the latents.

    Returns:
        Tensors [1, 1, height, width] that sum to 1 at each place.
    """
    stacked = F.interpolate(torch.stack(list(covers)), latent_size, mode="area")
    total = stacked.sum(dim=0, keepdim=True)
    rest = (1.0 - total).clamp(min=0.0)
    rest = torch.where(rest < _COVERED, torch.zeros_like(rest), rest)
    weights = torch.cat([rest, stacked])
    return [weight[None] for weight in weights / weights.sum(dim=0, keepdim=True)]


_SHARE = re.compile(r"[01](?:\.[0-9]{0,9})?|\.[0-9]{1,9}")


def parse_region(text: str) -> Region:
    """Reads `WHERE=PROMPT`; WHERE is `LEFT,TOP,RIGHT,BOTTOM` in shares from 0 to 1, or the file of a mask.

    Raises:
        SettingsError: It has no prompt or no place, the box is empty, or the prompt cannot be read.
    """
    where, equals, prompt = text.partition("=")
    parts = [part.strip() for part in where.split(",")]
    if not where.strip() or not equals or not prompt.strip():
        raise SettingsError(
            f"region {text[:80]!r}",
            allowed='WHERE=PROMPT, such as 0,0,0.5,1="a red zorb"; WHERE is a box in shares, or the file of a mask',
        )
    try:
        parsed = parse_prompt(prompt)
    except SettingsError as error:
        place = f"region {where.strip()[:80]!r}"
        raise SettingsError(
            error.problem,
            where=f"{place}, {error.where}" if error.where else place,
            allowed=error.allowed,
            remedy=error.remedy,
        ) from None
    if not all(_SHARE.fullmatch(part) for part in parts):
        return Region(parsed, mask=Path(where.strip()))
    shares = [float(part) for part in parts]
    if len(shares) != 4 or not (0 <= shares[0] < shares[2] <= 1 and 0 <= shares[1] < shares[3] <= 1):
        raise SettingsError(
            f"region {where[:80]!r}",
            allowed="LEFT,TOP,RIGHT,BOTTOM in shares of the image, such as 0,0,0.5,1 for its left half",
        )
    left, top, right, bottom = shares
    return Region(parsed, (left, top, right, bottom))
