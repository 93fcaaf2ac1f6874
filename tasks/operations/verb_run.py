"""Records a verb as a run of one step, for verbs that work outside of pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import Execution, Run, RunStatus, now
from registry.lineage.record import Lineage
from tasks.environment import describe_environment

REVISION = "1"
"""Revision of the steps that verbs record."""


@contextmanager
def verb_run(lineage: Lineage, verb: str, source: Mapping[str, Any]) -> Iterator[Run]:
    """Starts a run, and finishes it as COMPLETED, or as FAILED after an error."""
    run = lineage.start_run(verb, source)
    status: RunStatus = "FAILED"
    try:
        yield run
        status = "COMPLETED"
    finally:
        lineage.finish_run(run.id, status)


def describe_verb(run: Run, step: str, uses: str, key: list[Any], **values: Any) -> Execution:
    """Returns the execution of the step of a verb's run, which ends now.

    Args:
        run: The run.
        step: Name of the step.
        uses: Its kind.
        key: What the cache key is the digest of; JSON values.
        values: Other fields of `Execution`, such as inputs and output.
    """
    return Execution(
        id=uuid4().hex,
        run_id=run.id,
        step=step,
        uses=uses,
        revision=REVISION,
        key=sha256_bytes(canonical_json(key)),
        environment=describe_environment(),
        started_at=run.started_at,
        ended_at=now(),
        **values,
    )
