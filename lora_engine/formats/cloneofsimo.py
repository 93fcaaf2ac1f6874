"""cloneofsimo's format: tensors without names, counted in the order of the modules of a class tree that is no more.

`unet:0:up` is the first layer below a module of a class that the metadata list; the order is in `cloneofsimo_order`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.cloneofsimo_order import CLASSES, CONVOLUTIONS, classes_for, counted
from lora_engine.formats.codec import Names, TensorCodec, codecs
from lora_engine.formats.diffusers import without_core
from lora_engine.formats.key_layout import KeyLayout, TableFactorKeys
from lora_engine.formats.naming import MODULES, listed_modules
from lora_engine.formats.transformers.names import folded

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_TEXT_WIDTHS = {768: "sd15", 1024: "sd2"}
T = TypeVar("T")

STYLE = KeyLayout("cloneofsimo", writes_alpha=False, rewrites=((_KEY.pattern, r"\1:\2.\3"),))
STYLE.add(TableFactorKeys("lora", {"down": "down", "up": "up"}))


class CloneofsimoCodec(TensorCodec):
    """`unet:0:up`, with the scale in the factor; for Stable Diffusion 1.x and 2.x."""

    name: ClassVar[str] = "cloneofsimo"
    file_name: ClassVar[str] = "lora.safetensors"
    embeddings: ClassVar[str] = "tokens"
    families: ClassVar[tuple[str, ...]] = ("sd",)
    keeps_alpha: ClassVar[bool] = False
    style = STYLE

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether all names are numbered as the format's are."""
        return bool(keys) and all(_KEY.fullmatch(key) for key in keys)

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Canonical names, by counting through the base's modules as the format's own loader does."""
        found: dict[str, str] = {}
        for component in sorted({name.partition(":")[0] for name in raw}):
            deltas = _in_order(component, raw)
            sequence = listed_modules(metadata)
            if sequence is None or known is not None:
                names = known if known is not None else _published_shapes(raw)
                sequence = list(counted(component, _with_base(names, component), _targets(component, metadata)))
            else:
                sequence = [name for name in sequence if name.startswith(f"{component}.")]
            # A module below two of the classes comes twice, and the later one counts.
            places = dict(_normalized(component, deltas, sequence))
            found |= {f"{component}:{number}": name for name, number in places.items()}
        return {name: path for name, path in found.items() if not _is_filling(raw[name])}

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """The deltas by number, without those that only fill a place."""
        modules = super().read_modules(tensors, metadata)
        return {name: delta for name, delta in modules.items() if not _is_filling(delta)}

    def to_supported(self, adapter: Adapter) -> Adapter:
        """Scales folded into `up`, Tucker cores multiplied out."""
        modules = {name: folded(name, without_core(delta)) for name, delta in adapter.modules.items()}
        return Adapter(modules, adapter.base, adapter.fingerprint)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every module of the classes that are needed; those that the adapter has not are filled with rank 1 of zero.

        Args:
            adapter: The adapter.
            card: Not used.
            names: The base's modules with their shapes; None takes the published architecture.
        """
        ready = self.to_supported(adapter)
        tensors: dict[str, Tensor] = {}
        listed: list[str] = []
        header = super().encode(Adapter({}, adapter.base, adapter.fingerprint), card)[1]
        shapes: Mapping[str, Sequence[int]] | None
        shapes = names if isinstance(names, Mapping) else _published_shapes(ready.modules)
        for component in dict.fromkeys(name.partition(".")[0] for name in ready.modules):
            modules = {name: delta for name, delta in ready.modules.items() if name.startswith(f"{component}.")}
            targets = classes_for(component, modules)
            shapes = _with_base(shapes, component)
            sequence = list(counted(component, shapes, targets))
            if not any(len(shapes[name]) > 2 for name in sequence if name in modules):
                sequence = [name for name in sequence if len(shapes[name]) == 2]
            _check_all_there(modules, sequence)
            header[component] = canonical_json(targets).decode()
            for number, name in enumerate(sequence):
                delta = modules.get(name) or _filling(shapes[name], modules)
                up, down = _factors(name, delta, shapes[name])
                tensors |= {f"{component}:{number}:up": up, f"{component}:{number}:down": down}
                header[f"{component}:{number}:rank"] = str(down.shape[0])
            listed += sequence
        return tensors, header | {MODULES: canonical_json(listed).decode()}


def numbered(weights: Sequence[Tensor], component: str) -> dict[str, Tensor]:
    """The tensors of a `.pt` list `[up, down, up, down, ...]`, named as the format's own converter names them.

    The scale is not in such a file: it was a setting of the program, 1 unless somebody changed it.
    """
    return {f"{component}:{place // 2}:{('up', 'down')[place % 2]}": weight for place, weight in enumerate(weights)}


