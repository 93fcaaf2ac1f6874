"""Transformers with the blocks of FLUX.1 in other numbers, which are only recognized: Bria, LongCat, Ovis, Motif.

In diffusers their modules have the names of FLUX.1's, so a part of such a file is ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_engine.families.double_stream import DOUBLE_SHAPES, SINGLE_SHAPES
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import NameTable, same_blocks

_SINGLE_SHAPES = {name: shape for name, shape in SINGLE_SHAPES.items() if name != "attn.to_out.0"}
_GATED = dict.fromkeys(("ff.net.0.proj", "ff_context.net.0.proj"), "8w w")
_NO_SHAPES: Mapping[str, str] = {}


def _family(
    name: str,
    title: str,
    sizes: Mapping[str, tuple[int, int, int]],
    header: str,
    *,
    double: Mapping[str, str] = _NO_SHAPES,
    single: Mapping[str, str] = _NO_SHAPES,
) -> Family:
    """Returns a family by the double blocks, single blocks and width of its sizes, and by shapes unlike FLUX.1's."""
    blocks = {
        "transformer_blocks": {**DOUBLE_SHAPES, **double},
        "single_transformer_blocks": {**_SINGLE_SHAPES, **single},
    }
    return Family(
        name=name,
        title=title,
        names=NameTable(tuple(same_blocks(shapes, path) for path, shapes in blocks.items())),
        sizes=tuple(
            Size(size, dict(zip(blocks, counts, strict=True)), {"w": width}) for size, (*counts, width) in sizes.items()
        ),
        header=header,
    )


for _entry in (
    _family("bria", "Bria", {"Bria 3.2": (8, 28, 3072), "FIBO": (8, 38, 3072)}, r"bria.*|fibo.*"),
    _family("longcat_image", "LongCat-Image", {"LongCat-Image": (10, 20, 3072)}, r"longcat_?image.*"),
    _family(
        "ovis_image",
        "Ovis-Image",
        {"Ovis-Image": (6, 27, 3072)},
        r"ovis_?image.*",
        double=_GATED,
        single={"proj_mlp": "8w w"},
    ),
    _family("motif_video", "Motif-Video", {"Motif-Video 2B": (12, 24, 1536)}, r"motif_?video.*"),
):
    families.add(_entry.name, _entry)
