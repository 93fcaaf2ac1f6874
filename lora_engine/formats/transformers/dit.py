"""Maps the original module names of diffusion transformers to diffusers' names and back.

Each family has a literal table in its own file. This module looks names up in it and splits fused layers. Prefixes and
factor keys belong to the formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError
from lora_engine.formats.transformers.fused import Rows, delta_shape, fuse, split, swap_halves
from lora_engine.registries import Registry

TRANSFORMER = "transformer"
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Blocks:
    """One type of repeated block.

    Attributes:
        original: Name of the list of blocks in the original code.
        canonical: Its name in diffusers.
        modules: Original name inside a block to the names in diffusers; several if the layer is fused.
    """

    original: str
    canonical: str
    modules: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Target:
    """The diffusers modules that a module of a file corresponds to.

    Attributes:
        parts: Paths in diffusers, in the order of the rows.
        original: Original path, with dots; empty if the file uses diffusers' path.
    """

    parts: tuple[str, ...]
    original: str = ""


@dataclass(frozen=True)
class NameTable:
    """The original and diffusers' names of one component.

    Attributes:
        blocks: Names of its repeated blocks.
        outside: Original name to diffusers' name, for modules outside blocks.
    """

    blocks: tuple[Blocks, ...]
    outside: Mapping[str, str]

    def find(self, path: str, separator: str = ".") -> Target | None:
        """Returns the target of a module by its original path, written with the separator; None if unknown."""
        return self._find(path, self._tables(separator)[0])

    def find_canonical(self, path: str, separator: str = ".") -> str | None:
        """Returns the path in diffusers of a path that is written with the separator; None if unknown."""
        target = self._find(path, self._tables(separator)[1])
        return target.parts[0] if target else None

    def original_of(self, path: str) -> Target | None:
        """Returns the target of the original module that contains a diffusers path, with all parts; None if unknown."""
        if path in self._outside_back:
            return Target((path,), self._outside_back[path])
        for block, back in self._blocks_back:
            match = re.fullmatch(rf"{re.escape(block.canonical)}\.(\d{{1,4}})\.(.+)", path)
            if match and match[2] in back:
                return _target(block, back[match[2]], block.modules[back[match[2]]], int(match[1]))
        return None

    def _find(self, path: str, table: _Table) -> Target | None:
        if path in table.outside:
            name, canonical = table.outside[path]
            return Target((canonical,), name)
        for pattern, block, modules in table.blocks:
            match = pattern.fullmatch(path)
            if match and match[2] in modules:
                return _target(block, *modules[match[2]], int(match[1]))
        return None

    @cached_property
    def _by_separator(self) -> dict[str, tuple[_Table, _Table]]:
        return {}

    def _tables(self, separator: str) -> tuple[_Table, _Table]:
        if separator not in self._by_separator:
            own = [
                Blocks(b.canonical, b.canonical, {p: (p,) for ps in b.modules.values() for p in ps})
                for b in self.blocks
            ]
            self._by_separator[separator] = (
                _table(separator, self.outside, self.blocks),
                _table(separator, {path: path for path in self.outside.values()}, own),
            )
        return self._by_separator[separator]

    @cached_property
    def _outside_back(self) -> dict[str, str]:
        return {path: original for original, path in self.outside.items()}

    @cached_property
    def _blocks_back(self) -> list[tuple[Blocks, dict[str, str]]]:
        return [(b, {part: name for name, parts in b.modules.items() for part in parts}) for b in self.blocks]


@dataclass(frozen=True)
class _Table:
    """A `NameTable` indexed by names with one separator; the values keep the dotted names."""

    outside: Mapping[str, tuple[str, str]]
    blocks: list[tuple[re.Pattern[str], Blocks, Mapping[str, tuple[str, tuple[str, ...]]]]]


def _table(separator: str, outside: Mapping[str, str], blocks: Iterable[Blocks]) -> _Table:
    def written(path: str) -> str:
        return path.replace(".", separator)

    sep = re.escape(separator)
    return _Table(
        {written(name): (name, path) for name, path in outside.items()},
        [
            (
                re.compile(rf"{re.escape(written(block.original))}{sep}(\d{{1,4}}){sep}(.+)"),
                block,
                {written(name): (name, parts) for name, parts in _with_single_parts(block)},
            )
            for block in blocks
        ],
    )


def _with_single_parts(block: Blocks) -> Iterator[tuple[str, tuple[str, ...]]]:
    # OneTrainer stores fused layers as parts: `qkv.0` to `qkv.2`, and `linear1.3` for the part after them.
    for name, parts in block.modules.items():
        yield name, parts
        if len(parts) > 1:
            yield from ((f"{name}.{number}", (part,)) for number, part in enumerate(parts))


def _target(block: Blocks, name: str, parts: Sequence[str], number: int) -> Target:
    paths = tuple(f"{block.canonical}.{number}.{part}" for part in parts)
    return Target(paths, f"{block.original}.{number}.{name}")


@dataclass(frozen=True)
class TransformerNames:
    """The names and layer shapes of one family of diffusion transformers.

    Attributes:
        name: Name of the family.
        title: Name in messages.
        names: Names of the transformer's modules.
        mark: Pattern of flattened names that only this family has among `transformer_names`.
        widths: Widths of the published models; they identify the family if the names do not.
        rows: From a fused layer's parts and columns to the rows of each part.
        swapped: From an original path and the weight's shape to True if diffusers swaps the halves of its rows.
        text: Component of each text encoder to its role (see `TEXT_NAMES`), in the order in which files number them.
        version: Name of the base in kohya's header.
        architecture: Name of the base in `modelspec.architecture`.
    """

    name: str
    title: str
    names: NameTable
    mark: str
    widths: Collection[int]
    rows: Callable[[Sequence[str], int], Rows]
    swapped: Callable[[str, tuple[int, int]], bool]
    text: Mapping[str, str]
    version: str
    architecture: str

    def deltas_of(self, target: Target, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
        """Yields canonical name and delta of each diffusers module of an original module.

        Args:
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
            swaps = self.swapped(target.original, shape or (0, 0))
            yield names[0], swap_halves(delta, where) if swaps else delta
            return
        if shape is None:
            parts = split(delta, [1] * len(names), where)  # a delta on the inputs is the same for all rows
            yield from ((name, part) for name, part in zip(names, parts, strict=True) if part is not None)
            return
        rows = [shapes[name][0] for name in names if name in shapes]
        if len(rows) < len(names):
            columns = shape[1] or shape[0] // sum(self.rows(target.parts, 1))
            rows = list(self.rows(target.parts, columns))
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

    def originals(self, modules: Mapping[str, Delta]) -> dict[str, Delta]:
        """Returns the deltas by original path; fuses the parts of fused layers.

        Args:
            modules: Deltas by canonical path inside the transformer.

        Raises:
            AdapterError: The original code lacks a module, or parts cannot be fused exactly.
        """
        originals: dict[str, Delta] = {}
        for path, delta in modules.items():
            target = self.names.original_of(path)
            if target is None:
                raise AdapterError(
                    f"the original code of {self.title} has no module {path!r}",
                    where=f"{TRANSFORMER}.{path}",
                    remedy="choose a format with diffusers' names, such as diffusers or loraline",
                )
            if target.original in originals:
                continue
            where = f"{TRANSFORMER}.{path}"
            if len(target.parts) > 1:
                parts = [modules.get(part) for part in target.parts]
                originals[target.original] = fuse(parts, self._rows_of(target, parts, modules), where)
            else:
                swaps = self.swapped(target.original, delta_shape(delta) or (0, 0))
                originals[target.original] = swap_halves(delta, where) if swaps else delta
        return originals

    def _rows_of(self, target: Target, parts: Sequence[Delta | None], modules: Mapping[str, Delta]) -> Rows:
        shapes = [None if part is None else delta_shape(part) for part in parts]
        columns = next(
            (
                shape[1] or shape[0] // unit
                for shape, unit in zip(shapes, self.rows(target.parts, 1), strict=True)
                if shape
            ),
            0,
        )
        rows = list(self.rows(target.parts, columns))
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


