"""Gathers the details of a report from the evidence, and writes their images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from lora_engine.data.duplicates import take_print
from lora_engine.data.images import open_image, write_image
from lora_engine.data.pixels import read_pixels, to_image
from lora_engine.evaluation.bands import band_losses
from lora_engine.evaluation.copies import find_copies
from lora_engine.evaluation.details import (
    MAX_SPECTRUM,
    Band,
    Details,
    ModuleWeights,
    Neighbors,
    Strength,
    Sweep,
)
from lora_engine.evaluation.evidence import CANDIDATE, Evidence
from lora_engine.evaluation.health import examine_adapter
from lora_engine.evaluation.subject import embed_heldout, to_images

if TYPE_CHECKING:
    from lora_engine.adapters import Delta
    from lora_engine.bases.base import BaseModel
    from lora_engine.evaluation.drawing import StrengthImages
    from lora_engine.evaluation.plan import Request

MAX_NEIGHBORS = 8
"""Largest number of generated images that are shown beside their nearest real ones."""
LEAST_RECONSTRUCTION = 20.0
"""Peak signal-to-noise ratio in decibels below which a base is said to be unable to draw the images. The autoencoder of
the embedded base has 27 to 31 dB on its own drawings, and 14 to 18 dB on six photographs at its size."""
_SIDE = 512
_RECONSTRUCTED = 8


def gather_details(
    evidence: Evidence,
    out: Path,
    *,
    model: BaseModel,
    modules: Mapping[str, Delta],
    strengths: Sequence[StrengthImages] = (),
) -> Details:
    """Returns the details of a report, and writes their images to `pictures/`.

    Args:
        evidence: The evidence.
        out: The folder of the report.
        model: The base.
        modules: The candidate's deltas.
        strengths: Its images at several strengths.
    """
    files = [images.request for images in evidence.reference if images.request.file]
    reconstruction = measure_reconstruction(model, files[:_RECONSTRUCTED]) if files else None
    return Details(
        bands=tuple(_bands(evidence)),
        neighbors=tuple(_neighbors(evidence, out)),
        sweep=_sweep(evidence, out, strengths) if strengths else None,
        modules={name: _weights(health.as_dict()) for name, health in examine_adapter(modules).items()},
        reconstruction=reconstruction,
        notes=_notes(reconstruction, model.name),
    )


@torch.inference_mode()
def measure_reconstruction(model: BaseModel, requests: Sequence[Request]) -> float:
    """Returns the mean peak signal-to-noise ratio in decibels of real images after the base's autoencoder.

    Args:
        model: The base.
        requests: Requests with the file of a real image.
    """
    ratios = []
    for request in requests:
        pixels = read_pixels(request.file)[None] if request.file else torch.zeros(1, 3, *request.size)
        decoded = model.decode_latents(model.encode_images(pixels)).float().cpu().clamp(-1.0, 1.0)
        error = float((decoded - pixels).double().square().mean())
        ratios.append(10.0 * math.log10(4.0 / max(error, 1e-10)))
    return sum(ratios) / len(ratios)


def _notes(reconstruction: float | None, base: str) -> tuple[str, ...]:
    if reconstruction is None or reconstruction >= LEAST_RECONSTRUCTION:
        return ()
    return (
        f"The base {base!r} cannot draw such images: its own autoencoder reproduces the real ones with "
        f"{reconstruction:.1f} dB (below {LEAST_RECONSTRUCTION:g} dB, details are lost), and no adapter can do better.",
    )


def _bands(evidence: Evidence) -> list[Band]:
    training = band_losses(evidence.training.values) if evidence.training is not None else None
    return [
        Band(
            low=band.low,
            high=band.high,
            losses=dict(band.losses),
            training=dict(training[index].losses) if training else {},
        )
        for index, band in enumerate(band_losses(evidence.heldout.values))
    ]


def _neighbors(evidence: Evidence, out: Path) -> list[Neighbors]:
    """Returns generated images beside the nearest real ones: copies first, then by the difference of similarities."""
    if evidence.embedder is None or not evidence.trained_on:
        return []
    sets, embedder = evidence.with_trigger, evidence.embedder
    drawn = torch.cat([evidence.embed(images, CANDIDATE, embedder) for images in sets])
    prompts = [images.request.prompt for images in sets for _ in images.images[CANDIDATE]]
    images = [image for entry in sets for image in to_images(entry.images[CANDIDATE])]
    copies = find_copies([take_print(image) for image in images], evidence.subject.prints())
    training = drawn @ evidence.subject.embed(embedder).T
    trained_on = {image.sha256 for image in evidence.trained_on}
    has_heldout = not any(entry.request.image in trained_on for entry in evidence.reference)
    heldout = drawn @ embed_heldout(evidence, embedder).T if has_heldout else None
    gap = training.max(dim=1).values - (heldout.max(dim=1).values if heldout is not None else 0.0)
    order = sorted(range(len(images)), key=lambda index: (index not in copies, -float(gap[index])))
    entries = []
    for place, index in enumerate(order[:MAX_NEIGHBORS]):
        name = f"pictures/near-{place:02d}"
        nearest = copies.get(index, int(training[index].argmax()))
        _write(out / f"{name}.png", images[index])
        _write(out / f"{name}-training.png", open_image(evidence.trained_on[nearest].path))
        entry = Neighbors(
            prompt=prompts[index],
            image=f"{name}.png",
            training=f"{name}-training.png",
            training_similarity=round(float(training[index, nearest]), 6),
            is_copy=index in copies,
        )
        entries.append(entry if heldout is None else _with_heldout(entry, evidence, heldout[index], out, name))
    return entries


def _with_heldout(entry: Neighbors, evidence: Evidence, similarities: Tensor, out: Path, name: str) -> Neighbors:
    row = int(similarities.argmax())
    file = evidence.reference[row].request.file
    if file is None:
        return entry
    _write(out / f"{name}-heldout.png", open_image(file))
    nearest = {"heldout": f"{name}-heldout.png", "heldout_similarity": round(float(similarities[row]), 6)}
    return entry.model_copy(update=nearest)


def _sweep(evidence: Evidence, out: Path, strengths: Sequence[StrengthImages]) -> Sweep:
    requests = [images.request for images in evidence.with_trigger][: len(strengths[0].images)]
    texts = real = None
    if evidence.embedder is not None:
        texts = evidence.embedder.embed_texts([request.prompt_without_trigger for request in requests])
        real = embed_heldout(evidence, evidence.embedder).mean(dim=0)
    entries = []
    for place, strength in enumerate(strengths):
        names = []
        for index, image in enumerate(strength.images):
            names.append(f"pictures/strength-{place:02d}-{index}.png")
            _write(out / names[-1], to_image(image.float() / 127.5 - 1.0))
        vectors = _embed_each(evidence, strength.images)
        entries.append(
            Strength(
                strength=strength.strength,
                images=tuple(names),
                agreement=None if texts is None else round(float((vectors * texts).sum(dim=1).mean()), 6),
                likeness=None if real is None else round(float((vectors @ real).mean()), 6),
            )
        )
    zero = [strength.equals_base for strength in strengths if strength.strength == 0.0]
    return Sweep(
        prompts=tuple(request.prompt for request in requests),
        strengths=tuple(entries),
        zero_is_base=zero[0] if zero else None,
    )


def _embed_each(evidence: Evidence, images: Sequence[Tensor]) -> Tensor:
    if evidence.embedder is None:
        return torch.empty(len(images), 0)
    return torch.cat([evidence.embedder.embed_images(image[None].float() / 127.5 - 1.0) for image in images])


def _weights(health: dict[str, object]) -> ModuleWeights:
    # Six digits: further ones are rounding noise, which differs between machines.
    plain = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in health.items()}
    spectrum = [float(f"{value:.6g}") for value in health["spectrum"][:MAX_SPECTRUM]]  # type: ignore[index]
    return ModuleWeights.model_validate({**plain, "spectrum": spectrum})


def _write(path: Path, image: Image.Image) -> None:
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    write_image(path, image)
