"""Fields, defaults and neutral values of A1111's requests for images. Unknown fields are ignored, as there.

A field that would change the image and that Loraline cannot honor is refused unless it has a neutral value.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.web.a1111_infotext import fill_unset
from lora_engine.errors import SettingsError
from lora_engine.inference.infotext import MAX_INFOTEXT

Finite = Annotated[float, Field(allow_inf_nan=False)]
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "eta": (0, 1),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "refiner_checkpoint": ("", "None"),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "initial_noise_multiplier": (1,),
    "hr_additional_modules": ([], ["Use same choices"]),
}
"""Fields that Loraline cannot honor -> the values that change nothing. Absent and null are always neutral."""
_NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("", "None", "Automatic"),
    "eta_noise_seed_delta": (0,),
    "eta_ddim": (0,),
    "eta_ancestral": (1,),
    "initial_noise_multiplier": (1,),
    "sd_lora": ("", "None"),
    "sd_hypernetwork": ("", "None"),
    "token_merging_ratio": (0,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "img2img_color_correction": (False,),
    "face_restoration": (False,),
    "tiling": (False,),
}
"""The same for `override_settings`."""
_HONORED_SETTINGS = {"sd_model_checkpoint", "CLIP_stop_at_last_layers"}
_LATENT = "Latent"


class LoraEntry(BaseModel):
    """An adapter beside the prompt, as stable-diffusion.cpp and the `loras` of other servers write it."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field("", max_length=200, description="`name@version`, `name@alias` or `name`.")
    path: str = Field("", max_length=200, description="The same, for clients that send the path of `/sdapi/v1/loras`.")
    weight: Finite | None = Field(None, description="1 if it is absent.")
    multiplier: Finite | None = Field(None, description="The same.")
    scale: Finite | None = Field(None, description="The same.")

    def reference(self) -> str:
        """Returns the adapter's reference."""
        return self.name or self.path

    def factor(self) -> float:
        """Returns its weight."""
        return next((value for value in (self.weight, self.multiplier, self.scale) if value is not None), 1.0)


