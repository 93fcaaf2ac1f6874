"""cloneofsimo's format: tensors numbered in the order of the modules of diffusers' old class tree.

`unet:0:up` is the first layer below a module of a class listed in the metadata. `cloneofsimo_order` defines the order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.catalog import formats as catalog
from lora_engine.documents import parse_json
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.cloneofsimo_order import CLASSES, CONVOLUTIONS, classes_for, ordered_layers
from lora_engine.formats.codec import Names, TensorCodec
from lora_engine.formats.diffusers import without_core
from lora_engine.formats.key_layout import KeyLayout, TableFactorKeys
from lora_engine.formats.naming import MODULES, listed_modules
from lora_engine.formats.transformers.names import folded
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_TEXT_WIDTHS = {768: "sd15", 1024: "sd2"}
_T = TypeVar("_T")

KEY_LAYOUT = KeyLayout("cloneofsimo", writes_alpha=False, rewrites=((_KEY.pattern, r"\1:\2.\3"),))
KEY_LAYOUT.add(TableFactorKeys("lora", {"down": "down", "up": "up"}))


class CloneofsimoCodec(TensorCodec):
    """`unet:0:up`, with the scale in the factor; for Stable Diffusion 1.x and 2.x."""

    format = catalog.CLONEOFSIMO
    embeddings: ClassVar[str] = "tokens"
    keeps_alpha: ClassVar[bool] = False
    key_layout = KEY_LAYOUT

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names have the form `unet:0:up`."""
        return bool(keys) and all(_KEY.fullmatch(key) for key in keys)

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns canonical names, by counting through the base's modules as the format's own loader does."""
        by_number: dict[str, str] = {}
        for component in sorted({name.partition(":")[0] for name in raw}):
            deltas = _in_order(component, raw)
            sequence = listed_modules(metadata)
            if sequence is None or known is not None:
                names = known if known is not None else _published_shapes(raw)
                sequence = list(ordered_layers(component, _with_base(names, component), _targets(component, metadata)))
            else:
                sequence = [name for name in sequence if name.startswith(f"{component}.")]
            # A module below two of the classes occurs twice; the later number wins.
            numbers = dict(_normalized(component, deltas, sequence))
            by_number |= {f"{component}:{number}": name for name, number in numbers.items()}
        return {name: path for name, path in by_number.items() if not _is_padding(raw[name])}

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """Returns the deltas by number, without padding."""
        modules = super().read_modules(tensors, metadata)
        return {name: delta for name, delta in modules.items() if not _is_padding(delta)}

    def to_supported(self, adapter: Adapter) -> Adapter:
        """Returns the adapter with scales folded into `up` and Tucker cores multiplied out."""
        modules = {name: folded(name, without_core(delta)) for name, delta in adapter.modules.items()}
        return Adapter(modules, adapter.base, adapter.fingerprint)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns tensors for every module of the needed classes; modules without a delta get zeros of rank 1.

        Args:
            adapter: The adapter.
            card: Not used.
            names: The base's modules with their shapes; None uses the published architecture.
        """
        supported = self.to_supported(adapter)
        tensors: dict[str, Tensor] = {}
        numbered_names: list[str] = []
        header = super().encode(Adapter({}, adapter.base, adapter.fingerprint), card)[1]
        shapes: Mapping[str, Sequence[int]] | None
        shapes = names if isinstance(names, Mapping) else _published_shapes(supported.modules)
        for component in dict.fromkeys(name.partition(".")[0] for name in supported.modules):
            modules = {name: delta for name, delta in supported.modules.items() if name.startswith(f"{component}.")}
            targets = classes_for(component, modules)
            shapes = _with_base(shapes, component)
            sequence = list(ordered_layers(component, shapes, targets))
            if not any(len(shapes[name]) > 2 for name in sequence if name in modules):
                sequence = [name for name in sequence if len(shapes[name]) == 2]
            _check_numbered(modules, sequence)
            header[component] = canonical_json(targets).decode()
            for number, name in enumerate(sequence):
                delta = modules.get(name) or _padding(shapes[name], modules)
                up, down = _factors(name, delta, shapes[name])
                tensors |= {f"{component}:{number}:up": up, f"{component}:{number}:down": down}
                header[f"{component}:{number}:rank"] = str(down.shape[0])
            numbered_names += sequence
        return tensors, header | {MODULES: canonical_json(numbered_names).decode()}