transformer_names: Registry[TransformerNames] = Registry("family of diffusion transformers")

CLIP = NameTable(
    blocks=(
        Blocks(
            "text_model.encoder.layers",
            "text_model.encoder.layers",
            {
                name: (name,)
                for name in (
                    "self_attn.q_proj",
                    "self_attn.k_proj",
                    "self_attn.v_proj",
                    "self_attn.out_proj",
                    "mlp.fc1",
                    "mlp.fc2",
                    "layer_norm1",
                    "layer_norm2",
                )
            },
        ),
    ),
    outside={
        name: name
        for name in (
            "text_model.embeddings.token_embedding",
            "text_model.embeddings.position_embedding",
            "text_model.final_layer_norm",
            "text_projection",
        )
    },
)
T5 = NameTable(
    blocks=(
        Blocks(
            "encoder.block",
            "encoder.block",
            {
                name: (name,)
                for name in (
                    "layer.0.SelfAttention.q",
                    "layer.0.SelfAttention.k",
                    "layer.0.SelfAttention.v",
                    "layer.0.SelfAttention.o",
                    "layer.0.SelfAttention.relative_attention_bias",
                    "layer.0.layer_norm",
                    "layer.1.DenseReluDense.wi_0",
                    "layer.1.DenseReluDense.wi_1",
                    "layer.1.DenseReluDense.wo",
                    "layer.1.layer_norm",
                )
            },
        ),
    ),
    outside={name: name for name in ("shared", "encoder.embed_tokens", "encoder.final_layer_norm")},
)
TEXT_NAMES: Mapping[str, NameTable] = {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5}
"""Text encoder role to module names: CLIP ViT-L/14, OpenCLIP ViT-bigG/14, T5 v1.1 XXL."""
