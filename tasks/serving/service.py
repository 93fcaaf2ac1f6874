"""`ImageService`: a queue of requests for images, and the thread that has an engine draw them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.inference.prompts.prompt import parse_prompt
from registry.entities import now
from registry.errors import HomeError
from registry.home import Home
from tasks.operations.adapter_files import parse_weighted
from tasks.operations.draw_request import DrawRequest, settings_of
from tasks.serving.adapters import ServedAdapters
from tasks.serving.board import JobBoard
from tasks.serving.drawing import DrawingThread, Parts
from tasks.serving.engines import load_engine
from tasks.serving.job import Job, JobState, UnknownJob
from tasks.serving.metrics import ServingMetrics
from tasks.serving.records import JobRecords
from tasks.serving.results import JobImages
from tasks.serving.safety import load_hook
from tasks.serving.settings import MAX_ADAPTERS, ServiceSettings, check_request, require_boxes

if TYPE_CHECKING:
    from lora_engine.serving.engine import ImageEngine

__all__ = ["ImageService", "ServiceSettings", "open_service"]
_FOLDER = "serving"
"""Folder of the home for jobs, images and adapter files."""


def open_service(home: Home, settings: ServiceSettings) -> ImageService:
    """Returns a service with the engine that its settings name; loads the base.

    Raises:
        SpecError: A setting cannot be used.
        RegistryError: An adapter of the static engine may not be used.
        BaseModelError: No such base.
    """
    fixed = []
    adapters = ServedAdapters(home, home.path / _FOLDER / "adapters")
    try:
        for text in settings.adapters:
            reference, weight = parse_weighted(text)
            fixed.append((*adapters.fetch(reference), weight))
    finally:
        adapters.close()
    # An alias is resolved once: the weights are fused at the start.
    named = tuple(f"{reference}:{weight:g}" for _, reference, weight in fixed)
    return ImageService(home, replace(settings, adapters=named), load_engine(settings, fixed))


class ImageService:
    """Accepts requests, queues them and draws them; its methods may be called from several threads.

    Accepted jobs are on the disk: a service that is opened again draws those that had not ended.

    Args:
        home: The home with the adapters; its folder `serving` gets the images.
        settings: The settings.
        engine: Draws the images.

    Raises:
        HomeError: Another server uses the home.
    """

    def __init__(self, home: Home, settings: ServiceSettings, engine: ImageEngine) -> None:
        self.home, self.settings = home, settings
        self.metrics = ServingMetrics()
        hook = None if settings.safety is None else load_hook(settings.safety)
        # A queue has one writer. Any thread may close the service.
        self._lock = FileLock(home.locks / "serving.lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise HomeError(
                "another server serves this home", where=str(home.path), remedy="stop it, or use another home"
            ) from None
        folder = home.path / _FOLDER
        self._records, self._results = JobRecords(folder / "jobs.db"), JobImages(folder)
        self._results.sweep(self._records)
        self._adapters = ServedAdapters(home, folder / "adapters", settings.cache_bytes)
        self._fixed = [parse_weighted(text) for text in settings.adapters]
        self._board = JobBoard(self._records, settings, self.metrics)
        suffix = "".join(f" <lora:{reference}:{weight:g}>" for reference, weight in self._fixed)
        self._thread = DrawingThread(
            Parts(
                settings,
                engine,
                self._board,
                self._records,
                self._adapters,
                self._results,
                self.metrics,
                hook,
                suffix,
            )
        )
        self._thread.start()

    def submit(
        self, request: DrawRequest, *, tenant: str = "local", key: str | None = None, fingerprint: str | None = None
    ) -> Job:
        """Accepts a request and returns its job, which is on the disk then.

        Args:
            request: The request. Its adapters are `name@version`, `name@alias` or `name`, never files. Its image and
                mask are copied.
            tenant: For whom the images are.
            key: Idempotency key: the tenant's job with this key is returned if there is one.
            fingerprint: Digest of what the client sent, which must be the same for the same key; None takes that of the
                request.

        Raises:
            QueueFull: Too many jobs wait.
            KeyReused: The key was sent with another request.
            ServiceClosed: The service stops.
            SettingsError: The prompt or a setting cannot be used.
            DataError: The image or the mask cannot be read.
            RegistryError: An adapter does not exist or may not be used now.
            DiskFull: The job cannot be stored.
        """
        request = replace(request, base=self.settings.base)
        fingerprint = fingerprint or sha256_bytes(canonical_json({k: str(v) for k, v in asdict(request).items()}))
        known = self._board.find_key(tenant, key, fingerprint)
        if known is not None:
            return known
        self._board.require_room(tenant)  # before anything that costs time
        adapters = self._check(request)
        request = replace(
            request,
            image=None if request.image is None else self._results.keep_input(request.image),
            mask=None if request.mask is None else self._results.keep_input(request.mask),
        )
        job = Job(secrets.token_hex(16), tenant, request, JobState.QUEUED, adapters, now(), steps=request.steps)
        return self._board.add(job, fingerprint, key)

    def job(self, job_id: str, *, tenant: str | None = None) -> Job:
        """Returns a job as it is now.

        Args:
            job_id: Its identifier.
            tenant: Its tenant, if a tenant asks; None finds the jobs of all.

        Raises:
            UnknownJob: There is none, or its images were deleted.
        """
        job = self._board.job(job_id)
        if tenant not in {None, job.tenant}:
            raise UnknownJob(f"unknown job {job_id[:40]!r}")
        return job

    def jobs(self, tenant: str | None = None, *, limit: int = 1000) -> list[Job]:
        """Returns the latest jobs of a tenant, or of all, in the order of their acceptance."""
        return self._board.jobs(tenant, limit)

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """Waits until a job has ended, at most for some seconds, and returns it.

        Raises:
            UnknownJob: There is none.
        """
        return self._board.wait_for_end(job_id, seconds)

    def images(self, job_id: str) -> list[bytes]:
        """Returns the images of a job as PNG files with their settings; an empty list until it is completed.

        Raises:
            UnknownJob: There is none, or its images were deleted.
        """
        job = self.job(job_id)
        return self._results.read(job) if job.state is JobState.COMPLETED else []

    def preview(self, job_id: str) -> bytes | None:
        """Returns the first image of a running job as it is now, a PNG file; None before the first step.

        Waits for the next step, up to two seconds. Always None if a safety hook decides which images may leave.

        Raises:
            UnknownJob: There is none.
        """
        self.job(job_id)
        return self._board.preview(job_id)

    def cancel(self, job_id: str) -> Job:
        """Cancels a job that waits or runs; a job that has ended stays as it is.

        Raises:
            UnknownJob: There is none.
        """
        self.job(job_id)
        self._board.end(job_id, JobState.CANCELED)
        return self.job(job_id)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Calls a function with the identifier of each job that changes, from another thread; it must not block."""
        self._board.listen(listener)

    def unlisten(self, listener: Callable[[str], None]) -> None:
        """Ends `listen`."""
        self._board.unlisten(listener)

    def keep_input(self, path: Path) -> Path:
        """Returns the copy of an image that jobs may start from; see `JobImages.keep_input`."""
        return self._results.keep_input(path)

    @property
    def is_ready(self) -> bool:
        """True while jobs are accepted and drawn."""
        return self._thread.is_alive() and not self._board.is_closing

    def close(self, grace: float = 0.0) -> None:
        """Stops after the step that is computed now, or when the running jobs are completed; others stay on the disk.

        Args:
            grace: Seconds in which running jobs may finish.
        """
        self._board.close(grace)
        self._thread.join()
        self._board.save()
        self._adapters.close()
        self._records.close()
        self._lock.release()

    def _check(self, request: DrawRequest) -> tuple[str, ...]:
        """Returns the versions of the adapters of a request that can be drawn."""
        from lora_engine.inference.settled_tags import all_tags

        check_request(request, self.settings)
        prompt = parse_prompt(request.prompt)
        parse_prompt(request.negative, is_negative=True)
        regions = settings_of(request).regions
        require_boxes(regions)
        if request.sampler is not None:
            from lora_engine.bases.samplers import find_sampler

            find_sampler(request.sampler)
        tags = all_tags(prompt, regions)
        if self._fixed and tags:
            raise SettingsError(
                f"the prompt names the adapter {tags[0].name[:80]!r}",
                allowed="prompts without adapters: this server has fixed ones",
                remedy="leave the tag out",
            )
        if len(tags) > MAX_ADAPTERS:
            raise SettingsError(f"the prompt names {len(tags)} adapters", allowed=f"at most {MAX_ADAPTERS}")
        names = [*(tag.name for tag in tags), *(reference for reference, _ in self._fixed)]
        return tuple(self._adapters.resolve(name) for name in names)
