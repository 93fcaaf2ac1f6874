"""What a generated image says about itself: A1111's infotext, a `loraline` chunk with digests, IPTC's source type.

Programs and sites that read A1111's text find the adapters by their hashes. Programs tear or drop further keys in that
text, so exact references, schedules and whole digests are in the JSON of the chunk `loraline`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.bases.samplers import titles_of
from lora_engine.data.containers import read_png_texts
from lora_engine.data.folder import open_inside
from lora_engine.documents import parse_json
from lora_engine.errors import DataError
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag

CHUNK = "loraline"
XMP = "XML:com.adobe.xmp"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_GENERATED, _COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
# The packet of Adobe's XMP specification, part 1, section 7.3; the property is of IPTC's Extension schema.
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"><Iptc4xmpExt:DigitalSourceType>'
    "{source_type}</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)


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
        regions: What `Region.facts` says of each region.
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

    def texts(self, seed: int, size: tuple[int, int]) -> dict[str, str]:
        """Returns the texts of an image file by keyword.

        Args:
            seed: Seed of the image.
            size: (height, width) in pixels.
        """
        return {
            "parameters": self._infotext(seed, size),
            CHUNK: json.dumps(self._facts(seed, size), sort_keys=True, ensure_ascii=False, separators=(",", ":")),
            XMP: _PACKET.replace("{source_type}", f"{_SOURCE_TYPES}{_COMPOSITE if self._is_composite else _GENERATED}"),
        }

    @property
    def _is_composite(self) -> bool:
        return self.source is not None and self.source.mask_sha256 is not None

    def _infotext(self, seed: int, size: tuple[int, int]) -> str:
        """Returns A1111's text: prompt, negative prompt, and a line of settings."""
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

    def _facts(self, seed: int, size: tuple[int, int]) -> Mapping[str, Any]:
        return {
            "adapters": [
                {
                    "reference": adapter.reference,
                    "sha256": adapter.sha256,
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
        }


def read_used_adapters(path: Path) -> dict[str, str] | None:
    """Returns reference -> SHA-256 of the adapters that a PNG says it was generated with; None if it says nothing.

    Raises:
        DataError: The chunk `loraline` is not as this module writes it.
    """
    with open_inside(path, path.parent) as file:
        text = dict(read_png_texts(file)).get(CHUNK)
    if text is None:
        return None
    facts = parse_json(text, f"{path}, chunk {CHUNK!r}", DataError)
    entries = facts.get("adapters") if isinstance(facts, dict) else None
    used: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        reference, sha256 = (entry.get(key) for key in ("reference", "sha256")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(reference, str) or not isinstance(sha256, str) or not _DIGEST.fullmatch(sha256):
            raise DataError(f"the chunk {CHUNK!r} names no adapters as Loraline does", where=str(path))
        used[reference] = sha256
    return used


def _one_weight(tag: AdapterTag) -> str:
    """Returns the weight that A1111's text can hold: the denoiser's, or the largest of a schedule."""
    return f"{max((weight for _, weight in tag.denoiser.points), key=abs):g}"


def _quoted(value: str) -> str:
    """Returns a value as A1111 writes it: as a JSON string if it would be torn."""
    return json.dumps(value, ensure_ascii=False) if any(character in value for character in ",\n:") else value
