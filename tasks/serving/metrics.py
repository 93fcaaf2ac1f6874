"""Counts what a server does, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from tasks.serving.job import Job, JobState

_TENANTS = 50
"""Tenants with a label of their own; the rest share `other`, so the number of series is bounded."""
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class ServingMetrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        rejected: Requests that were not accepted, by reason.
        waiting_seconds: Time from the acceptance of a job to its first step.
        drawing_seconds: Time of a batch.
        batch_images: Images of a batch.
        adapter_files: Uses of adapter files, by `hit` and `miss` of the disk cache.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._tenants: set[str] = set()
        prefix = "loraline_serving_"
        self._jobs = Counter(f"{prefix}jobs", "Ended jobs", ["tenant", "state"], registry=self._registry)
        self._images = Counter(f"{prefix}images", "Images of completed jobs", ["tenant"], registry=self._registry)
        self._steps = Counter(
            f"{prefix}steps", "Denoising steps times images of completed jobs", ["tenant"], registry=self._registry
        )
        self.rejected = Counter(f"{prefix}rejected", "Refused requests", ["reason"], registry=self._registry)
        self.adapter_files = Counter(
            f"{prefix}adapter_files", "Uses of adapter files", ["result"], registry=self._registry
        )
        self.waiting_seconds = Histogram(
            f"{prefix}waiting_seconds",
            "Seconds from acceptance to drawing",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.drawing_seconds = Histogram(
            f"{prefix}drawing_seconds", "Seconds of a batch", buckets=_SECONDS, registry=self._registry
        )
        self.batch_images = Histogram(
            f"{prefix}batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32), registry=self._registry
        )

    def watch_queue(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Adds a gauge of the waiting jobs of each tenant."""
        self._registry.register(_Waiting(counts, self.label))

    def count_end(self, job: Job) -> None:
        """Counts a job that ended."""
        tenant = self.label(job.tenant)
        self._jobs.labels(tenant, job.state.value).inc()
        if job.state is JobState.COMPLETED:
            self._images.labels(tenant).inc(job.request.count)
            self._steps.labels(tenant).inc(job.request.count * job.request.steps)

    def label(self, tenant: str) -> str:
        """Returns the label of a tenant."""
        if tenant not in self._tenants and len(self._tenants) < _TENANTS:
            self._tenants.add(tenant)
        return tenant if tenant in self._tenants else "other"

    def text(self) -> bytes:
        """Returns the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Waiting:
    def __init__(self, counts: Callable[[], Mapping[str, int]], label: Callable[[str], str]) -> None:
        self._counts, self._label = counts, label

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family, sums = self._family(), dict[str, int]()
        for tenant, count in self._counts().items():
            label = self._label(tenant)
            sums[label] = sums.get(label, 0) + count
        for tenant, count in sums.items():
            family.add_metric([tenant], count)
        yield family

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily("loraline_serving_waiting_jobs", "Jobs that wait", labels=["tenant"])
