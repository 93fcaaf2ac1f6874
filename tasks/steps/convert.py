"""Defines the step `convert`: writes an adapter in the formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lora_engine.catalog.formats import FORMATS, written_formats
from lora_engine.files import atomic_write, canonical_json
from lora_engine.registries import names_of
from registry.entities import ArtifactRef
from registry.home import Home
from tasks.imports import base_module
from tasks.spec import Input, StepSpec
from tasks.step import Context, step

if TYPE_CHECKING:
    from lora_engine.formats import Card

    FormatName = str
else:
    FormatName = names_of(written_formats())


LICENSE = "license.json"


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


def has_same_license(home: Home, summary: bytes) -> bool:
    """Returns True if the written files state the license that they must have now.

    It follows from lineage and from the home's table of licenses, which no cache key covers.
    """
    written = json.loads(summary)
    adapter = ArtifactRef(written["adapter"]["kind"], written["adapter"]["sha256"], written["adapter"]["size"])
    return bool(_find_license(home, adapter, written["stated"], written["datasets"]) == written["license"])


def _find_license(
    home: Home, adapter: ArtifactRef, stated: str | None, datasets: dict[str, list[Mapping[str, Any]]]
) -> str | None:
    """Returns the license that files of an adapter must state; see `inherited_license`."""
    from registry.context import RegistryContext
    from registry.policy.rights import inherited_license

    with closing(RegistryContext(home)) as context:
        return inherited_license(context, adapter, stated, datasets=datasets)


@step(
    Convert,
    produces="export",
    revision=5,
    summary=LICENSE,
    is_still_valid=has_same_license,
    imports=find_imports,
    entries=lambda spec: [(FORMATS, name) for name in spec.to],
)
def convert(spec: Convert, context: Context) -> None:
    """Writes one folder per format, `exports.json`, which lists the files of each, and `license.json`, their license.

    If a format required approximation, `approximations.json` has the share of each module that is kept.
    """
    from lora_engine.adapters import module_shapes
    from lora_engine.bases.base import load_base
    from lora_engine.formats import read_bundle, write_adapter
    from lora_engine.formats.dtypes import dtype_of
    from lora_engine.merging.approximate import approximate

    bundle = read_bundle(context.folder("adapter") / "adapter.safetensors")
    card = _state_license(context, bundle.card)
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
            card=card,
            dtype=dtype_of(spec.dtype),
            embeddings=bundle.embeddings,
            module_names=names,
        )
        exports[name] = sorted(path.relative_to(context.out).as_posix() for path in written)
    atomic_write(context.out / "exports.json", canonical_json(exports))
    if approximations:
        atomic_write(context.out / "approximations.json", canonical_json(approximations))


def _state_license(context: Context, card: Card) -> Card:
    """Returns the card with the license that the files must state, and writes `license.json`."""
    from lora_engine.formats.card import restate

    adapter, datasets = context.refs["adapter"][0], dict[str, list[Mapping[str, Any]]]()
    license_expression = _find_license(context.home, adapter, card.license, datasets)
    written = {"adapter": vars(adapter), "stated": card.license, "license": license_expression, "datasets": datasets}
    atomic_write(context.out / LICENSE, canonical_json(written))
    return restate(card, license_expression=license_expression)
