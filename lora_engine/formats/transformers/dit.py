"""Splits and fuses the layers of diffusion transformers whose original code fuses several modules of diffusers.

The names are tables of the families (`families.names`). Prefixes and factor keys belong to the formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.families import Family, families
from lora_engine.families.names import TRANSFORMER, NameTable, Target
from lora_engine.formats.transformers.fused import Rows, delta_shape, fuse_layers, split, swap_halves

Shapes = Mapping[str, Sequence[int]]


def transformers() -> list[Family]:
    """Returns the supported families whose denoiser is a transformer."""
    return [family for family in families.values() if family.is_supported and family.names is not None]


def table_of(family: Family) -> NameTable:
    """Returns the module names of a family's transformer; `family` has one."""
    if family.names is None:
        raise TypeError(f"{family.name!r} has no table of names")
    return family.names


def deltas_of(family: Family, target: Target, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
    """Yields canonical name and delta of each diffusers module of an original module.

    Args:
        family: The family of the transformer.
        target: The module in diffusers.
        delta: Its delta in the file.
        where: Location for errors.
        shapes: Known weight shapes of the base by canonical name.

    Raises:
        AdapterError: The delta cannot be split into the parts.
    """
    names = [f"{TRANSFORMER}.{path}" for path in target.parts]
    shape = delta_shape(delta)
    if len(names) == 1:
        swaps = family.swapped(target.original, shape or (0, 0))
        yield names[0], swap_halves(delta, where) if swaps else delta
        return
    if shape is None:
        parts = split(delta, [1] * len(names), where)  # a delta on the inputs is the same for all rows
        yield from ((name, part) for name, part in zip(names, parts, strict=True) if part is not None)
        return
    rows = [shapes[name][0] for name in names if name in shapes]
    if len(rows) < len(names):
        columns = shape[1] or shape[0] // sum(table_of(family).rows_of(target.parts, 1))
        rows = list(table_of(family).rows_of(target.parts, columns))
    if sum(rows) != shape[0]:
        raise AdapterError(
            f"the layer has {shape[0]} rows and {shape[1]} columns, which are not those of {', '.join(names)}",
            where=where,
            allowed=f"{' + '.join(map(str, rows))} = {sum(rows)} rows",
            remedy="name the base that the adapter was made for, or use another file",
        )
    for name, part in zip(names, split(delta, rows, where), strict=True):
        if part is not None:
            yield name, part


def originals(family: Family, modules: Mapping[str, Delta]) -> dict[str, Delta]:
    """Returns the deltas by original path; fuses the parts of fused layers.

    Args:
        family: The family of the transformer.
        modules: Deltas by canonical path inside the transformer.

    Raises:
        AdapterError: The original code lacks a module, or parts cannot be fused exactly.
    """
    originals: dict[str, Delta] = {}
    for path, delta in modules.items():
        target = table_of(family).original_of(path)
        if target is None:
            raise AdapterError(
                f"the original code of {family.title} has no module {path!r}",
                where=f"{TRANSFORMER}.{path}",
                remedy="choose a format with diffusers' names, such as diffusers or loraline",
            )
        if target.original in originals:
            continue
        where = f"{TRANSFORMER}.{path}"
        if len(target.parts) > 1:
            parts = [modules.get(part) for part in target.parts]
            originals[target.original] = fuse_layers(parts, _rows_of(family, target, parts, modules), where)
        else:
            swaps = family.swapped(target.original, delta_shape(delta) or (0, 0))
            originals[target.original] = swap_halves(delta, where) if swaps else delta
    return originals


def _rows_of(family: Family, target: Target, parts: Sequence[Delta | None], modules: Mapping[str, Delta]) -> Rows:
    shapes = [None if part is None else delta_shape(part) for part in parts]
    columns = next(
        (
            shape[1] or shape[0] // unit
            for shape, unit in zip(shapes, table_of(family).rows_of(target.parts, 1), strict=True)
            if shape
        ),
        0,
    )
    rows = list(table_of(family).rows_of(target.parts, columns))
    # A part without a delta takes the rows of the same part in another block.
    for number, (path, shape) in enumerate(zip(target.parts, shapes, strict=True)):
        if shape is not None:
            rows[number] = shape[0]
            continue
        tail = re.sub(r"\.\d+\.", ".*.", path, count=1)
        peers = (delta for name, delta in modules.items() if re.sub(r"\.\d+\.", ".*.", name, count=1) == tail)
        known = next(filter(None, map(delta_shape, peers)), None)
        rows[number] = known[0] if known else rows[number]
    return rows
