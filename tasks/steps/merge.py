"""`merge`: several adapters become one that does what they do together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lora_engine.merging.spec import SPECS, AnyMergeOptions, Concatenate, Weight
from tasks.imports import base_module
from tasks.spec import Input, StepSpec
from tasks.step import Context, step


class Merge(StepSpec):
    """Which adapters, each with which weight, and by which method.

    `concatenate` and `linear` are exact: the result's effect is the weighted sum of theirs. A weight is a number, or
    numbers by pattern over module names. What is set about the method stands beside it or under `options`.
    """

    uses: Literal["merge"] = "merge"
    base: str | None = None
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    adapters: Annotated[tuple[str, ...], Input("adapter"), Field(min_length=1)]
    weights: tuple[Weight, ...] | None = None
    method: Literal[
        "concatenate",
        "linear",
        "interpolate",
        "svd",
        "ties",
        "dare",
        "dare-ties",
        "della",
        "magnitude-prune",
        "slerp",
        "model-stock",
        "geometric-median",
        "learned",
    ] = "concatenate"
    options: AnyMergeOptions = Concatenate()
    dataset: Annotated[str | None, Input("manifest")] = None

    @model_validator(mode="before")
    @classmethod
    def _options_may_stand_beside(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # From here on the values are taken for Python's, in which a list is no tuple.
        data = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        method = data.get("method", "concatenate")
        options = data.get("options", {})
        if not isinstance(method, str) or method not in SPECS or not isinstance(options, dict):
            return data
        own = SPECS[method].model_fields.keys() - {"method"}
        beside = {name: value for name, value in data.items() if name in own}
        twice = sorted(beside.keys() & options.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} stands both beside the method and under options; leave one out")
        rest = {name: value for name, value in data.items() if name not in own}
        return {**rest, "options": {"method": method, **options, **beside}}

    @model_validator(mode="after")
    def _one_weight_an_adapter(self) -> Merge:
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.adapters)} adapters; give one weight an adapter"
            )
        return self

    @model_validator(mode="after")
    def _options_are_of_the_method(self) -> Merge:
        if self.options.method != self.method:
            raise ValueError(f"options are of method {self.options.method!r}, and method is {self.method!r}")
        return self

    @model_validator(mode="after")
    def _learned_has_pictures(self) -> Merge:
        if (self.method == "learned") != (self.dataset is not None):
            raise ValueError("dataset belongs to method 'learned', and learned needs one")
        return self


def find_imports(spec: Merge, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that a merge imports; that of its base where the base is certain to be loaded."""
    yield "lora_engine.merging.files"
    if spec.method == "learned" and spec.base is not None:
        yield base_module(spec.base, folder)


@step(Merge, produces="adapter", revision=3, imports=find_imports)
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
    )
