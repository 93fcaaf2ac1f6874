"""Maps the tensors of an original single file to those of a diffusers folder.

Conversion and fusion share this table. It depends on a base's structure, not on its widths, and needs no file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lora_engine.adapters.published import empty_module
from lora_engine.checkpoints.text_names import LEVEL, TRANSPOSED, canonical_text_name, open_clip_name
from lora_engine.checkpoints.vae_names import VAE_CONVOLUTIONS, vae_blocks, vae_name
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.families import ComponentConfig, published
from lora_engine.families.family import ComponentLocation, UnetLayout
from lora_engine.files import canonical_json
from lora_engine.formats.ldm_names import original_path

ShapeChange = Literal["none", "convolution", "transposed"]
AVERAGES = "model_ema."


@dataclass(frozen=True)
class TensorName:
    """A tensor of a diffusers folder and its location in an original file.

    Attributes:
        component: Subfolder of the diffusers folder: `unet`, `vae`, `text_encoder`, `text_encoder_2`.
        name: Canonical tensor name in the component: diffusers' current name, with the level `text_model`.
        stored: Tensor name in the original file.
        part: (index, count): the tensor is one of `count` equal row blocks of the stored tensor.
        change: `convolution`: stored as a 1x1 convolution [o, i, 1, 1], linear [o, i] in the folder;
            `transposed`: stored transposed; `none`: same values and shape.
    """

    component: str
    name: str
    stored: str
    part: tuple[int, int] = (0, 1)
    change: ShapeChange = "none"

    @property
    def module(self) -> str:
        """Canonical name of the tensor's module, as in adapters."""
        return f"{self.component}.{self.name.rpartition('.')[0]}"

    def rows(self, stored_rows: int) -> tuple[int, int]:
        """Returns the first row and the end row (exclusive) in a stored tensor with `stored_rows` rows."""
        index, count = self.part
        return index * stored_rows // count, (index + 1) * stored_rows // count

    def folder_shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the folder for the shape of the stored tensor."""
        if self.change == "convolution":
            return stored[:2]
        if self.change == "transposed":
            return stored[::-1]
        return (stored[0] // self.part[1], *stored[1:]) if self.part[1] > 1 else stored

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor for the shape in the folder."""
        if self.change == "convolution":
            return (*shape, 1, 1)
        if self.change == "transposed":
            return shape[::-1]
        return (shape[0] * self.part[1], *shape[1:]) if self.part[1] > 1 else shape


COMPONENT_LOCATIONS: dict[str, Mapping[str, ComponentLocation]] = {
    name: architecture.file for name, architecture in published.items() if architecture.file
}
"""By architecture, then by component."""


def checkpoint_names(
    architecture: str, components: Mapping[str, ComponentConfig] | None = None
) -> tuple[TensorName, ...]:
    """Returns every tensor of an architecture with its name in a diffusers folder and in an original file.

    Args:
        architecture: `sd15`, `sd2`, `sd2-base` or `sdxl`.
        components: Settings of another structure (fewer blocks, other widths); None uses the published ones.

    Raises:
        SettingsError: The original names of the architecture are unknown.
        BaseModelError: The settings give a tensor without a name in the original layout.
    """
    locations = component_locations(architecture)
    configs = published[architecture].components if components is None else components
    return tuple(
        entry
        for component, location in locations.items()
        for entry in component_names(component, location, configs[component])
    )


def names_by_module(names: Iterable[TensorName]) -> dict[str, dict[str, TensorName]]:
    """Returns, for each module name of adapters, its tensors by leaf: `weight`, `bias`."""
    modules: dict[str, dict[str, TensorName]] = {}
    for entry in names:
        modules.setdefault(entry.module, {})[entry.name.rpartition(".")[2]] = entry
    return modules


def stored_name(entry: TensorName, names: Container[str], *, averaged: bool = False) -> str | None:
    """Returns the name of a tensor in a file, or None if the file lacks it.

    Args:
        entry: The tensor.
        names: Tensor names in the file.
        averaged: True looks for the running average of the U-Net.
    """
    name = entry.stored
    if averaged and entry.component == "unet":
        # Averages are stored under the module's names without dots.
        name = AVERAGES + name.removeprefix("model.").replace(".", "")
    # Files made with an early transformers lack the level `text_model`.
    candidates = (name, name.replace(f".{LEVEL}", ".", 1))
    return next((candidate for candidate in candidates if candidate in names), None)


