"""Defines the step `combine`: several manifests as one, each with settings of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from lora_engine.data.combine import CombineSettings, PartSettings
from tasks.spec import Input, StepSpec
from tasks.step import Context, always, step


def add_parts(schema: dict[str, Any]) -> None:
    """Lets the JSON Schema of a combination have settings beside the names of datasets."""
    part = PartSettings.model_json_schema()
    part["properties"] = {"from": {"type": "string"}, **part["properties"]}
    entry = {"anyOf": [{"type": "string"}, part | {"required": ["from"]}]}
    schema["properties"]["datasets"]["items"] = entry


class Combine(StepSpec, CombineSettings):
    """The datasets, in the form `[{from: STEP, repeats: 2, weight: 0.5}, STEP]`.

    Attributes:
        datasets: The steps with the datasets, each with the settings of `parts` beside `from`, if any.
    """

    model_config = ConfigDict(json_schema_extra=add_parts)

    uses: Literal["combine"] = "combine"
    datasets: Annotated[tuple[str, ...], Input("manifest"), Field(min_length=1, max_length=100)]

    @model_validator(mode="before")
    @classmethod
    def _separate_settings(cls, data: Any) -> Any:
        entries = data.get("datasets") if isinstance(data, dict) else None
        if not isinstance(entries, list | tuple) or not any(isinstance(entry, dict) for entry in entries):
            return data if entries is None else {**data, "datasets": tuple(entries)} | _parts(data)
        if "parts" in data:
            raise ValueError("parts is set beside the settings of the datasets; remove one")
        names = tuple(entry.get("from") if isinstance(entry, dict) else entry for entry in entries)
        own = [{k: v for k, v in entry.items() if k != "from"} if isinstance(entry, dict) else {} for entry in entries]
        return {
            **data,
            "datasets": names,
            "parts": tuple(PartSettings.model_validate(part, strict=True) for part in own),
        }

    @model_validator(mode="after")
    def _every_dataset_has_settings(self) -> Combine:
        if self.parts and len(self.parts) != len(self.datasets):
            raise ValueError(f"{len(self.parts)} parts for {len(self.datasets)} datasets; give one per dataset")
        return self


def _parts(data: dict[str, Any]) -> dict[str, Any]:
    return {"parts": tuple(data["parts"])} if isinstance(data.get("parts"), list) else {}


@step(Combine, produces="manifest", revision=1, imports=always("lora_engine.data.combine"))
def combine(spec: Combine, context: Context) -> None:
    """Writes a manifest with the images of all datasets."""
    from lora_engine.data.combine import combine_datasets

    combine_datasets(context.inputs["datasets"], context.out, spec.narrow(CombineSettings))
