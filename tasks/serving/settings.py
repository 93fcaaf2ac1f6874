"""Defines the settings of a service, and the limits of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lora_engine.errors import SettingsError
from tasks.operations.draw_request import DrawRequest
from tasks.serving import EngineName

if TYPE_CHECKING:
    from lora_engine.inference.regions import Regions


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of a service.

    Attributes:
        base: The base model; see `load_base`.
        queue_limit: Number of jobs that may wait.
        tenant_limit: Number of jobs of one tenant that may wait; None means half of `queue_limit`, at least 1.
        engine: How adapters are held.
        engine_options: Further options of the engine; see `lora_engine.serving.engines`.
        adapters: `name@ref:weight` of the adapters of the static engine, which are in every image.
        batch_images: Number of images that are drawn in one batch.
        batch_window: Seconds to wait for further jobs that fit into a batch.
        cache_bytes: Size of the adapter files that are kept on disk.
        keep_hours: Hours for which ended jobs, their images and their idempotency keys are kept.
        keep_bytes: Size of the images that are kept; the oldest are deleted first.
        max_images: Number of images of one request.
        max_steps: Number of steps of one request.
        max_pixels: Number of pixels of an image, after enlarging.
        safety: `package:function`, or the name of an entry point of `loraline.safety`, that may refuse images; None
            lets all out.
    """

    base: str = "tiny"
    queue_limit: int = 64
    tenant_limit: int | None = None
    engine: EngineName = "dynamic"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    batch_images: int = 8
    batch_window: float = 0.01
    cache_bytes: int = 4 << 30
    keep_hours: float = 24.0
    keep_bytes: int = 4 << 30
    max_images: int = 16
    max_steps: int = 150
    max_pixels: int = 2048 * 2048
    safety: str | None = None

    @property
    def waiting_per_tenant(self) -> int:
        """Number of jobs of one tenant that may wait."""
        return max(1, self.queue_limit // 2) if self.tenant_limit is None else self.tenant_limit


MAX_PROMPT = 10_000
"""Characters of a prompt."""
MAX_ADAPTERS = 16
"""Adapters of a prompt."""
_FIXED = ("vae", "tile_vae", "offload", "batch", "previews", "format", "quality", "credentials")
"""Fields of a request that concern files, memory or keys of the server; another VAE would be loaded each time."""
MAX_SEED = 2**63 - 1 - 1_000
"""Largest seed; those of further images of a request count up, and torch takes 63 bits."""


def check_request(request: DrawRequest, settings: ServiceSettings) -> None:
    """Raises an error if a request is outside of the limits of a service.

    Raises:
        SettingsError: A value is outside, or the service cannot change it for one request.
    """
    _check("images", request.count, 1, settings.max_images)
    _check("steps", request.steps, 1, settings.max_steps)
    _check("seed", request.seed, 0, MAX_SEED)
    if request.variation is not None:
        _check("seed of the variation", request.variation.seed, 0, MAX_SEED)
    _check("guidance", request.guidance, 0.0, 100.0)
    _check("strength", request.strength, 0.01, 1.0)
    _check("enlarged_strength", request.enlarged_strength, 0.01, 1.0)
    _check("enlarge", request.enlarge, 1.0, 4.0)
    for name in ("prompt", "negative"):
        _check(f"length of the {name}", len(getattr(request, name)), 0, MAX_PROMPT)
    _check("length of the regions", sum(map(len, request.regions)), 0, MAX_PROMPT)
    _check("adapter_guidance", request.adapter_guidance, -100.0, 100.0)
    if request.clip_skip is not None:
        _check("clip_skip", request.clip_skip, 1, 99)
    for size, factor in ((request.size, request.enlarge), (request.seed_size, 1.0)):
        if size is None:
            continue
        for side in size:
            _check("width and height", side, 8, 16_384)
        _check("pixels of an image", round(math.prod(size) * factor**2), 1, settings.max_pixels)
    for entry in fields(request):
        if entry.name in _FIXED and getattr(request, entry.name) != entry.default:
            raise SettingsError(
                f"{entry.name} is {getattr(request, entry.name)!r}",
                allowed=f"{entry.default!r}: a server does not change it by request",
                remedy=f"leave out {entry.name}",
            )


def require_boxes(regions: Regions) -> None:
    """Raises an error if a region has a mask: a client could name any file of the server.

    Raises:
        SettingsError: One has.
    """
    for region in regions.items:
        if region.mask is not None:
            raise SettingsError(
                f"region {str(region.mask)[:80]!r} is no box",
                allowed="LEFT,TOP,RIGHT,BOTTOM=PROMPT in shares of the image, such as 0,0,0.5,1=a cube",
                remedy="a server reads no files of masks; use loraline generate",
            )


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # also refuses NaN
        raise SettingsError(f"{name} is {value!r}", allowed=f"{least:,} to {most:,}", remedy=f"correct {name}")