def component_locations(architecture: str) -> Mapping[str, ComponentLocation]:
    """Returns the location of each component in an original file of the architecture.

    Raises:
        SettingsError: The original names of the architecture are unknown.
    """
    if architecture not in COMPONENT_LOCATIONS:
        raise SettingsError(
            f"the original names of {architecture!r} are unknown",
            allowed=", ".join(COMPONENT_LOCATIONS),
            remedy="name the architecture of the file",
        )
    return COMPONENT_LOCATIONS[architecture]


def tensor_shapes(component: str, config: ComponentConfig) -> dict[str, tuple[int, ...]]:
    """Returns canonical name to shape of every tensor of a component of a diffusers folder.

    Args:
        component: Name of the component.
        config: Its class and settings.

    Raises:
        BaseModelError: The class does not accept the settings.
    """
    key = canonical_json({"library": config.library, "class": config.class_name, "config": dict(config.config)})
    return dict(_shapes(component, key.decode()))


@functools.lru_cache(maxsize=32)
def _shapes(component: str, key: str) -> dict[str, tuple[int, ...]]:
    entry: dict[str, Any] = json.loads(key)
    try:
        module = empty_module(ComponentConfig(entry["library"], entry["class"], entry["config"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise BaseModelError(f"{entry['class']} does not accept the settings of {component!r}: {error}") from error
    is_text = component.startswith("text_encoder")
    named = ((canonical_text_name(name) if is_text else name, value) for name, value in module.state_dict().items())
    return {name: tuple(value.shape) for name, value in named if not is_buffer(name)}


def is_buffer(name: str) -> bool:
    """Returns True if a tensor is no weight, but a table that the code computes."""
    return name.endswith((".position_ids", ".attn_mask"))


def component_names(component: str, location: ComponentLocation, config: ComponentConfig) -> list[TensorName]:
    """Returns every tensor of a component with its name in an original file.

    Args:
        component: Name of the component.
        location: Its place and naming in the file.
        config: Its class and settings.

    Raises:
        BaseModelError: The settings give a tensor without a name in the original layout.
    """
    original = _path_naming(location, config)
    entries = []
    for name in tensor_shapes(component, config):
        entry = _entry(component, name, location, original)
        if entry is None:
            raise BaseModelError(
                f"the original layout has no name for the tensor {name!r}",
                where=component,
                allowed="the blocks of Stable Diffusion 1.x, 2.x and XL",
                remedy="keep this base as a diffusers folder",
            )
        entries.append(entry)
    return entries


def _path_naming(location: ComponentLocation, config: ComponentConfig) -> Callable[[str], str | None]:
    """Returns the function from diffusers' module path to the original one; text encoders map tensors instead."""
    if location.naming == "unet":
        return partial(original_path, layout=UnetLayout.of(config.config))
    if location.naming == "vae":
        return partial(vae_name, blocks=vae_blocks(config.config))
    return lambda path: None


def _entry(
    component: str, name: str, location: ComponentLocation, original: Callable[[str], str | None]
) -> TensorName | None:
    if location.naming == "clip":
        return TensorName(component, name, f"{location.prefix}{name}")
    if location.naming == "open_clip":
        stored_part = open_clip_name(name)
        if stored_part is None:
            return None
        change: ShapeChange = "transposed" if name == TRANSPOSED else "none"
        return TensorName(component, name, f"{location.prefix}{stored_part[0]}", stored_part[1], change)
    path, _, leaf = name.rpartition(".")
    stored = original(path)
    if stored is None:
        return None
    is_convolution = (
        location.naming == "vae" and ".attentions." in name and path.endswith(VAE_CONVOLUTIONS) and leaf == "weight"
    )
    return TensorName(
        component, name, f"{location.prefix}{stored}.{leaf}", change="convolution" if is_convolution else "none"
    )
