"""Defines the step `evaluate`: compares an adapter with its base and other versions, in metrics and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lora_engine.bases.source import BaseSource
from lora_engine.captioning.source import CaptionerModel, resolve_judge
from lora_engine.embedding.embedder_source import NO_EMBEDDER, EmbedderSource, choose_embedders, resolve_embedder
from lora_engine.evaluation.evidence import BASE, CANDIDATE, COMBINED, PRODUCTION
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.settings import AddedLater
from tasks.devices import gpu_slot
from tasks.imports import base_module
from tasks.spec import External, Input, StepSpec
from tasks.step import Context, locate_base, step

_MODELS = ("embedder", "image_embedder", "face_embedder", "judge")
_IMPORTED_LATER = ("bands", "copies", "distributions", "gate_file", "identity", "likeness", "subject")
_OUTSIDE_OF_KEY = {"name", *_MODELS}


class Evaluate(StepSpec, EvaluateSettings):
    """The adapter, the images and prompts to evaluate it on, what to compare it with, and the gates.

    Attributes:
        name: Name whose `production` is compared with; the default is the pipeline's.
        base: The base model.
        vae: The autoencoder that the adapter was trained with; None is the base's own.
        adapter: The adapter.
        dataset: Its training dataset, with the held-out images.
        heldout: Other datasets with held-out images; None takes those of `dataset`.
        prompts: File with one prompt per line; None takes the captions of the held-out images.
        against: Other versions to compare with: `production`, `name@version`, `name@alias` or a step.
        combined: Another adapter that the candidate is also drawn together with; compared with as `combined`.
        gate_file: File with further gates, as `gates: {...}`.
    """

    uses: Literal["evaluate"] = "evaluate"
    name: str = ""
    base: str
    vae: str | None = None
    adapter: Annotated[str, Input("adapter")]
    dataset: Annotated[str, Input("manifest")]
    heldout: Annotated[str | tuple[str, ...] | None, Input("manifest")] = None
    prompts: Annotated[str | None, External("file", kept=True)] = None
    against: Annotated[tuple[str, ...], AddedLater(), Field(max_length=8)] = ()
    combined: Annotated[str | None, AddedLater(), Input("adapter")] = None
    gate_file: Annotated[str | None, External("file", kept=True)] = None

    @model_validator(mode="after")
    def _gates_compare_with_what_is_drawn(self) -> Evaluate:
        if len(set(self.against)) < len(self.against) or {BASE, CANDIDATE, COMBINED} & set(self.against):
            raise ValueError(f"against is {list(self.against)}; name each version once, and not the base")
        versions = (BASE, *self.against, *([COMBINED] if self.combined else []))
        for name, gate in self.listed_gates():
            if gate.against not in versions:
                known = ", ".join(versions)
                raise ValueError(f"the gate {name!r} is against {gate.against!r}; allowed: {known}; add it to against")
        return self

    def references(self) -> Iterator[tuple[str, str, str]]:
        """Yields the references as `StepSpec` does, and those of `against`."""
        yield from super().references()
        yield from (("against", self.target_of(label), "adapter") for label in self.against)

    def target_of(self, label: str) -> str:
        """Returns the step or registered version that an entry of `against` names."""
        return f"{self.name}@{PRODUCTION}" if label == PRODUCTION else label

    def may_be_absent(self, field: str) -> bool:
        """Returns True for `against`: a first version has no production to compare with."""
        return field == "against"

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings without names: the digests of inputs and embedders are in the key."""
        return {name: value for name, value in super().key_settings().items() if name not in _OUTSIDE_OF_KEY}

    def earlier_key_settings(self) -> dict[str, Any]:
        """Returns `key_settings`: no result of an earlier release has this revision."""
        return self.key_settings()


def find_imports(spec: Evaluate, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that an evaluation imports, with that of its base."""
    yield "lora_engine.evaluation.run"
    yield from (f"lora_engine.evaluation.{name}" for name in _IMPORTED_LATER)
    yield base_module(spec.base, folder)


def find_models(spec: Evaluate, folder: Path, base: BaseSource | None) -> dict[str, Mapping[str, str]]:
    """Returns name and fingerprint of the embedders and the judge; `none` for one that is not used or not at hand."""
    if base is None:
        return {}
    settings = _located(spec, folder)
    chosen = choose_embedders(settings.embedder, settings.image_embedder, base)
    faces = resolve_embedder(settings.face_embedder) if settings.face_embedder else None
    judge = resolve_judge(settings.judge) if settings.judge else None
    found = zip(_MODELS, (chosen.text, chosen.image, faces, judge), strict=True)
    # Without an embedder of faces or a judge, the key is that of evaluations that cannot have one.
    optional = ("face_embedder", "judge")
    return {name: _describe(source) for name, source in found if source is not None or name not in optional}


def _describe(source: EmbedderSource | CaptionerModel | None) -> dict[str, str]:
    if source is None:
        return {"name": NO_EMBEDDER, "label": NO_EMBEDDER, "fingerprint": NO_EMBEDDER}
    name = source.name if isinstance(source, EmbedderSource) else source.pinned
    return {"name": name, "label": source.label, "fingerprint": source.fingerprint()}


def _located(spec: Evaluate, folder: Path) -> EvaluateSettings:
    """Returns the settings with the paths of embedders, which are relative to the pipeline file."""
    names = {field: getattr(spec, field) for field in _MODELS}
    located = {field: locate_base(name, folder) for field, name in names.items() if name and name != NO_EMBEDDER}
    return spec.narrow(EvaluateSettings).model_copy(update=located)


@step(
    Evaluate,
    produces="report",
    revision=2,
    imports=find_imports,
    entries=lambda spec: [(METRICS, name) for name in METRICS],
    models=find_models,
    takes_device=True,
)
def evaluate(spec: Evaluate, context: Context) -> None:
    """Writes the report: metrics with intervals, gates and images."""
    from lora_engine.evaluation.gate_file import combine_gates, read_gates
    from lora_engine.evaluation.prompts import read_prompts
    from lora_engine.evaluation.run import evaluate as run_evaluation

    prompts = read_prompts(context.files["prompts"]) if "prompts" in context.files else ()
    settings = _located(spec, context.folder_of_spec)
    if "gate_file" in context.files:
        gates = combine_gates(settings.gates, read_gates(context.files["gate_file"]))
        settings = settings.model_copy(update={"gates": gates})
    absent = {
        label: context.absent[target] for label in spec.against if (target := spec.target_of(label)) in context.absent
    }
    present = [label for label in spec.against if label not in absent]
    with gpu_slot(context.home, "auto", context.concurrency, context.name, context.resources):
        run_evaluation(
            settings,
            context.base(spec.base),
            context.folder("adapter"),
            context.folder("dataset"),
            context.out,
            heldout=context.inputs.get("heldout", ()),
            vae=context.base(spec.vae) if spec.vae else None,
            prompts=prompts,
            against=dict(zip(present, context.inputs.get("against", ()), strict=True)),
            absent=absent,
            combined=context.optional("combined"),
            progress=context.progress,
        )
