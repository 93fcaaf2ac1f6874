"""Defines `Family`: everything that the code must know about one family of base models. Torch-free.

Classes are dotted names (`module:Class`), imported when a base is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_engine.families.block_names import BlockNames
from lora_engine.families.latent_colors import LatentColors
from lora_engine.families.names import NameTable
from lora_engine.families.training_defaults import TrainingDefaults
from lora_engine.registries import Registry


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of diffusers whose bases can be loaded.

    Attributes:
        name: Its `_class_name` in `model_index.json`.
        loader: Dotted name of the `BaseModel`: a callable of (source, device, dtype).
        components: The required subfolders.
        optional: Subfolders that may be missing; their entry in `model_index.json` is then null.
        variant: Empty, or `inpainting` if the network also reads a mask and a masked image.
    """

    name: str
    loader: str
    components: tuple[str, ...]
    optional: tuple[str, ...] = ()
    variant: str = ""


@dataclass(frozen=True)
class ComponentConfig:
    """One component of a pipeline, as in its `config.json`.

    Attributes:
        library: Package of the class: `diffusers` or `transformers`.
        class_name: Name of the class.
        config: Its settings; missing ones take the defaults of the class.
    """

    library: str
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ComponentLocation:
    """The location of a component in an original single file: the prefix of its names and the naming after it."""

    prefix: str
    naming: Literal["unet", "vae", "clip", "open_clip"]


@dataclass(frozen=True)
class Architecture:
    """A published base model without its weights.

    Attributes:
        name: Name for `--base`, such as `sd15` or `sdxl`.
        family: Name of its family.
        pipeline: The pipeline class in `model_index.json`.
        components: Networks, text encoders, tokenizers and scheduler by subfolder of a diffusers folder.
        adaptable: The components that can have adapters, in the order of an adapter's names.
        settings: Further entries of `model_index.json`.
        tokenizers: Hub id of the repository of each tokenizer's vocabulary.
        file: Location of each component in an original single file; empty if such files are not converted.
        modelspec: `modelspec.architecture` and `modelspec.resolution` of an original single file.
    """

    name: str
    family: str
    pipeline: str
    components: Mapping[str, ComponentConfig]
    adaptable: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    file: Mapping[str, ComponentLocation] = field(default_factory=dict)
    modelspec: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class UnetLayout:
    """The block numbering of a U-Net in the original names.

    Attributes:
        levels: Number of resolutions; the last has no downsampler.
        plain_up: Indices of up blocks without attention, in diffusers' order.
        layers: ResNets in each down block; an up block has one more.
    """

    levels: int
    plain_up: frozenset[int]
    layers: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UnetLayout:
        """Returns the layout for the config of a `UNet2DConditionModel`."""
        up = list(config["up_block_types"])
        plain = frozenset(level for level, kind in enumerate(up) if "CrossAttn" not in kind)
        return cls(len(up), plain, int(config.get("layers_per_block", 2)))


