"""Which architecture an original file has, by the names and shapes of its tensors, and what its metadata add."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from lora_engine.checkpoints.names import PLACES
from lora_engine.errors import BaseModelError

Prediction = Literal["epsilon", "v_prediction"]
Shapes = Mapping[str, tuple[int, ...]]

_UNET = "model.diffusion_model."
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_CONTEXT = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
# Channels that the first convolution reads: 4 are the latents.
_CHANNELS = {
    4: "",
    5: "depth-to-image",
    7: "upscaler",
    8: "picture editing (InstructPix2Pix)",
    9: "inpainting",
}
# What else a single file may be: part of a name, and what it tells.
_OTHERS = {
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
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
# Steps of training that Stability AI's file of 2.0-base carries.
_BASE_STEPS = 875000


@dataclass(frozen=True)
class Recognised:
    """What a file is.

    Attributes:
        architecture: `sd15`, `sd2`, `sd2-base` or `sdxl`.
        prediction: What the U-Net predicts.
        decided_by: What told the prediction, which names and shapes never tell.
        variant: Empty, or `inpainting` for a U-Net that also reads a mask and a masked picture.
        zero_snr: Whether the file is marked for a schedule that ends in pure noise.
    """

    architecture: str
    prediction: Prediction
    decided_by: str
    variant: str = ""
    zero_snr: bool = False


def recognize(
    shapes: Shapes,
    metadata: Mapping[str, str],
    where: str,
    *,
    architecture: str | None = None,
    prediction: Prediction | None = None,
    steps: int | None = None,
) -> Recognised:
    """What an original file is.

    Args:
        shapes: Name to shape of its tensors.
        metadata: Of the file.
        where: The file, for errors.
        architecture: As the caller knows it; None looks at the names.
        prediction: As the caller knows it.
        steps: `global_step` of a `.ckpt`.

    Raises:
        BaseModelError: Nothing that can be converted; says what it seems to be.
    """
    told = architecture or _architecture(shapes, where)
    variant = _variant(shapes, where)
    what, why = _prediction(told, architecture, shapes, metadata, prediction, steps)
    if told in ("sd2", "sd2-base"):
        told = "sd2" if what == "v_prediction" else "sd2-base"
    return Recognised(told, what, why, variant, "ztsnr" in shapes)


def _architecture(shapes: Shapes, where: str) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    second = has("conditioner.embedders.1.")
    if has("conditioner.embedders.0.model.") and not second:
        raise _unusable(
            "this is the refiner of SDXL, whose one text encoder is the second of the base", where, "the base of SDXL"
        )
    if second or has("conditioner.embedders.0."):
        return "sdxl"
    if has("cond_stage_model.model."):
        return "sd2"
    if has("cond_stage_model.transformer."):
        return "sd15"
    if has(_UNET) and _CONV_IN in shapes:
        # No text encoder at all: the U-Net tells what the file is a part of, so that it can be said what lacks.
        if f"{_UNET}label_emb.0.0.weight" in shapes:
            return "sdxl"
        return "sd2" if shapes.get(_CONTEXT, (0,))[-1] == 1024 else "sd15"
    raise _unusable(f"the file is no original checkpoint; {_guess(shapes)}", where)


def _guess(names: Collection[str]) -> str:
    for part, what in _OTHERS.items():
        count = sum(part in name for name in names)
        if count:
            return f"by {count} of its {len(names)} names it is {what}"
    first = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"its {len(names)} tensors begin with {first}" if names else "it holds no tensor"


def _variant(shapes: Shapes, where: str) -> str:
    channels = shapes.get(_CONV_IN, (0, 4))[1:2]
    known = _CHANNELS.get(channels[0] if channels else 0)
    if known in ("", "inpainting"):
        return known or ""
    what = f"a model for {known}" if known else f"a U-Net that reads {channels} channels"
    raise _unusable(f"this is {what}", where)


def _prediction(
    told: str,
    asked_architecture: str | None,
    shapes: Shapes,
    metadata: Mapping[str, str],
    asked: Prediction | None,
    steps: int | None,
) -> tuple[Prediction, str]:
    if asked is not None:
        return asked, "asked for"
    if asked_architecture in ("sd2", "sd2-base"):
        return ("v_prediction" if told == "sd2" else "epsilon"), f"asked for {asked_architecture!r}"
    return _told_prediction(told, shapes, metadata, steps)


def _told_prediction(
    told: str, shapes: Shapes, metadata: Mapping[str, str], steps: int | None
) -> tuple[Prediction, str]:
    named = _METADATA_PREDICTION.get(metadata.get("modelspec.prediction_type", ""))
    if named:
        return named, "the file's metadata (modelspec.prediction_type)"
    if "v_pred" in shapes:
        return "v_prediction", "the file's tensor 'v_pred'"
    if told in ("sd2", "sd2-base"):
        if steps == _BASE_STEPS:
            return "epsilon", f"the file's {steps} steps of training, those of 2.0-base"
        return "v_prediction", "nothing in the file: most of SD 2 are; ask for 'sd2-base' if it predicts the noise"
    return "epsilon", f"what {told} was published with"


def _unusable(problem: str, where: str, allowed: str = "") -> BaseModelError:
    return BaseModelError(
        problem,
        where=where,
        allowed=allowed or f"an original single file of {', '.join(PLACES)}, with 4 channels or 9 (inpainting)",
        remedy="take another file, or keep this one as it is",
    )
