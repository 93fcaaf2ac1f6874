"""Converts images with a color profile to sRGB, which all models expect."""

from __future__ import annotations

import io
import logging

from PIL import Image, ImageCms

_log = logging.getLogger(__name__)
_SPACES = {"RGB": "RGB ", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Returns an RGB or CMYK image as RGB with the colors that its profile gives it.

    Without a profile, with one of sRGB, or with a broken one, the values are taken as they are (CMYK by Pillow's
    formula); a broken one is logged.

    Args:
        image: Of mode RGB or CMYK; its profile is in `info["icc_profile"]`.
        name: The file, for the log.
    """
    content = image.info.get("icc_profile")
    if not content:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if profile.profile.xcolor_space != _SPACES[image.mode] or _is_srgb(profile):
            return image.convert("RGB")
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        converted = ImageCms.profileToProfile(image, profile, _SRGB, intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as problem:
        _log.warning("%s has a color profile that cannot be used (%s); its colors are taken as sRGB", name, problem)
        return image.convert("RGB")
    return converted if converted is not None else image.convert("RGB")


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    description = profile.profile.profile_description or ""
    return profile.profile.xcolor_space == "RGB " and "srgb" in description.lower()


_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
