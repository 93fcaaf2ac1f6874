"""Runs a Prefect worker that stops when its runs have ended; `prefect worker start` kills them, and they stay Running.

Imports Prefect. `flows.up` starts it as a process.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from prefect.workers.process import ProcessWorker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

_POLL = 0.2  # seconds


class FinishingWorker(ProcessWorker):
    """A worker of type `process` that takes no new run once it has to stop.

    Args:
        stopping: Set when the worker has to stop.
        name: Name of the worker.
        pool: Work pool, which is created if it is missing.
    """

    def __init__(self, stopping: asyncio.Event, *, name: str, pool: str) -> None:
        super().__init__(work_pool_name=pool, name=name, limit=1)
        self._stopping = stopping

    @classmethod
    def __dispatch_key__(cls) -> str:
        """Keeps Prefect's own entry for the type `process`, with which it would warn that this class replaces it."""
        return "loraline"

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Takes the runs that are due, up to the limit; none once the worker has to stop."""
        return [] if self._stopping.is_set() else await super().get_and_submit_flow_runs()

    async def work(self) -> None:
        """Executes runs until the worker has to stop and its last run has ended."""
        polling = asyncio.create_task(self.start())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({polling, stopping}, return_when=asyncio.FIRST_COMPLETED)
        while not polling.done() and self.limiter.borrowed_tokens:
            await asyncio.sleep(_POLL)
        stopping.cancel()
        polling.cancel()
        with suppress(asyncio.CancelledError):
            await polling


async def _work(pool: str, name: str) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await FinishingWorker(stopping, name=name, pool=pool).work()


if __name__ == "__main__":
    asyncio.run(_work(*sys.argv[1:]))
