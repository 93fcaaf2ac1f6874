"""The adapter file formats by name. `lora_engine.formats.codecs` has their codecs."""

from __future__ import annotations

from dataclasses import dataclass

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Format:
    """A file format, one entry of `FORMATS`.

    Attributes:
        name: Name that users type.
        title: The program that reads or writes it, for help texts and tables.
        codec: `module:class` of its `Codec`, whose `format` is this entry.
        precedence: Recognition tries the formats from the smallest number on. Built-in formats have 10 to 60; a format
            needs a smaller one than formats whose names are more general.
        kinds: Adapter kinds that the program reads, if fewer than its key layout has names for; empty means all of
            them. `dora of loha` is a LoHa within DoRA.
        families: Base families that it supports; empty means any.
        file_name: File name if the output path is a folder.
        is_renamable: True if programs load the file under any name. Exports of a registered version then have its name,
            because users keep many such files in one folder.
        is_folder: True if an adapter is a folder of files. Tensor names are then `<folder>/<name>`, and the metadata
            holds the other files as `<folder>/<file name>`; the top folder has no slash.
        is_written: False if it is only read.
        numbers_modules: True if it numbers the modules of the base, and writing needs their order.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    name: str
    title: str
    codec: str
    precedence: int = 100
    kinds: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    file_name: str = "adapter.safetensors"
    is_renamable: bool = False
    is_folder: bool = False
    is_written: bool = True
    numbers_modules: bool = False
    revision: int = 0


FORMATS: Registry[Format] = Registry(
    "adapter format", entry=Format, source="lora_engine.catalog.formats", group="loraline.formats"
)


def written_formats() -> dict[str, Format]:
    """Returns the formats that can be written."""
    return {name: entry for name, entry in FORMATS.items() if entry.is_written}


LORALINE = Format(
    "loraline", "the format of the store", "lora_engine.formats.native:NativeCodec", precedence=50, is_renamable=True
)
KOHYA = Format(
    "kohya",
    "kohya's sd-scripts, A1111, ComfyUI",
    "lora_engine.formats.kohya:KohyaCodec",
    precedence=10,
    is_renamable=True,
    revision=1,
)
COMFYUI = Format(
    "comfyui",
    "ComfyUI",
    "lora_engine.formats.comfyui:ComfyuiCodec",
    precedence=40,
    kinds=("lora", "loha", "lokr", "dora", "dora of loha", "dora of lokr", "glora", "full", "replacement"),
    is_renamable=True,
    revision=1,
)
DIFFUSERS = Format(
    "diffusers",
    "diffusers' `load_lora_weights`",
    "lora_engine.formats.diffusers:DiffusersCodec",
    precedence=60,
    file_name="pytorch_lora_weights.safetensors",
)
PEFT = Format(
    "peft",
    "PEFT's folders",
    "lora_engine.formats.peft:PeftCodec",
    precedence=60,
    file_name="adapter_model.safetensors",
    is_folder=True,
)
LYCORIS = Format(
    "lycoris",
    "LyCORIS' own loaders",
    "lora_engine.formats.kohya_like:LycorisCodec",
    precedence=30,
    is_renamable=True,
    revision=1,
)
ONETRAINER = Format(
    "onetrainer",
    "OneTrainer",
    "lora_engine.formats.kohya_like:OnetrainerCodec",
    precedence=30,
    kinds=("lora", "loha", "lokr", "dora"),
    is_renamable=True,
    revision=1,
)
AITOOLKIT = Format(
    "aitoolkit",
    "ai-toolkit",
    "lora_engine.formats.kohya_like:AitoolkitCodec",
    precedence=30,
    kinds=("lora", "lokr"),
    is_renamable=True,
    revision=1,
)
CLONEOFSIMO = Format(
    "cloneofsimo",
    "cloneofsimo's lora",
    "lora_engine.formats.cloneofsimo:CloneofsimoCodec",
    precedence=60,
    families=("sd",),
    file_name="lora.safetensors",
    is_renamable=True,
    numbers_modules=True,
)
BFL = Format(
    "bfl", "Black Forest Labs' control adapters", "lora_engine.formats.bfl:BflCodec", precedence=20, is_written=False
)
XLABS = Format("xlabs", "XLabs' x-flux", "lora_engine.formats.bfl:XlabsCodec", precedence=20, is_written=False)