def numbered(weights: Sequence[Tensor], component: str) -> dict[str, Tensor]:
    """Returns the tensors of a `.pt` list `[up, down, up, down, ...]` by the keys of the format's own converter.

    Such a file does not store the scale: it was a setting of the program, 1 by default.
    """
    return {f"{component}:{index // 2}:{('up', 'down')[index % 2]}": weight for index, weight in enumerate(weights)}


def _targets(component: str, metadata: Mapping[str, str]) -> list[str]:
    where = f"metadata {component!r}"
    targets = parse_json(metadata.get(component, "null"), where, AdapterError)
    if targets is None:
        # The defaults of the program. It stores no layers of ResNets without their convolutions.
        return ["CrossAttention", "Attention", "GEGLU"] if component == "unet" else ["CLIPAttention"]
    if not isinstance(targets, list) or not all(isinstance(target, str) and target in CLASSES for target in targets):
        raise AdapterError(
            f"unknown classes {metadata[component]}",
            where=f"metadata {component!r}",
            allowed=", ".join(CLASSES),
            remedy="convert the adapter with the program that made it",
        )
    return targets


def _with_base(names: _T | None, component: str) -> _T:
    if names is None:
        raise AdapterError(
            "a base is needed to map the numbers to modules",
            where=f"tensor '{component}:0:up'",
            allowed="numbers of the modules of a base",
            remedy="name the base that the adapter was made for",
        )
    return names


def _published_shapes(modules: Mapping[str, Delta]) -> Mapping[str, Sequence[int]] | None:
    """Returns the modules of Stable Diffusion 1 or 2 by the text width; None if the width is of neither."""
    widths = {delta.factors()["down"].shape[1] for delta in modules.values() if "down" in delta.factors()}
    architecture = next((name for width, name in _TEXT_WIDTHS.items() if width in widths), None)
    if architecture is None:
        return None
    return published_module_shapes(architecture)


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
    """Yields each module with its number; like the loader, skips modules whose factors have the wrong dimensions."""
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
            f"the file has {len(deltas)} numbered modules, and only {number} of them match a module of the base",
            where=f"tensor '{component}:{number}:up'",
            allowed="the base's modules of the classes that the metadata list",
            remedy="name the base that the adapter was made for",
        )


def _check_numbered(modules: Mapping[str, Delta], sequence: Sequence[str]) -> None:
    missing = [name for name in modules if name not in sequence]
    if missing:
        raise AdapterError(
            f"{len(missing)} of {len(modules)} modules are not in the base, whose order the format uses",
            where=missing[0],
            allowed="an adapter of the given base, without norms and embeddings",
            remedy="name the base that the adapter was made for, or choose another format",
        )


def _padding(shape: Sequence[int], modules: Mapping[str, Delta]) -> LoraDelta:
    dtype = next(iter(modules.values())).factors()["up"].dtype
    kernel = [1 for _ in shape[2:]]
    down, up = torch.zeros(1, *shape[1:], dtype=dtype), torch.zeros(shape[0], 1, *kernel, dtype=dtype)
    return LoraDelta(down, up, 1.0)


def _is_padding(delta: Delta) -> bool:
    return delta.rank == 1 and not any(bool(factor.any()) for factor in delta.factors().values())


def _factors(name: str, delta: Delta, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    if not isinstance(delta, LoraDelta) or delta.bias is not None:
        part = "a bias" if delta.kind == "lora" else f"an adapter of kind {delta.kind!r}"
        remedy = "choose another format, or use --approximate"
        raise AdapterError(f"the format cannot hold {part}", where=name, allowed="plain LoRA", remedy=remedy)
    reshaped = delta.reshaped_for(shape)
    return reshaped.up, reshaped.down
