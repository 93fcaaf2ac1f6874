"""Defines the step `evaluate`: compares an adapter with its base at the same seeds, in metrics and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.spec import EvaluateSettings
from tasks.imports import base_module
from tasks.spec import External, Input, StepSpec
from tasks.step import Context, step


class Evaluate(StepSpec, EvaluateSettings):
    """The adapter, the images and prompts to evaluate it on, and the gates."""

    uses: Literal["evaluate"] = "evaluate"
    base: str
    adapter: Annotated[str, Input("adapter")]
    dataset: Annotated[str, Input("manifest")]
    heldout: Annotated[str | tuple[str, ...] | None, Input("manifest")] = None
    prompts: Annotated[str | None, External("file", kept=True)] = None


def find_imports(spec: Evaluate, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that an evaluation imports, with that of its base."""
    yield "lora_engine.evaluation.run"
    yield base_module(spec.base, folder)


@step(
    Evaluate,
    produces="report",
    revision=2,
    imports=find_imports,
    entries=lambda spec: [(METRICS, name) for name in METRICS],
)
def evaluate(spec: Evaluate, context: Context) -> None:
    """Writes the report: metrics with intervals, gates and images."""
    from lora_engine.evaluation.prompts import read_prompts
    from lora_engine.evaluation.run import evaluate as run_evaluation

    prompts = read_prompts(context.files["prompts"]) if "prompts" in context.files else ()
    run_evaluation(
        spec.narrow(EvaluateSettings),
        context.base(spec.base),
        context.folder("adapter"),
        context.folder("dataset"),
        context.out,
        heldout=context.inputs.get("heldout", ()),
        prompts=prompts,
        progress=context.progress,
    )
