"""Defines the job of a server: its states, what is known of it at a moment, and the errors of the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from lora_engine.errors import EngineError, WordedError
from tasks.operations.draw_request import DrawRequest


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
class Failure:
    """Why a job failed, in the parts of a `WordedError`.

    Attributes:
        kind: Name of the error's class.
        problem: The problem.
        where: Its location.
        allowed: The allowed values.
        remedy: The fix.
        reasons: All reasons, if there are several.
    """

    kind: str
    problem: str
    where: str = ""
    allowed: str = ""
    remedy: str = ""
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: WordedError) -> Self:
        """Returns the parts of an error."""
        reasons = tuple(map(str, getattr(error, "reasons", ())))
        return cls(type(error).__name__, error.problem, error.where, error.allowed, error.remedy, reasons)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns the failure that was stored as a JSON object."""
        return cls(**{**data, "reasons": tuple(data["reasons"])})

    @property
    def message(self) -> str:
        """The message of the error."""
        return str(WordedError(self.problem, where=self.where, allowed=self.allowed, remedy=self.remedy))


@dataclass(frozen=True)
class Job:
    """What is known of a request at a moment.

    Attributes:
        id: Identifier, 32 hexadecimal digits.
        tenant: For whom the images are; tenants share the engine equally.
        request: The request, with the seed that was drawn for it.
        state: The state.
        adapters: `name@version` (or file name) of the adapters of prompt and regions, in the order of `all_tags`, as
            they were resolved.
        position: Number of jobs that are drawn before it, counted from 1; 0 if it is drawn now or has ended.
        step: Finished denoising steps.
        steps: All denoising steps.
        created: When the request was accepted.
        ended: When it reached a final state.
        error: Why it failed; has the message of the error.
        failure: Why it failed, in parts.
        size: Bytes of its images; 0 before they exist, and after they were deleted.
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
    failure: Failure | None = None
    size: int = 0

    @property
    def cost(self) -> int:
        """Images times steps times predictions of a step, by which tenants share the engine."""
        return self.request.count * self.request.steps * (1 + len(self.request.regions))


class QueueFull(EngineError):
    """Too many jobs wait; the request may be sent again later."""

    retry_after = 2
    """Seconds after which a client may try again."""


class TenantQueueFull(QueueFull):
    """Too many jobs of one tenant wait; jobs of others are accepted."""


class UnknownJob(EngineError):
    """A job that does not exist, of another tenant, or whose images were deleted."""


class KeyReused(EngineError):
    """An idempotency key that was sent with another request before."""


class ServiceClosed(EngineError):
    """The server stops, and accepts no more requests."""

    retry_after = 10
    """Seconds after which a client may try again."""


class ImagesRefused(EngineError):
    """Images that the safety hook does not let out.

    Args:
        problem: That they are refused.
        reasons: The reasons of the hook.
    """

    def __init__(self, problem: str, *, reasons: tuple[str, ...] = (), **parts: str) -> None:
        self.reasons = reasons
        super().__init__(f"{problem}: {'; '.join(reasons)}" if reasons else problem, **parts)