class ImageBody(BaseModel):
    """Fields that txt2img and img2img share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, le=2**63 - 1, description="-1 draws one.")
    subseed: int = Field(-1, ge=-1, le=2**63 - 1, description="Seed of the variation; -1 draws one.")
    subseed_strength: Finite = Field(0.0, ge=0.0, le=1.0, description="Share of the variation; 0 has none.")
    seed_resize_from_w: int = Field(-1, ge=-1, le=16_384, description="Width whose noise is used; needs the height.")
    seed_resize_from_h: int = Field(-1, ge=-1, le=16_384, description="Height whose noise is used; needs the width.")
    steps: int = Field(50, ge=1, le=1000)
    cfg_scale: Finite = 7.0
    width: int = Field(512, ge=1, le=8192)
    height: int = Field(512, ge=1, le=8192)
    batch_size: int = Field(1, ge=1, le=1000)
    n_iter: int = Field(1, ge=1, le=1000)
    sampler_name: str = Field("", description="With or without a schedule type, such as `DPM++ 2M Karras`.")
    sampler_index: str = Field("Euler", description="Used if `sampler_name` is absent.")
    scheduler: str = ""
    denoising_strength: Finite = Field(0.75, ge=0.0, le=1.0)
    override_settings: dict[str, Any] = Field(default_factory=dict)
    send_images: bool = True
    save_images: bool = False
    script_name: str = ""
    script_args: list[Any] = Field(default_factory=list)
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)
    infotext: str = Field("", max_length=MAX_INFOTEXT, description="Fills the fields that the request leaves unset.")
    force_task_id: str = ""
    lora: list[LoraEntry] = Field(default_factory=list, max_length=100)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """Takes null for a field that is absent, and fills absent fields from the infotext, as A1111 does."""
        if not isinstance(data, dict):
            return data
        values = {key: value for key, value in data.items() if value is not None}
        text = values.get("infotext")
        return fill_unset(values, text) if isinstance(text, str) and len(text) <= MAX_INFOTEXT else values

    @model_validator(mode="after")
    def check_text(self) -> Self:
        """Refuses text that is no valid Unicode: JSON can escape half of a character."""
        for name in ("prompt", "negative_prompt", "infotext"):
            if any("\ud800" <= character <= "\udfff" for character in getattr(self, name)):
                raise ValueError(f"{name} has half of a surrogate pair")
        return self

    @property
    def count(self) -> int:
        """Number of images."""
        return self.batch_size * self.n_iter

    @property
    def clip_skip(self) -> int | None:
        """The layer of `CLIP_stop_at_last_layers`; None for 1, which clients always send."""
        value = str(self.override_settings.get("CLIP_stop_at_last_layers", 1))
        if not re.fullmatch(r"([1-9]|1[0-2])(\.0)?", value):
            raise SettingsError(
                f"CLIP_stop_at_last_layers is {value[:40]!r}", where="override_settings", allowed="1 to 12"
            )
        return None if float(value) == 1 else int(float(value))

    def require_neutral(self) -> None:
        """Raises `SettingsError` if a field that cannot be honored has a value that would change the image."""
        extra = self.model_extra or {}
        _check_neutral(extra, _NEUTRAL, "")
        _check_neutral(self.override_settings, _NEUTRAL_SETTINGS, "override_settings")

    def ignored(self) -> list[str]:
        """Returns the names of fields and settings of the request that have no effect, for the answer."""
        settings = self.override_settings.keys() - _NEUTRAL_SETTINGS.keys() - _HONORED_SETTINGS
        fields = (self.model_extra or {}).keys() - _NEUTRAL.keys()
        return sorted(name[:80] for name in fields) + sorted(f"override_settings.{name[:80]}" for name in settings)


class TextToImageBody(ImageBody):
    """Fields of txt2img."""

    enable_hr: bool = False
    hr_scale: Finite = Field(2.0, ge=0, le=100)
    hr_upscaler: str = Field(_LATENT, description="Enlarged images are always scaled with Lanczos.")
    hr_second_pass_steps: int = Field(0, ge=0, le=1000, description="0 or `steps`.")
    hr_resize_x: int = Field(0, ge=0, le=16_384)
    hr_resize_y: int = Field(0, ge=0, le=16_384)

    def enlarge(self) -> float:
        """Returns the factor by which images are enlarged; 1 does not.

        Raises:
            SettingsError: The upscaler, the second number of steps or the ratio of the sides cannot be honored.
        """
        if not self.enable_hr:
            return 1.0
        if self.hr_upscaler not in {"", "None", "Lanczos"} and not self.hr_upscaler.startswith(_LATENT):
            raise SettingsError(f"hr_upscaler is {self.hr_upscaler[:60]!r}", allowed="Lanczos")
        if self.hr_second_pass_steps not in {0, self.steps}:
            raise SettingsError(f"hr_second_pass_steps is {self.hr_second_pass_steps}", allowed=f"0 or {self.steps}")
        factors = {
            wanted / side
            for wanted, side in ((self.hr_resize_x, self.width), (self.hr_resize_y, self.height))
            if wanted
        }
        if len(factors) > 1:
            raise SettingsError(
                f"hr_resize is {self.hr_resize_x} x {self.hr_resize_y} for {self.width} x {self.height} pixels",
                allowed="sides in the same ratio, or one of them",
            )
        return factors.pop() if factors else self.hr_scale


class ImageToImageBody(ImageBody):
    """Fields of img2img."""

    init_images: list[str] = Field(default_factory=list, max_length=10)
    mask: str = ""
    mask_blur: Finite = Field(4, ge=0, le=256)
    mask_blur_x: Finite | None = Field(None, ge=0, le=256)
    mask_blur_y: Finite | None = Field(None, ge=0, le=256)
    inpainting_fill: int = Field(0, ge=0, le=3, description="0 fills, 1 keeps the original; 2 and 3 are refused.")
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(0, ge=0, le=4096)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    resize_mode: int = Field(0, ge=0, le=3, description="0 stretches, 1 cuts, 2 repeats the border; 3 is refused.")
    include_init_images: bool = False


def require_no_scripts(body: ImageBody) -> None:
    """Raises `SettingsError` if the request names a script; there are none."""
    if body.script_name not in {"", "None"}:
        raise SettingsError(f"Script {body.script_name[:60]!r} not found", allowed="no scripts")
    if body.alwayson_scripts:
        name = next(iter(body.alwayson_scripts))
        raise SettingsError(f"always on script {name[:60]!r} not found", allowed="no scripts")


def _check_neutral(values: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    for name, value in values.items():
        allowed = neutral.get(name)
        if allowed is None or value is None or any(value == each for each in allowed):
            continue
        raise SettingsError(
            f"{name} is {str(value)[:60]!r}, which cannot be honored",
            where=where,
            allowed=", ".join(map(repr, allowed)),
            remedy=f"leave {name} out",
        )
