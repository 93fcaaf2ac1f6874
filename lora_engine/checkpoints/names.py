"""Which tensor of an original single file is which tensor of a diffusers folder, and what differs between the two.

The one table that conversion and fusing share. It depends on a base's structure, not on its widths; it reads no file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lora_engine.bases.published import ComponentConfig, empty_module, published
from lora_engine.checkpoints.text_names import LEVEL, TRANSPOSED, canonical_text_name, open_clip_name
from lora_engine.checkpoints.vae_names import CONVOLUTIONS, vae_blocks, vae_name
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.files import canonical_json
from lora_engine.formats.ldm_names import UnetLayout, original_path

Change = Literal["none", "convolution", "transposed"]
AVERAGES = "model_ema."
ModuleNaming = Literal["unet", "vae", "clip", "open_clip"]


@dataclass(frozen=True)
class TensorName:
    """One tensor of a diffusers folder and its place in an original file.

    Attributes:
        component: Sub-folder of the diffusers folder: `unet`, `vae`, `text_encoder`, `text_encoder_2`.
        name: Tensor in that component, canonical: with the level `text_model`, in diffusers' present spelling.
        stored: Tensor in the original file.
        part: (place, number): the rows of the stored tensor are divided into so many equal parts, and this is one.
        change: `convolution`: stored as a 1x1 convolution [o, i, 1, 1], in the folder linear [o, i];
            `transposed`: the one is the other's transpose; `none`: the same numbers in the same shape.
    """

    component: str
    name: str
    stored: str
    part: tuple[int, int] = (0, 1)
    change: Change = "none"

    @property
    def module(self) -> str:
        """Canonical name of the layer that owns the tensor, as adapters name it."""
        return f"{self.component}.{self.name.rpartition('.')[0]}"

    def rows(self, stored_rows: int) -> tuple[int, int]:
        """First and last + 1 of the rows in a stored tensor of so many rows."""
        place, number = self.part
        return place * stored_rows // number, (place + 1) * stored_rows // number

    def folder_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the folder, given that of the whole stored tensor."""
        if self.change == "convolution":
            return stored[:2]
        if self.change == "transposed":
            return stored[::-1]
        return (stored[0] // self.part[1], *stored[1:]) if self.part[1] > 1 else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole stored tensor, given that in the folder."""
        if self.change == "convolution":
            return (*shape, 1, 1)
        if self.change == "transposed":
            return shape[::-1]
        return (shape[0] * self.part[1], *shape[1:]) if self.part[1] > 1 else shape


@dataclass(frozen=True)
class Place:
    """Where an original file keeps a component: the prefix of its names and the naming behind it."""

    prefix: str
    naming: ModuleNaming


_SHARED = {"unet": Place("model.diffusion_model.", "unet"), "vae": Place("first_stage_model.", "vae")}
_SD2 = {**_SHARED, "text_encoder": Place("cond_stage_model.model.", "open_clip")}
# By architecture, then by component.
PLACES: dict[str, dict[str, Place]] = {
    "sd15": {**_SHARED, "text_encoder": Place("cond_stage_model.transformer.", "clip")},
    "sd2": _SD2,
    "sd2-base": _SD2,
    "sdxl": {
        **_SHARED,
        "text_encoder": Place("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": Place("conditioner.embedders.1.model.", "open_clip"),
    },
}


def checkpoint_names(
    architecture: str, components: Mapping[str, ComponentConfig] | None = None
) -> tuple[TensorName, ...]:
    """Every tensor of an architecture: its name in a diffusers folder and its place in an original file.

    Args:
        architecture: `sd15`, `sd2`, `sd2-base` or `sdxl`.
        components: Settings of another structure (fewer blocks, other widths); None takes the published ones.

    Raises:
        SettingsError: An architecture whose original names are not known.
        BaseModelError: The settings give a tensor that the original layout has no name for.
    """
    places = places_of(architecture)
    configs = published[architecture].components if components is None else components
    return tuple(
        entry for component, place in places.items() for entry in _component_names(component, place, configs[component])
    )


def names_by_module(names: Iterable[TensorName]) -> dict[str, dict[str, TensorName]]:
    """For each layer, as adapters name it, its tensors by leaf: `weight`, `bias`."""
    found: dict[str, dict[str, TensorName]] = {}
    for entry in names:
        found.setdefault(entry.module, {})[entry.name.rpartition(".")[2]] = entry
    return found


def stored_name(entry: TensorName, names: Container[str], *, averaged: bool = False) -> str | None:
    """The name under which a given file stores a tensor, or None where it does not.

    Args:
        entry: The tensor.
        names: The names in the file.
        averaged: Whether the running average of the U-Net is wanted.
    """
    name = entry.stored
    if averaged and entry.component == "unet":
        # The averages are stored under the module's own names with all dots taken out.
        name = AVERAGES + name.removeprefix("model.").replace(".", "")
    # Files that were made with an early transformers lack the level.
    candidates = (name, name.replace(f".{LEVEL}", ".", 1))
    return next((candidate for candidate in candidates if candidate in names), None)


def places_of(architecture: str) -> dict[str, Place]:
    """Where an original file of the architecture keeps its components.

    Raises:
        SettingsError: An architecture whose original names are not known.
    """
    if architecture not in PLACES:
        raise SettingsError(
            f"the original names of {architecture!r} are not known",
            allowed=", ".join(PLACES),
            remedy="name the architecture that the file has",
        )
    return PLACES[architecture]


def tensor_shapes(component: str, config: ComponentConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every tensor that a component of a diffusers folder has.

    Args:
        component: Its name.
        config: Its class and settings.

    Raises:
        BaseModelError: The class does not accept the settings.
    """
    key = canonical_json({"library": config.library, "class": config.class_name, "config": dict(config.config)})
    return dict(_shapes(component, key.decode()))


@functools.lru_cache(maxsize=32)
def _shapes(component: str, key: str) -> dict[str, tuple[int, ...]]:
    told: dict[str, Any] = json.loads(key)
    try:
        module = empty_module(ComponentConfig(told["library"], told["class"], told["config"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{told['class']} does not accept the settings of {component!r}: {error}") from error
    text = component.startswith("text_encoder")
    named = ((canonical_text_name(name) if text else name, value) for name, value in module.state_dict().items())
    return {name: tuple(value.shape) for name, value in named if not is_buffer(name)}


def is_buffer(name: str) -> bool:
    """Whether a tensor is no weight, but a table that the code makes itself."""
    return name.endswith((".position_ids", ".attn_mask"))


def _component_names(component: str, place: Place, config: ComponentConfig) -> list[TensorName]:
    original = _path_naming(place, config)
    entries = []
    for name in tensor_shapes(component, config):
        entry = _entry(component, name, place, original)
        if entry is None:
            raise BaseModelError(
                f"the original layout has no name for the tensor {name!r}",
                where=component,
                allowed="the blocks of Stable Diffusion 1.x, 2.x and XL",
                remedy="keep this base as a diffusers folder",
            )
        entries.append(entry)
    return entries


def _path_naming(place: Place, config: ComponentConfig) -> Callable[[str], str | None]:
    """From diffusers' path of a module to the original one; text encoders name tensors instead."""
    if place.naming == "unet":
        return partial(original_path, layout=UnetLayout.of(config.config))
    if place.naming == "vae":
        return partial(vae_name, blocks=vae_blocks(config.config))
    return lambda path: None


def _entry(component: str, name: str, place: Place, original: Callable[[str], str | None]) -> TensorName | None:
    if place.naming == "clip":
        return TensorName(component, name, f"{place.prefix}{name}")
    if place.naming == "open_clip":
        told = open_clip_name(name)
        if told is None:
            return None
        change: Change = "transposed" if name == TRANSPOSED else "none"
        return TensorName(component, name, f"{place.prefix}{told[0]}", told[1], change)
    path, _, leaf = name.rpartition(".")
    stored = original(path)
    if stored is None:
        return None
    linear = place.naming == "vae" and ".attentions." in name and path.endswith(CONVOLUTIONS) and leaf == "weight"
    return TensorName(component, name, f"{place.prefix}{stored}.{leaf}", change="convolution" if linear else "none")