@dataclass(frozen=True)
class Unet:
    """What identifies the U-Net of a family.

    Attributes:
        layout: Block numbering of the published U-Nets.
        widths: Widths of the text embeddings that cross attention reads.
        modules: Beginnings of canonical names that no other family with a U-Net has.
        published: The published base that has the modules of all others.
        original: True if kohya's format has the U-Net's original names.
    """

    layout: UnetLayout
    widths: tuple[int, ...]
    modules: tuple[str, ...]
    published: str
    original: bool = False


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder in the files of adapters.

    Attributes:
        role: Name in ComfyUI's files, such as `t5xxl`.
        names: Its module names.
        kohya: Prefix in kohya's files.
        aliases: Other names of the role in files.
        level: Level that ComfyUI's names have between the role and the path.
    """

    role: str
    names: NameTable
    kohya: str
    aliases: tuple[str, ...] = ()
    level: str = ""


@dataclass(frozen=True)
class Size:
    """A published size, which proves a family.

    Attributes:
        title: Name in messages.
        blocks: Number of blocks by diffusers' name of the list.
        small: The same for refiners and the like, which adapters rarely change.
        units: The numbers that the letters in the shapes of a `NameTable` stand for, such as the width `w`.
    """

    title: str
    blocks: Mapping[str, int]
    units: Mapping[str, int] = field(default_factory=dict)
    small: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """The transformer's names in one format.

    Attributes:
        prefix: Prefix of the names; if it ends in a dot, names are dotted, else flattened.
        original: True for the original names, with fused layers.
    """

    prefix: str
    original: bool


@dataclass(frozen=True)
class Targets:
    """Patterns of whole canonical names, from which the target presets are made.

    Attributes:
        blocks: The modules of repeated blocks of the denoiser.
        attention: The projections of attention.
        feed_forward: The layers of feed-forward networks.
        text: The layers of text encoders.
    """

    blocks: str = r"[^.]+\.(.*\.)?(\w*blocks|mid_block)\..*"
    attention: str = r".*\.attn\d*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    feed_forward: str = r".*\.ff(_context)?\.net\.(0\.proj|2)"
    text: str = r"text_encoder.*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


@dataclass(frozen=True)
class HeaderVersion:
    """How the header of an adapter names its base.

    Attributes:
        version: `ss_base_model_version` that kohya's programs write.
        architecture: `modelspec.architecture`.
        resolution: `modelspec.resolution`.
        width: Width of the text embeddings that the U-Net reads; 0 for any.
        prediction: `v` for bases that predict the velocity; empty for any.
    """

    version: str
    architecture: str
    resolution: str = "1024x1024"
    width: int = 0
    prediction: str = ""


def _never(original: str, shape: tuple[int, int]) -> bool:
    del original, shape
    return False


@dataclass(frozen=True)
class Family:
    """A family of base models: bases with the same modules, up to their sizes.

    A family without pipelines is only recognized: its files are refused by name.

    Attributes:
        name: Name in adapters, cards and error messages.
        title: Name in messages.
        pipelines: The pipelines that can be loaded.
        published: The published bases.
        names: Module names of the transformer; None for a U-Net.
        sizes: Published sizes of the transformer.
        marks: Pattern of further flattened names (matched at the start) that only this family has.
        header: Pattern of `ss_base_model_version` and of `modelspec.architecture` up to the slash, in lower case with
            `_` for dots and hyphens.
        unet: What identifies the U-Net; None for a transformer.
        text: Component to text encoder, in the order in which files number them.
        swapped: From an original path and the weight's shape to True if diffusers swaps the halves of its rows.
        other_names: Format to further original names of the transformer, for formats with names of their own.
        written: Format to names that differ from the usual ones of the format.
        versions: How headers name its bases; the first that matches an adapter is written.
        targets: Patterns of the target presets.
        licenses: License id to the published names and hub ids of the weights that have it; if only the family is
            known, the strictest license counts.
        training: Settings in the pipeline files that `loraline init` and `loraline train` write.
        reads_framing: True if the network reads the size of the original image and the offset of the crop.
        blocks: Its blocks in lists of block weights; None if there are no such lists.
        latent_colors: Colors of its published autoencoder's latents, for previews; None decodes them.
        embedder: Hub id of the CLIP or SigLIP that evaluations of its bases use by default.
        image_embedder: Hub id of the DINOv2 that they use by default.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    name: str
    title: str
    pipelines: tuple[Pipeline, ...] = ()
    published: tuple[Architecture, ...] = ()
    names: NameTable | None = None
    sizes: tuple[Size, ...] = ()
    marks: str = ""
    header: str = ""
    unet: Unet | None = None
    text: Mapping[str, TextEncoder] = field(default_factory=dict)
    swapped: Callable[[str, tuple[int, int]], bool] = _never
    other_names: Mapping[str, NameTable] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    versions: tuple[HeaderVersion, ...] = ()
    targets: Targets = Targets()
    licenses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    training: TrainingDefaults = field(default_factory=TrainingDefaults)
    reads_framing: bool = False
    blocks: BlockNames | None = None
    latent_colors: LatentColors | None = None
    embedder: str = "openai/clip-vit-large-patch14"
    image_embedder: str = "facebook/dinov2-base"
    revision: int = 0

    @property
    def is_supported(self) -> bool:
        """True if adapters of the family are read, and its bases loaded."""
        return bool(self.pipelines)

    @property
    def is_flow(self) -> bool:
        """True if its bases are trained by flow matching: the schedulers of the published ones say so."""
        parts = [part for base in self.published for part in base.components.values()]
        return any(part.class_name.startswith("FlowMatch") for part in parts)


families: Registry[Family] = Registry("base model family", entry=Family, group="loraline.families")
