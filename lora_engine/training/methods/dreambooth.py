"""DreamBooth (Ruiz et al. 2023): one phase on the user's images and on class images."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from lora_engine.training.methods.context import Method, MethodContext
from lora_engine.training.specs.methods import MethodSpec

if TYPE_CHECKING:
    from lora_engine.training.phases import Phase


class Dreambooth(MethodSpec):
    """DreamBooth: a rare word for the subject, and class images that preserve the class (see `Prior`)."""

    uses_class_images: ClassVar[bool] = True
    name: Literal["dreambooth"] = "dreambooth"


def _phases(context: MethodContext) -> list[Phase]:
    from lora_engine.training.denoising import denoising_phase

    return [denoising_phase(context, "dreambooth")]


DREAMBOOTH = Method(Dreambooth, "a rare word for a subject, with class images that preserve its class", _phases)
