"""Turns A1111's requests into requests of the service."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from flows.web.a1111_models import ImageBody, ImageToImageBody, TextToImageBody, require_no_scripts
from lora_engine.bases.samplers import SCHEDULE_TYPES, find_sampler, join_schedule
from lora_engine.errors import SettingsError
from lora_engine.inference.variation import NoiseVariation
from tasks.operations.draw_request import DrawRequest
from tasks.serving.catalog import ServedBase, adapter_tag, resolve_labels
from tasks.serving.uploads import SourceFiles, UploadedImage, decode_base64, read_upload

if TYPE_CHECKING:
    from PIL import Image

    from lora_engine.inference.inpainting import PreparedImage, ResizeMode
    from registry.home import Home

_MAX_SEED = 2**32
_RESIZES: tuple[ResizeMode, ...] = ("stretch", "crop", "fill")
_FILLS, _KEEPS = 0, 1


class UnknownSampler(SettingsError):
    """A sampler or schedule type that does not exist, or that the engine lacks; A1111 answers 404."""


class MissingImage(SettingsError):
    """A request of img2img without an image; A1111 answers 404."""


def text_request(body: TextToImageBody, base: ServedBase, home: Home) -> DrawRequest:
    """Returns the request of txt2img.

    Raises:
        WordedError: A field cannot be honored.
    """
    _check(body, base)
    enlarge = body.enlarge()
    return _request(body, home, size=(body.height, body.width), enlarge=enlarge)


def image_request(
    body: ImageToImageBody, base: ServedBase, home: Home
) -> tuple[DrawRequest, SourceFiles, PreparedImage]:
    """Returns the request of img2img, the files that it starts from, and what is needed to paste the result.

    Raises:
        WordedError: A field cannot be honored, or an image cannot be read.
    """
    from dataclasses import replace

    _check(body, base)
    prepared = _prepare(body)
    request = _request(body, home, size=(body.height, body.width))
    files = SourceFiles.write(prepared)
    return replace(request, image=files.image, mask=files.mask, strength=body.denoising_strength), files, prepared


def sampler_of(body: ImageBody) -> str:
    """Returns one name of sampler and schedule type; a type at the end of the sampler's name has priority.

    Raises:
        UnknownSampler: The engine has no such sampler or type.
    """
    name = (body.sampler_name or body.sampler_index).strip()
    words = "_".join(name.lower().replace("-", "_").split())
    has_schedule = any(words.endswith(f"_{schedule}") for schedule in SCHEDULE_TYPES)
    joined = name if has_schedule else str(join_schedule(name, body.scheduler.strip() or "automatic"))
    try:
        find_sampler(joined)
    except SettingsError as error:
        raise UnknownSampler(
            f"Sampler not found: {error.problem}", allowed=error.allowed, remedy=error.remedy
        ) from None
    return joined


def _check(body: ImageBody, base: ServedBase) -> None:
    require_no_scripts(body)
    body.require_neutral()
    wanted = str(body.override_settings.get("sd_model_checkpoint") or base.title)
    if not base.is_named(wanted):
        raise SettingsError(f"sd_model_checkpoint is {wanted[:80]!r}", where="override_settings", allowed=base.title)


def _request(body: ImageBody, home: Home, *, size: tuple[int, int], enlarge: float = 1.0) -> DrawRequest:
    tags = [adapter_tag(entry.reference(), entry.factor()) for entry in body.lora]
    from_height, from_width = body.seed_resize_from_h, body.seed_resize_from_w
    return DrawRequest(
        resolve_labels(" ".join([body.prompt, *tags]), home),
        negative=body.negative_prompt,
        count=body.count,
        seed=_seed_of(body.seed),
        steps=body.steps,
        guidance=body.cfg_scale,
        size=size,
        sampler=sampler_of(body),
        clip_skip=body.clip_skip,
        variation=NoiseVariation(_seed_of(body.subseed), body.subseed_strength) if body.subseed_strength else None,
        seed_size=(from_height, from_width) if from_height > 0 and from_width > 0 else None,
        enlarge=enlarge,
        enlarged_strength=body.denoising_strength,
    )


def _seed_of(seed: int) -> int:
    return secrets.randbelow(_MAX_SEED) if seed < 0 else seed


def _prepare(body: ImageToImageBody) -> PreparedImage:
    from lora_engine.inference.inpainting import InpaintSettings, prepare_inpainting

    if not body.init_images:
        raise MissingImage("Init image not found", where="init_images", allowed="one image in base64")
    if len(body.init_images) > 1:
        raise SettingsError(f"init_images has {len(body.init_images)} images", allowed="one image")
    if body.resize_mode >= len(_RESIZES):
        raise SettingsError(f"resize_mode is {body.resize_mode}", allowed="0, 1 or 2")
    if body.mask and body.inpainting_fill not in {_FILLS, _KEEPS}:
        raise SettingsError(f"inpainting_fill is {body.inpainting_fill}", allowed="0 (fill) or 1 (original)")
    if body.denoising_strength == 0.0:
        raise SettingsError("denoising_strength is 0, which would return the image", allowed="above 0, up to 1")
    blurs = {value for value in (body.mask_blur_x, body.mask_blur_y) if value is not None} or {body.mask_blur}
    if len(blurs) > 1:
        raise SettingsError("mask_blur_x and mask_blur_y differ", allowed="equal values")
    image = read_upload(decode_base64(body.init_images[0], "init_images"), "init_images")
    mask = read_upload(decode_base64(body.mask, "mask"), "mask") if body.mask else None
    settings = InpaintSettings(
        (body.height, body.width),
        _RESIZES[body.resize_mode],
        blur=blurs.pop(),
        fills=body.inpainting_fill == _FILLS,
        only_masked=body.inpaint_full_res,
        padding=body.inpaint_full_res_padding,
        inverts=body.inpainting_mask_invert == 1,
    )
    return prepare_inpainting(image.pixels, None if mask is None else _light(mask), settings)


def _light(mask: UploadedImage) -> Image.Image:
    """Returns the gray mask; one with transparency is light where it is opaque, as in A1111."""
    return mask.pixels.convert("L") if mask.opacity is None else mask.opacity
