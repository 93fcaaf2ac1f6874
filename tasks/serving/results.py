"""Keeps the images of jobs and the images that jobs start from, in the folder of a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.data.images import encode_png, open_image, write_image
from lora_engine.files import atomic_write, sha256_bytes
from registry.errors import disk_errors
from tasks.operations.draw_request import settings_of
from tasks.serving.job import Job, UnknownJob
from tasks.serving.uploads import MAX_UPLOAD_PIXELS

if TYPE_CHECKING:
    from lora_engine.serving.engine import DrawnImages
    from tasks.serving.records import JobRecords


class JobImages:
    """Images on the disk, one folder per job.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._jobs, self._inputs = folder / "jobs", folder / "inputs"

    def keep_input(self, path: Path) -> Path:
        """Returns a copy of an image, or of a mask, without metadata, which jobs read after a restart as well.

        Raises:
            DataError: It is not a readable image, or too large.
            HomeError: The disk is full.
        """
        if path.parent == self._inputs and path.exists():
            return path
        image = open_image(path, MAX_UPLOAD_PIXELS)
        target = self._inputs / f"{sha256_bytes(encode_png(image))}.png"
        if not target.exists():
            with disk_errors(target):
                write_image(target, image)
        return target

    def write(self, job: Job, result: DrawnImages) -> int:
        """Writes the images of a job: all of them, or none. Returns their size in bytes.

        Raises:
            DiskFull: The disk is full.
        """
        from lora_engine.inference.draw import encode_drawn

        settings = settings_of(job.request)
        try:
            with disk_errors(self._jobs):
                for file, (number, pixels) in zip(self.files(job), enumerate(result.pixels), strict=True):
                    atomic_write(file, encode_drawn(pixels, result.drawing, settings, number))
                return sum(file.stat().st_size for file in self.files(job))
        except BaseException:
            self.delete(job.id)
            raise

    def files(self, job: Job) -> list[Path]:
        """Returns the files of a job's images, in the order of their numbers, which are their names."""
        return [self._jobs / job.id / f"{number}.png" for number in range(job.request.count)]

    def read(self, job: Job) -> list[bytes]:
        """Returns the images of a completed job.

        Raises:
            UnknownJob: They were deleted.
        """
        try:
            return [file.read_bytes() for file in self.files(job)]
        except FileNotFoundError:
            raise UnknownJob(
                "the images of this job were deleted", remedy="send the request again; the same seed gives them again"
            ) from None

    def delete(self, job_id: str) -> None:
        """Deletes the images of a job."""
        shutil.rmtree(self._jobs / job_id, ignore_errors=True)

    def prune(self, records: JobRecords, *, hours: float, limit: int) -> None:
        """Deletes jobs that ended long ago, the oldest images until the rest fits, and what no job needs.

        Args:
            records: The jobs.
            hours: Age of jobs that are deleted, in hours.
            limit: Size of all images in bytes.
        """
        for job_id in records.expired(hours):
            self.delete(job_id)
            records.delete(job_id)
        sizes = records.sizes()
        total = sum(size for _, size in sizes)
        for job_id, size in sizes:
            if total <= limit:
                break
            self.delete(job_id)
            records.drop_images(job_id)
            total -= size

    def sweep(self, records: JobRecords) -> None:
        """Deletes what a killed process left: images of unknown jobs, and inputs that no job needs any more.

        Called while no request is accepted.
        """
        known, inputs = {job_id for job_id, _ in records.sizes()}, records.inputs()
        for folder in self._jobs.glob("*"):
            if folder.name not in known:
                self.delete(folder.name)
        for file in self._inputs.glob("*"):
            if file.name not in inputs:
                file.unlink()
