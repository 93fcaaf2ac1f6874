"""Maps the tensors of a diffusion transformer in its original names to diffusers' names, by the family's name table.

The table is the one that adapters are converted by. Original layers may fuse several layers of diffusers by rows, and
diffusers may swap the halves of a layer's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_engine.checkpoints.stored_tensor import PlannedTensor, StoredTensor
from lora_engine.errors import BaseModelError
from lora_engine.families import Family, families
from lora_engine.families.names import TRANSFORMER, NameTable
from lora_engine.families.proof import recognize_family, titles

_PREFIX = "model.diffusion_model."
_LEAVES = ("weight", "bias")
# Norms in the code of Black Forest Labs, and the leaf of their weight.
_NORMS = (".query_norm", ".key_norm")
_SCALE = "scale"


@dataclass(frozen=True)
class TransformerTensor:
    """A tensor of diffusers in an original file.

    Attributes:
        name: Diffusers' name in the transformer.
        key: Name in the file.
        shape: Shape in diffusers.
        rows: First row and last row + 1 in the stored tensor.
        swapped: True if the halves of the rows are swapped.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    swapped: bool = False

    def plan(self, stored: StoredTensor) -> PlannedTensor:
        """Returns the tensor of diffusers as byte ranges of the stored one."""
        first, last = self.rows
        if not stored.shape or ((first, last) == (0, stored.shape[0]) and not self.swapped):
            return PlannedTensor(self.shape, (stored,))
        middle = (first + last) // 2
        ranges = [(middle, last), (first, middle)] if self.swapped else [(first, last)]
        return PlannedTensor(self.shape, tuple(stored.rows(*part) for part in ranges))


@dataclass(frozen=True)
class OriginalTransformer:
    """The transformer in an original file.

    Attributes:
        family: Its family.
        tensors: Its tensors by diffusers' names.
        others: Names of all other tensors of the file, such as those of text encoders.
    """

    family: Family
    tensors: tuple[TransformerTensor, ...]
    others: tuple[str, ...]


def find_transformer(tensors: Mapping[str, StoredTensor], where: str) -> OriginalTransformer | None:
    """Returns the transformer of a file with original names; None for diffusers' names, U-Nets and unknown families.

    Args:
        tensors: The tensors of one file, without those that describe quantization.
        where: The file, for errors.

    Raises:
        BaseModelError: A fused layer does not have the rows of its family, or several families have the names.
    """
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ""
    inner = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    family = _family_of(inner, tensors, where)
    if family is None:
        return None
    located, others = [], [name for name in tensors if not name.startswith(prefix)]
    for name, key in inner.items():
        weight = inner.get(f"{_split(name)[0]}.{_LEAVES[0]}", key)
        parts = _locate(family, name, key, tensors[key], tensors[weight])
        located += parts
        if not parts:
            others.append(key)
    return OriginalTransformer(family, tuple(located), tuple(others))


def plan_original(
    family: Family, tensors: Mapping[str, StoredTensor], where: str, prefix: str = ""
) -> dict[str, PlannedTensor]:
    """Returns the tensors of an original file as byte ranges of diffusers' tensors.

    Args:
        family: The family of the transformer; has a name table.
        tensors: Its tensors by diffusers' names.
        where: The file or folder, for errors.
        prefix: Prefix of the names to write.

    Raises:
        BaseModelError: A tensor has no original name, or a part of a fused layer is missing or of another dtype.
    """
    table = _table(family)
    planned: dict[str, PlannedTensor] = {}
    for name, stored in tensors.items():
        module, leaf = _split(name)
        bare = next((original for original, path in table.tensors.items() if path == name), None)
        target = table.original_of(module)
        if bare is not None:
            planned[prefix + bare] = PlannedTensor(stored.shape, (stored,))
        elif target is None or leaf not in _LEAVES:
            raise BaseModelError(
                f"the original names of {family.title} have no tensor {name!r}",
                where=where,
                allowed="the tensors of the published models",
                remedy="keep diffusers' names",
            )
        else:
            written = _SCALE if target.original.endswith(_NORMS) else leaf
            key = f"{prefix}{target.original}.{written}"
            if len(target.parts) == 1:
                weight = tensors.get(f"{module}.{_LEAVES[0]}", stored)
                swapped = family.swapped(target.original, _rows_and_columns(weight))
                whole = TransformerTensor(name, key, stored.shape, _all_rows(stored), swapped)
                planned[key] = whole.plan(stored)
            elif key not in planned:
                planned[key] = _fused([tensors.get(f"{part}.{leaf}") for part in target.parts], key, where)
    return planned


