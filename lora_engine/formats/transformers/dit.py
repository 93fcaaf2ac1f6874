"""Diffusion transformers (`TransformerNames`): how the modules of their original code are called in diffusers, and back.

One literal table a family, in a file of its own; here is how names are looked up in it and how fused layers are taken
apart. Prefixes and factor names are the formats' affair.
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
    """One kind of repeated block.

    Attributes:
        original: What the original code calls the list of blocks.
        canonical: What diffusers calls it.
        modules: Original name inside a block to the names in diffusers; several where the layer is fused.
    """

    original: str
    canonical: str
    modules: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Place:
    """A module of the original code in diffusers' tree.

    Attributes:
        parts: The paths there, in the order of the rows.
        original: The original path, with dots; empty where the file has the path in diffusers.
    """

    parts: tuple[str, ...]
    original: str = ""


@dataclass(frozen=True)
class NameTable:
    """The names of one component, both ways.

    Attributes:
        blocks: Of its repeated blocks.
        outside: Original name to that in diffusers, for what is in no block.
    """

    blocks: tuple[Blocks, ...]
    outside: Mapping[str, str]

    def find(self, path: str, separator: str = ".") -> Place | None:
        """The place of a module by its original path, dotted or flattened with another separator."""
        return self._find(path, self._tables(separator)[0])

    def find_canonical(self, path: str, separator: str = ".") -> str | None:
        """The path in diffusers of one that is written with another separator; None for a stranger."""
        place = self._find(path, self._tables(separator)[1])
        return place.parts[0] if place else None

    def original_of(self, path: str) -> Place | None:
        """The place of the original module that a path in diffusers is in, with all its parts; None for a stranger."""
        if path in self._outside_back:
            return Place((path,), self._outside_back[path])
        for block, back in self._blocks_back:
            match = re.fullmatch(rf"{re.escape(block.canonical)}\.(\d{{1,4}})\.(.+)", path)
            if match and match[2] in back:
                return _place(block, back[match[2]], block.modules[back[match[2]]], int(match[1]))
        return None

    def _find(self, path: str, table: _Table) -> Place | None:
        if path in table.outside:
            name, found = table.outside[path]
            return Place((found,), name)
        for pattern, block, modules in table.blocks:
            match = pattern.fullmatch(path)
            if match and match[2] in modules:
                return _place(block, *modules[match[2]], int(match[1]))
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
    """A `NameTable` in which names are looked up as one separator writes them; the values keep the dotted name."""

    outside: Mapping[str, tuple[str, str]]
    blocks: list[tuple[re.Pattern[str], Blocks, Mapping[str, tuple[str, tuple[str, ...]]]]]


def _table(separator: str, outside: Mapping[str, str], blocks: Iterable[Blocks]) -> _Table:
    def written(path: str) -> str:
        return path.replace(".", separator)

    mark = re.escape(separator)
    return _Table(
        {written(name): (name, path) for name, path in outside.items()},
        [
            (
                re.compile(rf"{re.escape(written(block.original))}{mark}(\d{{1,4}}){mark}(.+)"),
                block,
                {written(name): (name, parts) for name, parts in _with_single_parts(block)},
            )
            for block in blocks
        ],
    )


def _with_single_parts(block: Blocks) -> Iterator[tuple[str, tuple[str, ...]]]:
    # OneTrainer has fused layers in their parts: `qkv.0` to `qkv.2`, and `linear1.3` for what follows them.
    for name, parts in block.modules.items():
        yield name, parts
        if len(parts) > 1:
            yield from ((f"{name}.{number}", (part,)) for number, part in enumerate(parts))


def _place(block: Blocks, name: str, parts: Sequence[str], number: int) -> Place:
    paths = tuple(f"{block.canonical}.{number}.{part}" for part in parts)
    return Place(paths, f"{block.original}.{number}.{name}")


@dataclass(frozen=True)
class TransformerNames:
    """What the formats have to know of one family of diffusion transformers.

    Attributes:
        name: Of the family.
        title: For people.
        names: Of the transformer's modules.
        mark: Pattern of flattened names that only this family has among those of `transformer_names`.
        widths: Of the published models; they tell a family where the names do not.
        rows: From the path of a fused layer, its parts and its columns to the rows of each part.
        swapped: Whether the path's halves of rows change places, by the original path and the weight's shape.
        text: Component of each text encoder to its role (see `TEXT_NAMES`), in the order in which files number them.
        version: What kohya's header calls the base.
        architecture: What `modelspec.architecture` calls it.
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

    def deltas_of(self, place: Place, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
        """The canonical modules of an original one, and their deltas.

        Args:
            place: Where it is in diffusers.
            delta: Its delta in the file.
            where: What an error names.
            shapes: Weights of the base by canonical name, as far as they are known.

        Raises:
            AdapterError: The delta cannot be divided among the parts.
        """
        names = [f"{TRANSFORMER}.{path}" for path in place.parts]
        shape = delta_shape(delta)
        if len(names) == 1:
            swaps = self.swapped(place.original, shape or (0, 0))
            yield names[0], swap_halves(delta, where) if swaps else delta
            return
        if shape is None:
            parts = split(delta, [1] * len(names), where)  # what acts on the inputs is the same for all rows
            yield from ((name, part) for name, part in zip(names, parts, strict=True) if part is not None)
            return
        rows = [shapes[name][0] for name in names if name in shapes]
        if len(rows) < len(names):
            columns = shape[1] or shape[0] // sum(self.rows(place.parts, 1))
            rows = list(self.rows(place.parts, columns))
        if sum(rows) != shape[0]:
            raise AdapterError(
                f"the layer has {shape[0]} rows and {shape[1]} columns, which are not those of {', '.join(names)}",
                where=where,
                allowed=f"{' + '.join(map(str, rows))} = {sum(rows)} rows",
                remedy="name the base that the adapter was made for, or ask for another file",
            )
        for name, part in zip(names, split(delta, rows, where), strict=True):
            if part is not None:
                yield name, part

    def originals(self, modules: Mapping[str, Delta]) -> dict[str, Delta]:
        """The deltas by original path, with those of fused layers put together.

        Args:
            modules: Deltas by canonical path inside the transformer.

        Raises:
            AdapterError: A module that the original code has not, or parts that cannot be put together exactly.
        """
        found: dict[str, Delta] = {}
        for path, delta in modules.items():
            place = self.names.original_of(path)
            if place is None:
                raise AdapterError(
                    f"the original code of {self.title} has no module {path!r}",
                    where=f"{TRANSFORMER}.{path}",
                    remedy="choose a format with diffusers' names, such as diffusers or loraline",
                )
            if place.original in found:
                continue
            where = f"{TRANSFORMER}.{path}"
            if len(place.parts) > 1:
                parts = [modules.get(part) for part in place.parts]
                found[place.original] = fuse(parts, self._rows_of(place, parts, modules), where)
            else:
                swaps = self.swapped(place.original, delta_shape(delta) or (0, 0))
                found[place.original] = swap_halves(delta, where) if swaps else delta
        return found

    def _rows_of(self, place: Place, parts: Sequence[Delta | None], modules: Mapping[str, Delta]) -> Rows:
        shapes = [None if part is None else delta_shape(part) for part in parts]
        columns = next(
            (
                shape[1] or shape[0] // unit
                for shape, unit in zip(shapes, self.rows(place.parts, 1), strict=True)
                if shape
            ),
            0,
        )
        usual = list(self.rows(place.parts, columns))
        # A part that this block lacks has as many rows as the same part of another block.
        for number, (path, shape) in enumerate(zip(place.parts, shapes, strict=True)):
            if shape is not None:
                usual[number] = shape[0]
                continue
            tail = re.sub(r"\.\d+\.", ".*.", path, count=1)
            alike = (delta for other, delta in modules.items() if re.sub(r"\.\d+\.", ".*.", other, count=1) == tail)
            known = next(filter(None, map(delta_shape, alike)), None)
            usual[number] = known[0] if known else usual[number]
        return usual


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
"""Names of a text encoder's modules, by what it is: CLIP ViT-L/14, OpenCLIP ViT-bigG/14, T5 v1.1 XXL."""
