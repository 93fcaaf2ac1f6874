"""PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in one folder per component.

A single component is stored in the folder itself. Several components are stored in subfolders with their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from lora_engine.adapters import Adapter, Delta, canonical_name
from lora_engine.catalog import formats as catalog
from lora_engine.errors import AdapterError
from lora_engine.families.names import TRANSFORMER
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.codec import AlphaRule, Names, Part, TensorCodec
from lora_engine.formats.diffusers import without_core
from lora_engine.formats.key_layout import PEFT_KEYS
from lora_engine.formats.key_layouts.ia3 import with_shaped_gains
from lora_engine.formats.key_layouts.lora import with_scaled_bias
from lora_engine.formats.lora_config import alpha_of, parse_config
from lora_engine.formats.native import COMPONENTS
from lora_engine.formats.peft_embeddings import with_embedding_names
from lora_engine.formats.peft_types import settings_for, type_of, with_config
from lora_engine.formats.raw_file import CONFIG_FILE, PEFT_PREFIX
from lora_engine.formats.transformers.names import is_transformer
from lora_engine.formats.validate import check_delta

if TYPE_CHECKING:
    from torch import Tensor

COMPONENT = "loraline.component"
_COMPONENT_PATTERNS = {
    "unet": r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b.*",
    "text_encoder": r"(text_model\.)?encoder\.layers\..*",
}
# transformers 5 has no level `text_model` in `CLIPTextModel`, but in `CLIPTextModelWithProjection`.
_WITHOUT_LEVEL = ("text_encoder",)


class PeftCodec(TensorCodec):
    """`base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight`."""

    format = catalog.PEFT
    embeddings: ClassVar[str] = "diffusers"
    key_layout = PEFT_KEYS

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names have PEFT's prefix."""
        return bool(keys) and all(key.rpartition("/")[2].startswith(PEFT_PREFIX) for key in keys)

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns canonical names; the component is the folder's name, or inferred from the modules."""
        split = {name: _split(name) for name in raw}
        # A model of several components, such as a wrapper around U-Net and text encoder, has them in its names.
        named = {name: path for name, (folder, path) in split.items() if not folder and path.startswith(COMPONENTS)}
        alone = [path for name, (folder, path) in split.items() if not folder and name not in named]
        component = _component(alone, metadata, known)
        for folder in sorted({folder for folder, _ in split.values() if folder}):
            _check_component(folder, f"folder {folder!r}")
        return {
            name: canonical_name(*path.split(".", 1)) if name in named else canonical_name(folder or component, path)
            for name, (folder, path) in split.items()
        }

    def alpha_rule(self, metadata: Mapping[str, str]) -> AlphaRule:
        """Returns the rule that reads alpha from the configuration in the same folder, or else from the header."""
        if not any(key.endswith(CONFIG_FILE) for key in metadata):
            return super().alpha_rule(metadata)
        read_config = cache(lambda where: parse_config(metadata.get(where, "{}"), where))

        def alpha(raw: str, rank: int | None) -> float | None:
            folder, path = _split(raw)
            where = f"{folder}/{CONFIG_FILE}" if folder else CONFIG_FILE
            config = read_config(where)
            peft_type = type_of(config, where)
            return alpha_of(config, path, rank, where, peft_type.alpha) if peft_type.alpha else None

        return alpha

    def _parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Part]:
        """Returns the modules, with the configuration in the same folder applied."""
        parts = super()._parts(tensors, metadata)
        configs: dict[str, dict[str, Any]] = {}
        for raw, part in parts.items():
            folder, path = _split(raw)
            where = f"{folder}/{CONFIG_FILE}" if folder else CONFIG_FILE
            if where not in configs:
                configs[where] = parse_config(metadata.get(where, "{}"), where)
            delta = with_config(part.delta, configs[where], path, where)
            check_delta(delta, partial(_sources, part))  # the configuration has settings of the delta, too
            parts[raw] = replace(part, delta=delta)
        return parts

    def to_supported(self, adapter: Adapter) -> Adapter:
        """Returns the adapter with the Tucker cores of LoRA multiplied out."""
        modules = {
            name: with_shaped_gains(with_scaled_bias(without_core(delta))) for name, delta in adapter.modules.items()
        }
        return replace(adapter, modules=modules)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns tensors as `<component>/<name>` and configurations as `<component>/adapter_config.json`."""
        plain, metadata = super().encode(adapter, card, names)
        tensors = with_embedding_names(plain)
        if len(_components(adapter)) > 1:
            return tensors, metadata
        return {key.rpartition("/")[2]: tensor for key, tensor in tensors.items()}, metadata

    def raw_name(self, name: str, family: str) -> str:
        """Returns `<component>/base_model.model.<path>`.

        Raises:
            AdapterError: The path begins with another component, which readers would take for the module's own.
        """
        component, _, path = name.partition(".")
        if path.partition(".")[0] in _COMPONENT_PATTERNS:
            raise AdapterError(
                "the name of the module has two components, of which PEFT's readers see the second",
                where=name,
                remedy="correct the names in the file that it was read from",
            )
        return f"{component}/{PEFT_PREFIX}{_model_path(component, path)}"

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """Returns one configuration for each component."""
        components = _components(adapter)
        header = {"format": "pt"}
        for component, modules in components.items():
            named = {"base_model_name_or_path": card.base or None, "task_type": None}
            config = settings_for(modules, component) | named
            folder = f"{component}/" if len(components) > 1 else ""
            header[f"{folder}{CONFIG_FILE}"] = canonical_json(config).decode()
        return header if len(components) > 1 else header | {COMPONENT: next(iter(components), "")}


def _components(adapter: Adapter) -> dict[str, dict[str, Delta]]:
    components: dict[str, dict[str, Delta]] = {}
    for name, delta in adapter.modules.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[_model_path(component, path)] = delta
    return components


def _model_path(component: str, path: str) -> str:
    return path.removeprefix("text_model.") if component in _WITHOUT_LEVEL else path


def _sources(part: Part) -> Mapping[str, str]:
    return part.group.sources


def _split(raw: str) -> tuple[str, str]:
    folder, _, name = raw.rpartition("/")
    return folder, name.removeprefix(PEFT_PREFIX)


def _check_component(name: str, where: str) -> None:
    """Raises an error for a component that no base has: no format could hold its modules.

    Raises:
        AdapterError: Names the allowed components.
    """
    if f"{name}." not in COMPONENTS:
        raise AdapterError(
            f"the component is {name[:80]!r}",
            where=where,
            allowed=", ".join(entry.removesuffix(".") for entry in COMPONENTS),
            remedy="save or download the adapter again",
        )


def _component(paths: list[str], metadata: Mapping[str, str], known: Collection[str] | None) -> str:
    """Returns the component of a folder that is not named after one."""
    stated = metadata.get(COMPONENT, "")
    if stated:
        _check_component(stated, f"metadata {COMPONENT!r}")
    if not paths or stated:
        return stated
    if known is not None:
        for component in sorted({name.partition(".")[0] for name in known}):
            if all(canonical_name(component, path) in known for path in paths):
                return component
    if is_transformer(paths):
        return TRANSFORMER
    for component, pattern in _COMPONENT_PATTERNS.items():
        if all(re.fullmatch(pattern, path) for path in paths):
            return component
    raise AdapterError(
        f"the component of the module {paths[0]!r} is unknown",
        allowed="a folder named after the component, such as unet",
        remedy="put the two files into a folder with the component's name",
    )
