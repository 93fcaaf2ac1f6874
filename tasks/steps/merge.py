"""Defines the step `merge`: merges several adapters into one with their combined effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from lora_engine.merging.methods import METHODS
from lora_engine.merging.methods.sums import Concatenate
from lora_engine.merging.spec import MergeOptions, Weight
from lora_engine.registries import names_of, spec_union
from tasks.imports import base_module
from tasks.spec import Input, StepSpec
from tasks.step import Context, step

if TYPE_CHECKING:
    MethodName = str
    AnyMergeOptions = MergeOptions
else:
    MethodName = names_of(METHODS)
    AnyMergeOptions = spec_union(METHODS, "method")


def add_inline_options(schema: dict[str, Any]) -> None:
    """Adds the methods' options to the JSON Schema of a merge, because they may be set beside the method."""
    for method in METHODS.values():
        for name, option in method.spec.model_json_schema()["properties"].items():
            if name not in schema["properties"]:
                schema["properties"][name] = {key: value for key, value in option.items() if key != "default"}


class Merge(StepSpec):
    """The adapters, the weight of each, and the method.

    `concatenate` and `linear` are exact: the result's effect is the weighted sum of the adapters' effects. A weight is
    a number, or numbers by pattern over module names. Options of the method are set beside it or under `options`.
    """

    model_config = ConfigDict(json_schema_extra=add_inline_options)

    uses: Literal["merge"] = "merge"
    base: str | None = None
    vae: str | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    adapters: Annotated[tuple[str, ...], Input("adapter"), Field(min_length=1)]
    weights: tuple[Weight, ...] | None = None
    method: MethodName = "concatenate"
    options: AnyMergeOptions = Concatenate()
    dataset: Annotated[str | None, Input("manifest")] = None

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # Values from a `before` validator are validated as Python objects, and strict mode refuses a list for a tuple.
        data = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        method = data.get("method", "concatenate")
        options = data.get("options", {})
        if not isinstance(method, str) or method not in METHODS or not isinstance(options, dict):
            return data
        own = METHODS[method].spec.model_fields.keys() - {"method"}
        inline = {name: value for name, value in data.items() if name in own}
        duplicates = sorted(inline.keys() & options.keys())
        if duplicates:
            raise ValueError(f"{', '.join(duplicates)} is set both beside the method and under options; remove one")
        # The file's autoencoder is inherited; only methods that learn read one.
        unread = own if METHODS[method].learn is not None else {*own, "vae"}
        rest = {name: value for name, value in data.items() if name not in unread}
        return {**rest, "options": {"method": method, **options, **inline}}

    @model_validator(mode="after")
    def _check_weights(self) -> Merge:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters; give one weight per adapter"
            )
        return self

    @model_validator(mode="after")
    def _check_options(self) -> Merge:
        if self.options.name != self.method:
            raise ValueError(f"options are for method {self.options.name!r}, but method is {self.method!r}")
        return self

    @model_validator(mode="after")
    def _check_dataset(self) -> Merge:
        if self.learns != (self.dataset is not None):
            learning = ", ".join(name for name, method in METHODS.items() if method.learn)
            needs = "needs a dataset" if self.learns else "takes no dataset"
            raise ValueError(f"method {self.method!r} {needs}; only methods that learn the weights do ({learning})")
        return self

    @property
    def learns(self) -> bool:
        """Returns True if the method learns the weights, from the base and captioned images."""
        return METHODS[self.method].learn is not None


def find_imports(spec: Merge, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that a merge imports, with that of the base if it is always loaded."""
    yield "lora_engine.merging.files"
    if spec.learns and spec.base is not None:
        yield base_module(spec.base, folder)


@step(Merge, produces="adapter", revision=4, imports=find_imports, entries=lambda spec: [(METHODS, spec.method)])
def merge(spec: Merge, context: Context) -> None:
    """Writes the merged adapter."""
    from lora_engine.merging.files import merge_files

    files = [folder / "adapter.safetensors" for folder in context.inputs["adapters"]]
    merge_files(
        files,
        spec.weights or (1.0,) * len(files),
        context.out / "adapter.safetensors",
        method=spec.method,
        options=spec.options,
        seed=spec.seed,
        base=None if spec.base is None else context.base(spec.base),
        dataset=context.optional("dataset"),
        work=context.work,
        vae=context.base(spec.vae) if spec.vae else None,
    )
