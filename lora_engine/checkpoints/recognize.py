"""Recognizes the architecture of an original file by its tensor names, shapes and metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_engine.checkpoints.names import COMPONENT_LOCATIONS
from lora_engine.errors import BaseModelError
from lora_engine.families.proof import has_known_modules, recognize_family, titles

Prediction = Literal["epsilon", "v_prediction"]
_Shapes = Mapping[str, tuple[int, ...]]

_COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_UNET = "model.diffusion_model."
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_CONTEXT = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
# Input channels of the first convolution; 4 are the latents.
_CHANNELS = {
    4: "",
    5: "depth-to-image",
    7: "upscaler",
    8: "image editing (InstructPix2Pix)",
    9: "inpainting",
}
# Part of a tensor name to what the file is instead of a checkpoint.
_OTHERS = {
    "control_model.": "a ControlNet",
    "lora_": "an adapter, no checkpoint",
    ".lora_": "an adapter, no checkpoint",
    "down_blocks.": "one component of a diffusers folder",
    "text_model.encoder.": "one component of a diffusers folder",
}
_METADATA_PREDICTION: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
# Training steps in Stability AI's file of 2.0-base.
_BASE_STEPS = 875000


@dataclass(frozen=True)
class Recognized:
    """Properties of a recognized file.

    Attributes:
        architecture: `sd15`, `sd2`, `sd2-base` or `sdxl`.
        prediction: Prediction type of the U-Net.
        decided_by: Source of the prediction type, which names and shapes never show.
        variant: Empty, or `inpainting` for a U-Net that also reads a mask and a masked image.
        zero_snr: True if the file is marked for a schedule that ends in pure noise.
    """

    architecture: str
    prediction: Prediction
    decided_by: str
    variant: str = ""
    zero_snr: bool = False


def recognize(
    shapes: _Shapes,
    metadata: Mapping[str, str],
    where: str,
    *,
    architecture: str | None = None,
    prediction: Prediction | None = None,
    steps: int | None = None,
) -> Recognized:
    """Recognizes an original file.

    Args:
        shapes: Tensor name to shape.
        metadata: Metadata of the file.
        where: The file, for errors.
        architecture: Requested architecture; None detects it from the names.
        prediction: Requested prediction type; None detects it.
        steps: `global_step` of a `.ckpt`.

    Raises:
        BaseModelError: The file cannot be converted; names what it seems to be.
    """
    detected = architecture or _architecture(shapes, where)
    variant = _variant(shapes, where)
    predicted, reason = _prediction(detected, architecture, shapes, metadata, prediction, steps)
    if detected in ("sd2", "sd2-base"):
        detected = "sd2" if predicted == "v_prediction" else "sd2-base"
    return Recognized(detected, predicted, reason, variant, "ztsnr" in shapes)


def component_of(path: Path, names: Collection[str]) -> str:
    """Returns the component that a file or folder of a diffusers folder is, by its folder's name or its tensors.

    Raises:
        BaseModelError: Neither shows it.
    """
    for candidate in (path, path.parent):
        if candidate.name in _COMPONENTS:
            return candidate.name
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in names):
        return "unet"
    if any(name.startswith(("text_model.", "encoder.layers.", "encoder.block.")) for name in names):
        return "text_encoder"
    if has_known_modules(name.rpartition(".")[0].replace(".", "_") for name in names):
        return "transformer"
    raise BaseModelError(
        "the component of the model cannot be inferred",
        where=str(path),
        allowed=", ".join(_COMPONENTS),
        remedy="name its folder after the component, or pass a diffusers folder",
    )


def _architecture(shapes: _Shapes, where: str) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    has_second = has("conditioner.embedders.1.")
    if has("conditioner.embedders.0.model.") and not has_second:
        raise _unusable(
            "this is the refiner of SDXL, whose one text encoder is the second of the base", where, "the base of SDXL"
        )
    if has_second or has("conditioner.embedders.0."):
        return "sdxl"
    if has("cond_stage_model.model."):
        return "sd2"
    if has("cond_stage_model.transformer."):
        return "sd15"
    if has(_UNET) and _CONV_IN in shapes:
        # Without text encoders, the U-Net identifies the architecture, so the missing tensors can be listed.
        if f"{_UNET}label_emb.0.0.weight" in shapes:
            return "sdxl"
        return "sd2" if shapes.get(_CONTEXT, (0,))[-1] == 1024 else "sd15"
    raise _unusable(f"the file is no original checkpoint; {_guess(shapes)}", where)


def _guess(names: _Shapes) -> str:
    modules = {name.removeprefix(_UNET).rpartition(".")[0].replace(".", "_"): None for name in names}
    possible = recognize_family(modules).families
    if possible:
        return f"it is {titles(possible)}"
    for part, description in _OTHERS.items():
        count = sum(part in name for name in names)
        if count:
            return f"by {count} of its {len(names)} names it is {description}"
    first = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"its {len(names)} tensors begin with {first}" if names else "it holds no tensor"


def _variant(shapes: _Shapes, where: str) -> str:
    channels = shapes.get(_CONV_IN, (0, 4))[1:2]
    known = _CHANNELS.get(channels[0] if channels else 0)
    if known in ("", "inpainting"):
        return known or ""
    description = f"a model for {known}" if known else f"a U-Net that reads {channels} channels"
    raise _unusable(f"this is {description}", where)


def _prediction(
    architecture: str,
    requested_architecture: str | None,
    shapes: _Shapes,
    metadata: Mapping[str, str],
    requested: Prediction | None,
    steps: int | None,
) -> tuple[Prediction, str]:
    if requested is not None:
        return requested, "requested"
    if requested_architecture in ("sd2", "sd2-base"):
        predicted: Prediction = "v_prediction" if architecture == "sd2" else "epsilon"
        return predicted, f"{requested_architecture!r} was requested"
    return _detected_prediction(architecture, shapes, metadata, steps)


def _detected_prediction(
    architecture: str, shapes: _Shapes, metadata: Mapping[str, str], steps: int | None
) -> tuple[Prediction, str]:
    stated = _METADATA_PREDICTION.get(metadata.get("modelspec.prediction_type", ""))
    if stated:
        return stated, "the file's metadata (modelspec.prediction_type)"
    if "v_pred" in shapes:
        return "v_prediction", "the file's tensor 'v_pred'"
    if architecture in ("sd2", "sd2-base"):
        if steps == _BASE_STEPS:
            return "epsilon", f"the file's {steps} training steps, those of 2.0-base"
        return (
            "v_prediction",
            "the default of SD 2, as the file does not state it; request 'sd2-base' if it predicts noise",
        )
    return "epsilon", f"the published setting of {architecture}"


def _unusable(problem: str, where: str, allowed: str = "") -> BaseModelError:
    return BaseModelError(
        problem,
        where=where,
        allowed=allowed
        or f"an original single file of {', '.join(COMPONENT_LOCATIONS)}, with 4 channels or 9 (inpainting)",
        remedy="use another file",
    )
