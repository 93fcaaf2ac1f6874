"""Fields of OpenAI's image endpoints, and what Loraline takes beside them; any other field is refused."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.web.a1111_models import LoraEntry
from lora_engine.errors import SettingsError
from lora_engine.inference import ImageFormat
from lora_engine.inference.image_files import ImageOptions
from tasks.operations.draw_request import DrawRequest, parse_size
from tasks.serving.catalog import ServedBase, adapter_tag, resolve_labels

if TYPE_CHECKING:
    from registry.home import Home

_AUTO = "auto"
_MAX_SEED = 2**32
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class UnknownModel(SettingsError):
    """A model that is neither the base nor the name of an adapter."""


class GenerationBody(BaseModel):
    """Fields of `/v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, max_length=10_000, description="In A1111's syntax; may name adapters.")
    model: str | None = Field(None, max_length=200, description="The base, or an adapter with weight 1.")
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = Field(_AUTO, max_length=20, description="WIDTHxHEIGHT, or `auto` for the base's own.")
    response_format: Literal["b64_json", "url"] | None = Field("b64_json", description="`url` is refused.")
    output_format: ImageFormat | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP; null is 100, and WebP of 100 has no loss."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field("auto", description="Not `transparent`.")
    quality: Quality | None = Field("auto", description="Ignored: `steps` sets it.")
    style: str | None = Field(None, max_length=100, description="Ignored.")
    moderation: Literal["low", "auto"] | None = Field(None, description="Ignored: the server has a safety hook.")
    user: str | None = Field(None, max_length=200, description="Ignored.")
    safety_identifier: str | None = Field(None, max_length=200, description="Ignored.")
    stream: bool | None = Field(False, description="True answers with server-sent events.")
    partial_images: int | None = Field(0, ge=0, le=3, description="Previews in a stream.")
    seed: int | None = Field(None, ge=0, le=2**62, description="Loraline's; null draws one.")
    steps: int = Field(20, ge=1, le=1000, description="Loraline's.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="The same.")
    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] = Field(3.0, ge=0, le=100, description="Loraline's.")
    negative_prompt: str = Field("", max_length=10_000, description="Loraline's.")
    sampler: str | None = Field(None, max_length=100, description="Loraline's.")
    loras: list[LoraEntry] = Field(default_factory=list, max_length=100, description="Loraline's.")

    @model_validator(mode="after")
    def check_text(self) -> Self:
        """Refuses text that is no valid Unicode: JSON can escape half of a character."""
        for name in ("prompt", "negative_prompt", "sampler", "model"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name) or ""):
                raise ValueError(f"{name} has half of a surrogate pair")
        return self

    @property
    def count(self) -> int:
        """Number of images."""
        return self.n or 1

    def options(self) -> ImageOptions:
        """Returns format and quality of the answer's images."""
        quality = 100 if self.output_compression is None else max(1, self.output_compression)
        return ImageOptions(self.output_format or "png", quality)

    def pixels(self) -> tuple[int, int] | None:
        """Returns (height, width); None for `auto`.

        Raises:
            SettingsError: It is neither.
        """
        return None if self.size in {None, _AUTO} else parse_size(str(self.size))

    def to_request(self, base: ServedBase, home: Home) -> DrawRequest:
        """Returns the request of the service.

        Raises:
            UnknownModel: The model is neither the base nor the name of an adapter.
            SettingsError: A field cannot be honored.
        """
        self._require_honored()
        adapters = [adapter_tag(entry.reference(), entry.factor()) for entry in self.loras]
        if self.model and not base.is_named(self.model):
            try:
                adapters.insert(0, adapter_tag(self.model, 1.0))
            except SettingsError:
                raise UnknownModel(
                    f"the model {self.model[:80]!r} does not exist", where="model", allowed="those of /v1/models"
                ) from None
        return DrawRequest(
            resolve_labels(" ".join([self.prompt, *adapters]), home),
            negative=self.negative_prompt,
            count=self.count,
            seed=secrets.randbelow(_MAX_SEED) if self.seed is None else self.seed,
            steps=self.num_inference_steps or self.steps,
            guidance=self.guidance_scale,
            size=self.pixels(),
            sampler=self.sampler,
        )

    def _require_honored(self) -> None:
        refused = {
            "response_format": (self.response_format == "url", "b64_json"),
            "output_compression": (
                self.options().format == "png" and self.output_compression not in {None, 100},
                "100 for PNG, which has no loss",
            ),
            "background": (self.background == "transparent", "auto, opaque"),
        }
        for name, (is_refused, allowed) in refused.items():
            if is_refused:
                raise SettingsError(f"{name} is {getattr(self, name)!r}", where=name, allowed=allowed)


class EditBody(GenerationBody):
    """Fields of `/v1/images/edits`, without the files."""

    input_fidelity: Literal["low", "high"] | None = Field(None, description="Ignored: `strength` sets it.")
    strength: Annotated[float, Field(allow_inf_nan=False)] = Field(
        0.75, ge=0.01, le=1, description="Loraline's; share of the steps that run on the image."
    )


class VariationBody(EditBody):
    """Fields of `/v1/images/variations`, without the file."""

    prompt: str = Field("", max_length=10_000, description="Loraline's; OpenAI's variations have none.")