def _targets(component: str, metadata: Mapping[str, str]) -> list[str]:
    try:
        targets = json.loads(metadata[component]) if component in metadata else None
    except (ValueError, RecursionError):
        targets = [""]
    if targets is None:
        # Those of the program itself; without convolutions, ResNets' layers would not be in the file either.
        return ["CrossAttention", "Attention", "GEGLU"] if component == "unet" else ["CLIPAttention"]
    if not isinstance(targets, list) or not all(target in CLASSES for target in targets):
        raise AdapterError(
            f"the classes {metadata[component]} are not known",
            where=f"metadata {component!r}",
            allowed=", ".join(CLASSES),
            remedy="convert the adapter with the program that made it",
        )
    return targets


def _with_base(names: T | None, component: str) -> T:
    if names is None:
        raise AdapterError(
            "a base is needed to tell which modules the numbers mean",
            where=f"tensor '{component}:0:up'",
            allowed="numbers, counted through the modules of a base",
            remedy="name the base that the adapter was made for",
        )
    return names


def _published_shapes(modules: Mapping[str, Delta]) -> Mapping[str, Sequence[int]] | None:
    """The modules of Stable Diffusion 1 or 2, where the width of the text tells which of the two it is."""
    widths = {delta.factors()["down"].shape[1] for delta in modules.values() if "down" in delta.factors()}
    told = next((name for width, name in _TEXT_WIDTHS.items() if width in widths), None)
    if told is None:
        return None
    # The architectures import diffusers, which only files without a base and without our header need.
    from lora_engine.bases.published import published_module_shapes

    return published_module_shapes(told)


def _in_order(component: str, raw: Mapping[str, Delta]) -> list[Delta]:
    numbers = sorted(int(name.partition(":")[2]) for name in raw if name.startswith(f"{component}:"))
    if numbers != list(range(len(numbers))):
        missing = next(number for number in range(len(numbers)) if number not in numbers)
        raise AdapterError(
            f"the number {missing} is missing",
            where=f"tensor '{component}:{missing}:up'",
            allowed=f"all numbers from 0 to {numbers[-1]}",
            remedy="save or download the adapter again",
        )
    return [raw[f"{component}:{number}"] for number in numbers]


def _normalized(component: str, deltas: Sequence[Delta], sequence: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each module with its number: as the loader does, a convolution is passed over where a matrix comes, and back."""
    number = 0
    for name in sequence:
        if number == len(deltas):
            break
        has_kernel, leaf = deltas[number].factors()["down"].dim() == 4, name.rpartition(".")[2]
        if leaf.startswith("proj") or (leaf in CONVOLUTIONS) == has_kernel:
            yield name, number
            number += 1
    if number < len(deltas):
        raise AdapterError(
            f"the file has {len(deltas)} numbered modules and only {number} of them have a place in the base",
            where=f"tensor '{component}:{number}:up'",
            allowed="the base's modules of the classes that the metadata list",
            remedy="name the base that the adapter was made for",
        )


def _check_all_there(modules: Mapping[str, Delta], sequence: Sequence[str]) -> None:
    lost = [name for name in modules if name not in sequence]
    if lost:
        raise AdapterError(
            f"{len(lost)} of {len(modules)} modules are not in the base, by whose order the format counts",
            where=lost[0],
            allowed="an adapter of the base that is named, without norms and embeddings",
            remedy="name the base that the adapter was made for, or choose another format",
        )


def _filling(shape: Sequence[int], modules: Mapping[str, Delta]) -> LoraDelta:
    dtype = next(iter(modules.values())).factors()["up"].dtype
    kernel = [1 for _ in shape[2:]]
    down, up = torch.zeros(1, *shape[1:], dtype=dtype), torch.zeros(shape[0], 1, *kernel, dtype=dtype)
    return LoraDelta(down, up, 1.0)


def _is_filling(delta: Delta) -> bool:
    return delta.rank == 1 and not any(bool(factor.any()) for factor in delta.factors().values())


def _factors(name: str, delta: Delta, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    if not isinstance(delta, LoraDelta) or delta.bias is not None:
        what = "a bias" if delta.kind == "lora" else f"an adapter of kind {delta.kind!r}"
        remedy = "choose another format, or ask for an approximation"
        raise AdapterError(f"the format cannot hold {what}", where=name, allowed="plain LoRA", remedy=remedy)
    reshaped_for = delta.reshaped_for(shape)
    return reshaped_for.up, reshaped_for.down


codecs.add(CloneofsimoCodec.name, CloneofsimoCodec())
