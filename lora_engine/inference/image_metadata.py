"""What a generated image says about itself: A1111's infotext, JSON with digests, IPTC's source type.

Programs and sites that read A1111's text find the adapters by their hashes. Programs tear or drop further keys in that
text, so exact references, schedules and whole digests are in JSON. `image_files` puts all of it into files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.bases.samplers import titles_of
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag

_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_GENERATED, _COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"


@dataclass(frozen=True)
class UsedAdapter:
    """An adapter of a generated image.

    Attributes:
        label: Name for programs that know files by name: `NAME-vN`, or the stem of the file.
        reference: `name@version`, or the name of the file without its folder.
        sha256: SHA-256 of the file; its first ten digits are AutoV2.
        body_sha256: SHA-256 of the file without its header (whole if it has none), as A1111 computes it; its first
            twelve digits are AutoV3.
    """

    label: str
    reference: str
    sha256: str
    body_sha256: str

    @classmethod
    def of_file(cls, file: Path, reference: str) -> UsedAdapter:
        """Returns the digests of a file; those of a PEFT folder are of its weights."""
        source = next(path for name in _PEFT if (path := file / name).is_file()) if file.is_dir() else file
        name, at, number = reference.partition("@")
        label = f"{name}-v{number}" if at else Path(reference).stem
        with source.open("rb") as opened:
            whole = hashlib.file_digest(opened, "sha256").hexdigest()
            opened.seek(0)
            # `read_bundle` checked the length of the header.
            has_header = source.suffix == ".safetensors"
            opened.seek(8 + struct.unpack("<Q", opened.read(8))[0] if has_header else 0)
            return cls(label, reference, whole, hashlib.file_digest(opened, "sha256").hexdigest())


@dataclass(frozen=True)
class UsedImage:
    """The image that generated images started from.

    Attributes:
        sha256: SHA-256 of its file.
        strength: Share of the steps that ran.
        mask_sha256: SHA-256 of the file of its mask; None without one.
    """

    sha256: str
    strength: float
    mask_sha256: str | None = None


@dataclass(frozen=True)
class Drawing:
    """How a set of images was generated.

    Attributes:
        prompt: The prompt.
        negative: The negative prompt.
        adapters: One per adapter of the prompt, in its order.
        base: Name of the base.
        fingerprint: Digest of the base's weights.
        scheduler: Class of diffusers.
        scheduler_options: Its options.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        version: Version of Loraline.
        source: The image that they started from; None for noise.
        enlarged: Factor, and share of the steps that ran on the enlarged images; None if they were not enlarged.
        regions: What `SettledTags.region_facts` says of each region.
        feather: Blur of the regions' borders, in pixels.
        only_regions: True if only the regions of the source are drawn.
        variation: Seed of the noise that is mixed in, and its share; None if there is none.
        seed_size: (height, width) in pixels whose noise is in the middle; None for that of the images.
        clip_skip: Layer of the CLIP text encoders from the last; None for the base's own.
    """

    prompt: ParsedPrompt
    negative: ParsedPrompt
    adapters: Sequence[UsedAdapter]
    base: str
    fingerprint: str
    scheduler: str
    scheduler_options: Mapping[str, Any]
    steps: int
    guidance: float
    version: str
    source: UsedImage | None = None
    enlarged: tuple[float, float] | None = None
    regions: Sequence[Mapping[str, Any]] = ()
    feather: float = 0.0
    only_regions: bool = False
    variation: tuple[int, float] | None = None
    seed_size: tuple[int, int] | None = None
    clip_skip: int | None = None

    @property
    def source_type(self) -> str:
        """IPTC's digital source type: that of a composite for images of which a mask or regions are drawn."""
        has_mask = self.source is not None and self.source.mask_sha256 is not None
        return source_type_of(has_mask or self.only_regions)

    def facts(self, seed: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns what JSON of an image file says: exact references, whole digests, schedules and settings.

        Args:
            seed: Seed of the image.
            size: (height, width) in pixels.
        """
        return {
            "adapters": [
                {
                    "reference": adapter.reference,
                    "sha256": adapter.sha256,
                    "autov2": adapter.sha256[:10],
                    "autov3": adapter.body_sha256[:12],
                    **tag.facts(),
                }
                for tag, adapter in zip(self.prompt.adapters, self.adapters, strict=True)
            ],
            "base": {"name": self.base, "fingerprint": self.fingerprint},
            "format": 1,
            "guidance": self.guidance,
            "negative": self.negative.text,
            "prompt": self.prompt.text,
            "sampler": {"class": self.scheduler, **self.scheduler_options},
            "seed": seed,
            "size": list(size),
            "steps": self.steps,
            "version": self.version,
            **({} if self.source is None else {"source": vars(self.source)}),
            **({} if self.enlarged is None else {"enlarged": list(self.enlarged)}),
            **({} if not self.regions else {"regions": list(self.regions)}),
            **({} if not self.feather else {"feather": self.feather}),
            **({} if not self.only_regions else {"only_regions": True}),
            **({} if self.variation is None else {"variation": list(self.variation)}),
            **({} if self.seed_size is None else {"seed_size": list(self.seed_size)}),
            **({} if self.clip_skip is None else {"clip_skip": self.clip_skip}),
        }

    def infotext(self, seed: int, size: tuple[int, int]) -> str:
        """Returns A1111's text: prompt, negative prompt, and a line of settings; see `facts` for the arguments."""
        tags = [
            f"<lora:{adapter.label}:{_one_weight(tag)}>"
            for tag, adapter in zip(self.prompt.adapters, self.adapters, strict=True)
        ]
        settings = {
            "Steps": str(self.steps),
            **self._sampler(),
            "CFG scale": f"{self.guidance:g}",
            "Seed": str(seed),
            "Size": f"{size[1]}x{size[0]}",
            "Model": self.base,
        }
        if self.clip_skip is not None:
            settings["Clip skip"] = str(self.clip_skip)
        if self.variation is not None:
            settings |= {"Variation seed": str(self.variation[0])}
            settings |= {"Variation seed strength": f"{self.variation[1]:g}"}
        if self.seed_size is not None:
            settings["Seed resize from"] = f"{self.seed_size[1]}x{self.seed_size[0]}"
        if self.enlarged is not None:
            factor, strength = self.enlarged
            settings |= {"Denoising strength": f"{strength:g}", "Hires upscale": f"{factor:g}"}
            settings["Hires upscaler"] = "Lanczos"
        elif self.source is not None:
            settings["Denoising strength"] = f"{self.source.strength:g}"
        if self.adapters:
            hashes = ", ".join(f"{adapter.label}: {adapter.body_sha256[:12]}" for adapter in self.adapters)
            settings["Lora hashes"] = hashes
        settings["Version"] = f"Loraline {self.version}"
        lines = [" ".join([self.prompt.text, *tags]).strip()]
        if self.negative.text:
            lines.append(f"Negative prompt: {self.negative.text}")
        lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items()))
        return "\n".join(lines)

    def _sampler(self) -> dict[str, str]:
        name, schedule = titles_of(self.scheduler, self.scheduler_options)
        return {"Sampler": name, **({"Schedule type": schedule} if schedule else {})}


def source_type_of(is_composite: bool) -> str:
    """Returns IPTC's digital source type of generated images, or of images of which a part is generated."""
    return _COMPOSITE if is_composite else _GENERATED


def _one_weight(tag: AdapterTag) -> str:
    """Returns the weight that A1111's text can hold: the denoiser's, or the largest of a schedule."""
    return f"{max((weight for _, weight in tag.denoiser.points), key=abs):g}"


def _quoted(value: str) -> str:
    """Returns a value as A1111 writes it: as a JSON string if it would be torn."""
    return json.dumps(value, ensure_ascii=False) if any(character in value for character in ",\n:") else value
