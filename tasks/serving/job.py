"""Defines the job of a server: its states, and what is known of it at a moment."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from lora_engine.errors import EngineError
from tasks.operations.images import DrawRequest


class JobState(StrEnum):
    """State of a job. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_final(self) -> bool:
        """True if the job does not change any more."""
        return self in {JobState.COMPLETED, JobState.FAILED, JobState.CANCELED}


@dataclass(frozen=True)
class Job:
    """What is known of a request at a moment.

    Attributes:
        id: Identifier, 32 hexadecimal digits.
        tenant: For whom the images are; tenants share the engine equally.
        request: The request, with the seed that was drawn for it.
        state: The state.
        adapters: `name@version` (or file name) of the prompt's adapters, in their order, as they were resolved.
        position: Number of jobs that are drawn before it; 0 if it is drawn now or has ended.
        step: Finished denoising steps.
        steps: All denoising steps.
        created: When the request was accepted.
        ended: When it reached a final state.
        error: Why it failed; has the message of the error.
    """

    id: str
    tenant: str
    request: DrawRequest
    state: JobState
    adapters: tuple[str, ...]
    created: datetime
    position: int = 0
    step: int = 0
    steps: int = 0
    ended: datetime | None = None
    error: str | None = None


class QueueFull(EngineError):
    """Too many jobs wait; the request may be sent again later."""


class UnknownJob(EngineError):
    """A job that does not exist, of another tenant, or whose images were deleted."""
