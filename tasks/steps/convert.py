"""Defines the step `convert`: writes an adapter in the formats of other programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lora_engine.catalog.formats import FORMATS, written_formats
from lora_engine.files import atomic_write, canonical_json
from lora_engine.registries import names_of
from tasks.imports import base_module
from tasks.spec import Input, StepSpec
from tasks.step import Context, step

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = names_of(written_formats())


class Convert(StepSpec):
    """The adapter and the target formats.

    With `approximate`, kinds that a format cannot hold become LoRA of at most `rank` that keep `energy` of their norm.
    """

    uses: Literal["convert"] = "convert"
    base: str | None = None
    adapter: Annotated[str, Input("adapter")]
    to: Annotated[tuple[FormatName, ...], Field(min_length=1)]
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    approximate: bool = False
    rank: int | None = Field(default=None, ge=1, le=65536)
    energy: float | None = Field(default=None, gt=0, le=1)


def needs_base(spec: Convert) -> bool:
    """Returns True if the conversion loads its base, for values or for module names."""
    return spec.approximate or any(FORMATS[name].numbers_modules for name in spec.to)


def find_imports(spec: Convert, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that a conversion imports, with that of the base if it is loaded."""
    yield from ("lora_engine.bases.base", "lora_engine.formats.dtypes", "lora_engine.merging.approximate")
    if spec.base is not None and needs_base(spec):
        yield base_module(spec.base, folder)


@step(
    Convert,
    produces="export",
    revision=4,
    imports=find_imports,
    entries=lambda spec: [(FORMATS, name) for name in spec.to],
)
def convert(spec: Convert, context: Context) -> None:
    """Writes one folder per format, and `exports.json`, which lists the files of each.

    If a format required approximation, `approximations.json` has the share of each module that is kept.
    """
    from lora_engine.adapters import module_shapes
    from lora_engine.bases.base import load_base
    from lora_engine.formats import read_bundle, write_adapter
    from lora_engine.formats.dtypes import dtype_of
    from lora_engine.merging.approximate import approximate

    bundle = read_bundle(context.folder("adapter") / "adapter.safetensors")
    base = load_base(context.base(spec.base), device="cpu") if spec.base is not None and needs_base(spec) else None
    names = None if base is None else module_shapes(base)
    exports, approximations = {}, {}
    for name in spec.to:
        adapter = bundle.adapter
        if spec.approximate:
            approximation = approximate(
                adapter, name, rank=spec.rank, energy=spec.energy, base=base, module_names=names
            )
            adapter = approximation.adapter
            if approximation.retained:
                approximations[name] = {"retained": approximation.total, "modules": dict(approximation.retained)}
        written = write_adapter(
            context.out / name,
            adapter,
            format=name,
            card=bundle.card,
            dtype=dtype_of(spec.dtype),
            embeddings=bundle.embeddings,
            module_names=names,
        )
        exports[name] = sorted(path.relative_to(context.out).as_posix() for path in written)
    atomic_write(context.out / "exports.json", canonical_json(exports))
    if approximations:
        atomic_write(context.out / "approximations.json", canonical_json(approximations))
