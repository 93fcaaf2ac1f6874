"""Converts single files with all components of a base with a transformer, as ComfyUI writes them.

The transformer and the autoencoder have their original names, the text encoders those of transformers. diffusers'
`from_single_file` reads the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lora_engine.checkpoints.convert_transformer import find_settings
from lora_engine.checkpoints.folder import read_components
from lora_engine.checkpoints.folder_writer import write_folder
from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import component_names, stored_name, tensor_shapes
from lora_engine.checkpoints.original import OriginalFile
from lora_engine.checkpoints.plan import refuse
from lora_engine.checkpoints.stored_tensor import PLAIN, PlannedTensor
from lora_engine.checkpoints.text_names import TRANSPOSED as PROJECTION
from lora_engine.checkpoints.text_names import text_tensor_name
from lora_engine.checkpoints.tokenizers import find_tokenizers
from lora_engine.checkpoints.transformer_names import OriginalTransformer
from lora_engine.checkpoints.vae_names import VAE_PREFIXES
from lora_engine.errors import BaseModelError
from lora_engine.families import Architecture, ComponentConfig, Family
from lora_engine.families.family import ComponentLocation
from lora_engine.families.layout import INDEX, text_encoder_of
from lora_engine.families.names import TRANSFORMER
from lora_engine.lazy_torch import torch

_VAE = "vae"
# T5 stores one table under two names.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
_log = logging.getLogger(__name__)


@dataclass
class _Planned:
    """What is planned of a file.

    Attributes:
        plans: The tensors of each component.
        used: Names of the file's tensors that have a place.
        missing: Names of tensors that the file lacks.
        misshaped: Tensors of another shape, in words.
    """

    plans: dict[str, dict[str, PlannedTensor]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)


def whole_to_diffusers(
    original: OriginalFile,
    transformer: OriginalTransformer,
    out: Path,
    *,
    config: Path | None,
    tokenizer: Path | None,
    without_tokenizer: bool,
    drop_unknown: bool,
) -> list[Path]:
    """Writes a diffusers folder, and returns its files; see `convert_checkpoint`.

    Raises:
        BaseModelError: Tensors are missing, unknown or of another shape, the settings are unknown, or a tokenizer is
            missing.
    """
    architecture, components, plans = plan_whole(original, transformer, config=config, drop_unknown=drop_unknown)
    needed = {name: hub_id for name, hub_id in architecture.tokenizers.items() if text_encoder_of(name) in components}
    known = replace(architecture, tokenizers=needed)
    tokenizers = {} if without_tokenizer else find_tokenizers(known, tokenizer, config)
    return write_folder(out, known, architecture.pipeline, components, plans, tokenizers)


def plan_whole(
    original: OriginalFile, transformer: OriginalTransformer, *, config: Path | None = None, drop_unknown: bool = False
) -> tuple[Architecture, dict[str, ComponentConfig], dict[str, dict[str, PlannedTensor]]]:
    """Returns the published base of a file, its components, and the tensors of each that has weights.

    Args:
        original: The file.
        transformer: Its transformer.
        config: A diffusers folder with the settings; None uses the published ones whose shapes fit.
        drop_unknown: True leaves out tensors that the base does not have.

    Raises:
        BaseModelError: As `whole_to_diffusers`, but for tokenizers.
    """
    architecture, components = _components_of(original, transformer, config)
    family, where = transformer.family, str(original.path)
    optional = next(entry.optional for entry in family.pipelines if entry.name == architecture.pipeline)
    absent = [name for name in optional if name in family.text and not dict(_text_keys(family, name, original))]
    components = {name: part for name, part in components.items() if name not in absent}
    planned = _plan(original, transformer, components)
    refuse(
        planned.missing, "tensors are missing", where, f"all components of {family.title}", "use the diffusers folder"
    )
    refuse(
        planned.misshaped, "tensors do not fit the settings", where, "the published widths, or those in `config`", ""
    )
    unknown = [name for name in transformer.others if name not in planned.used and reason_unused(name) is None]
    if not drop_unknown:
        remedy = "drop them with --drop-unknown (drop_unknown=True)"
        refuse(unknown, "tensors are unknown", where, "the tensors of the base", remedy)
    return architecture, components, planned.plans


def _components_of(
    original: OriginalFile, transformer: OriginalTransformer, config: Path | None
) -> tuple[Architecture, dict[str, ComponentConfig]]:
    """Returns the published base of a file, and class and settings of its components without tokenizers."""
    family, shapes = transformer.family, {entry.name: entry.shape for entry in transformer.tensors}
    if config is not None and not (config / INDEX).is_file():
        raise BaseModelError(
            "the settings of all components are needed",
            where=str(config),
            allowed="a diffusers folder of the family",
            remedy="pass such a folder as config",
        )
    if config is None:
        known = {entry.name: entry.components[TRANSFORMER] for entry in family.published}
        name = find_settings(known, shapes, original.path)
        architecture = next(entry for entry in family.published if entry.name == name)
        components = dict(architecture.components)
    else:
        architecture, components = family.published[0], read_components(config)
        find_settings({"the settings in config": components[TRANSFORMER]}, shapes, original.path)
    return architecture, {name: part for name, part in components.items() if not name.startswith("tokenizer")}


def _plan(
    original: OriginalFile, transformer: OriginalTransformer, components: Mapping[str, ComponentConfig]
) -> _Planned:
    planned = _Planned()
    tensors = {entry.name: entry.plan(original.tensors[entry.key]) for entry in transformer.tensors}
    planned.plans[TRANSFORMER] = tensors
    _plan_autoencoder(original, components[_VAE], planned)
    for component in transformer.family.text:
        if component in components:
            _plan_text(original, transformer.family, component, components[component], planned)
    return planned


def _plan_autoencoder(original: OriginalFile, config: ComponentConfig, planned: _Planned) -> None:
    prefix = next((one for one in VAE_PREFIXES if any(name.startswith(one) for name in original.tensors)), _VAE + ".")
    shapes = tensor_shapes(_VAE, config)
    for entry in component_names(_VAE, ComponentLocation(prefix, "vae"), config):
        key, shape = stored_name(entry, original.tensors), shapes[entry.name]
        if key is None:
            planned.missing.append(f"{_VAE}: {entry.stored}")
            continue
        planned.used.add(key)
        stored = original.tensors[key]
        # Some programs store 1x1 convolutions as matrices, with the same bytes.
        if stored.shape not in (entry.stored_shape(shape), shape if entry.change == "convolution" else None):
            planned.misshaped.append(f"{key} is {list(stored.shape)} instead of {list(entry.stored_shape(shape))}")
        planned.plans.setdefault(_VAE, {})[entry.name] = PlannedTensor(shape, (stored,))


def _plan_text(
    original: OriginalFile, family: Family, component: str, config: ComponentConfig, planned: _Planned
) -> None:
    keys = dict(_text_keys(family, component, original))
    planned.used.update(keys.values())
    for tied, name in _TIED.items():
        if tied in keys:
            keys.setdefault(name, keys[tied])
    for name, shape in tensor_shapes(component, config).items():
        if name in _TIED:
            continue
        if name in keys:
            stored = original.tensors[keys[name]]
            if stored.shape != shape:
                planned.misshaped.append(f"{keys[name]} is {list(stored.shape)} instead of {list(shape)}")
            tensor = PlannedTensor(shape, (stored,))
        elif name == PROJECTION and shape[0] == shape[1] and keys:
            _log.info("%s has no projection of %s, which is then the identity", original.path, component)
            tensor = PlannedTensor(shape, (), cast=PLAIN, source=partial(_identity, shape[0]))
        else:
            planned.missing.append(f"{component}: {name}")
            continue
        planned.plans.setdefault(component, {})[name] = tensor


def _identity(size: int) -> Iterator[memoryview]:
    yield torch.eye(size, dtype=torch.bfloat16).view(torch.uint8).reshape(-1).numpy().data


def _text_keys(family: Family, component: str, original: OriginalFile) -> Iterator[tuple[str, str]]:
    """Yields the canonical name of each tensor of a text encoder, and its name in the file."""
    for key in original.tensors:
        name = text_tensor_name(family, key)
        if name is not None and name.partition(".")[0] == component:
            yield name.partition(".")[2], key