def family_of(tensors: Mapping[str, StoredTensor], class_name: str = "") -> Family | None:
    """Returns the supported family that alone has a transformer with diffusers' names; None if there is none.

    Args:
        tensors: The tensors by diffusers' names.
        class_name: Class in the transformer's `config.json`; empty means unknown.
    """
    modules = {_flat(_split(name)[0]): _rows_and_columns(stored) for name, stored in tensors.items()}
    possible = recognize_family(modules, by_size=False).families
    if class_name:
        possible = tuple(name for name in possible if class_name in _classes(families[name]))
    elif len(possible) > 1:
        possible = recognize_family(modules).families
    family = families[possible[0]] if len(possible) == 1 else None
    return family if family is not None and family.is_supported and family.names is not None else None


def _classes(family: Family) -> set[str]:
    return {entry.components[TRANSFORMER].class_name for entry in family.published if TRANSFORMER in entry.components}


def _family_of(inner: Mapping[str, str], tensors: Mapping[str, StoredTensor], where: str) -> Family | None:
    modules = {_flat(_split(name)[0]): _rows_and_columns(tensors[key]) for name, key in inner.items()}
    # The tables of families that are only recognized lack modules outside blocks, so the most complete table counts.
    by_names = {name: _count(families[name], inner) for name in recognize_family(modules, by_size=False).families}
    possible = [name for name, count in by_names.items() if count and count == max(by_names.values())]
    if len(possible) > 1:
        possible = [name for name in recognize_family(modules).families if name in possible] or possible
    supported = [name for name in possible if families[name].is_supported]
    if supported and len(possible) > 1:
        raise BaseModelError(
            f"the model may be {titles(possible)}",
            where=where,
            allowed="a model with the modules of one family",
            remedy="use the diffusers folder",
        )
    return families[supported[0]] if supported else None


def _count(family: Family, names: Iterable[str]) -> int:
    """Returns the number of tensors whose modules a family's table has; 0 if all have diffusers' names."""
    targets = [family.names.find(_split(name)[0]) for name in names] if family.names is not None else []
    found = [target for target in targets if target is not None]
    return len(found) if any(target.parts != (target.original,) for target in found) else 0


def _locate(family: Family, name: str, key: str, stored: StoredTensor, weight: StoredTensor) -> list[TransformerTensor]:
    """Returns the tensors of diffusers in a stored tensor; `weight` is that of the same module."""
    table = _table(family)
    if name in table.tensors:
        return [TransformerTensor(table.tensors[name], key, stored.shape, _all_rows(stored))]
    module, leaf = _split(name)
    target = table.find(module)
    if target is None or leaf not in (*_LEAVES, _SCALE):
        return []
    leaf = _LEAVES[0] if leaf == _SCALE else leaf
    if len(target.parts) == 1:
        swapped = family.swapped(target.original, _rows_and_columns(weight))
        return [TransformerTensor(f"{target.parts[0]}.{leaf}", key, stored.shape, _all_rows(stored), swapped)]
    shares, (_, count) = table.rows_of(target.parts, 1), _all_rows(stored)
    if count % sum(shares):
        raise BaseModelError(
            f"the fused layer of {family.title} has {count} rows",
            where=f"{stored.path}: tensor {key!r}",
            allowed=f"a multiple of {sum(shares)}, for {', '.join(target.parts)}",
            remedy="check the file",
        )
    unit, first, located = count // sum(shares), 0, []
    for part, share in zip(target.parts, shares, strict=True):
        rows = (first, first + share * unit)
        located.append(TransformerTensor(f"{part}.{leaf}", key, (share * unit, *stored.shape[1:]), rows))
        first = rows[1]
    return located


def _fused(parts: list[StoredTensor | None], key: str, where: str) -> PlannedTensor:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts) or len({part.value_dtype for part in present}) > 1:
        problem = "lacks parts" if len(present) < len(parts) else "has parts of several dtypes"
        raise BaseModelError(
            f"the fused layer {key!r} {problem}",
            where=where,
            allowed="all parts of a fused layer, in one dtype",
            remedy="use the complete model, or cast it to one dtype",
        )
    rows = sum(part.shape[0] for part in present)
    return PlannedTensor((rows, *present[0].shape[1:]), tuple(present))


def _rows_and_columns(stored: StoredTensor) -> tuple[int, int]:
    rows = stored.shape[0] if stored.shape else 1
    return rows, math.prod(stored.shape[1:]) if len(stored.shape) > 1 else 0


def _all_rows(stored: StoredTensor) -> tuple[int, int]:
    return 0, stored.shape[0] if stored.shape else 1


def _table(family: Family) -> NameTable:
    if family.names is None:
        raise TypeError(f"{family.name!r} has no table of names")
    return family.names


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _flat(name: str) -> str:
    return name.replace(".", "_")
