"""Finds what limits an evaluation before anything is drawn, and logs it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from lora_engine.embedding.embedder import Embedder
from lora_engine.embedding.embedder_source import ChosenEmbedders
from lora_engine.evaluation.plan import EvaluationPlan

_log = logging.getLogger(__name__)


def find_prompt_limits(plan: EvaluationPlan, embedder: Embedder | None) -> dict[str, list[str]]:
    """Returns the prompts that the embedder does not read, for the report.

    Returns:
        `truncated`: the prompts that are too long. `unreadable`, if there are any: those in another script.
    """
    prompts = list(dict.fromkeys(request.prompt_without_trigger for request in plan.with_trigger))
    truncated = embedder.find_truncated(prompts) if embedder is not None else []
    unreadable = embedder.find_unreadable(prompts) if embedder is not None else []
    return {"truncated": truncated} | ({"unreadable": unreadable} if unreadable else {})


def warn_of_limits(plan: EvaluationPlan, embedders: ChosenEmbedders, prompts: Mapping[str, Sequence[str]]) -> None:
    """Logs a warning if nothing was held out, and for each left-out image, missing embedder and unread prompt."""
    if plan.measured_on == "training":
        _log.warning("no image was held out: metrics are measured on the training images, which makes them too good")
    for item in plan.left_out:
        _log.warning("held-out image %r is left out: %s", item.source, item.reason)
    for setting, reason in embedders.missing.items():
        _log.warning("metrics of the %s are left out: %s", setting, reason)
    for text in prompts["truncated"]:
        _log.warning(
            "the prompt %r is longer than the embedder reads; agreement is measured on its beginning", text[:80]
        )
    for text in prompts.get("unreadable", ()):
        _log.warning(
            "the prompt %r has letters of another script than Latin, which a CLIP has hardly seen; its agreement says "
            "little, use a multilingual SigLIP as embedder",
            text[:80],
        )
