"""`evaluate`: what an adapter does, in numbers and pictures, each against the base with the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from lora_engine.evaluation.spec import EvaluateSettings
from tasks.imports import base_module
from tasks.spec import External, Input, StepSpec
from tasks.step import Context, step


class Evaluate(StepSpec, EvaluateSettings):
    """Which adapter to judge, on which pictures and prompts, and what it must reach."""

    uses: Literal["evaluate"] = "evaluate"
    base: str
    adapter: Annotated[str, Input("adapter")]
    dataset: Annotated[str, Input("manifest")]
    heldout: Annotated[str | None, Input("manifest")] = None
    prompts: Annotated[str | None, External("file", kept=True)] = None


def find_imports(spec: Evaluate, folder: Path) -> Iterator[str]:
    """Yields the names of the modules that an evaluation imports, that of its base among them."""
    yield "lora_engine.evaluation.run"
    yield base_module(spec.base, folder)


@step(Evaluate, produces="report", revision=1, imports=find_imports)
def evaluate(spec: Evaluate, context: Context) -> None:
    """Writes the report: metrics with intervals, gates, and the pictures behind them."""
    from lora_engine.evaluation.prompts import read_prompts
    from lora_engine.evaluation.run import evaluate as judge

    prompts = read_prompts(context.files["prompts"]) if "prompts" in context.files else ()
    judge(
        spec.narrow(EvaluateSettings),
        context.base(spec.base),
        context.folder("adapter"),
        context.folder("dataset"),
        context.out,
        heldout=context.optional("heldout"),
        prompts=prompts,
        progress=context.progress,
    )
