"""Prepares a `Job`: a step of a pipeline with everything its result depends on except its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lora_engine.bases.source import TINY, BaseSource, resolve_base
from lora_engine.bases.vae import resolve_vae
from lora_engine.errors import NotDownloadedError
from lora_engine.files import canonical_json, expand_home, is_present, sha256_bytes
from registry.entities import ArtifactRef
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from tasks.digests import PathDigest, digest_path
from tasks.entries import UsedEntry, find_input_kinds, find_used, to_key, to_record
from tasks.spec import StepSpec
from tasks.step import STEPS, Inputs, StepKind, locate_base

_REVOKED = "revoked"
"""The entry of the cache key, beside the digests of the user's files, that lists the excluded subjects."""


@dataclass(frozen=True)
class Job:
    """One step, ready to execute once its inputs are known. Plain data that can be pickled.

    Attributes:
        name: The step's name in the pipeline.
        spec: Its settings.
        folder: The folder that relative paths in the spec start from.
        files: Field -> digest of the user's file or folder.
        excluded: Digests of revoked images and ids of revoked consents in the user's files, sorted.
        base: Label, fingerprint and, if it is local, path of the base model, and the same of another autoencoder; None
            means no base.
        concurrency: Maximum trainings per device at the same time; None means the default of the device. It
            changes no bytes, so it is not part of the cache key.
        entries: The registry entries that the step uses: its own, those in its settings, the family of its base, and
            the kinds of its input adapters.
        models: Role -> name, label, fingerprint and place of the models that it uses beside the base; see `StepKind`.
        absent: Registered version that the step names and can do without -> why it is not there. The reasons are not
            part of the cache key.
        undownloaded: The model that has to be downloaded before the cache key is known, in words; empty for none. Such
            a job is only planned.
    """

    name: str
    spec: StepSpec
    folder: Path
    files: Mapping[str, PathDigest] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    base: Mapping[str, str] | None = None
    concurrency: int | None = None
    entries: tuple[UsedEntry, ...] = ()
    models: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    undownloaded: str = ""

    @cached_property
    def revision(self) -> int:
        """Returns the revision of the step for this spec."""
        return self.kind.revision_of(self.spec, self.files)

    @property
    def kind(self) -> StepKind:
        """Returns the step's entry in `STEPS`."""
        return STEPS[self.spec.uses]

    @property
    def file_digests(self) -> dict[str, str]:
        """Returns the digests of the user's files by field."""
        return {name: digest.sha256 for name, digest in self.files.items()}

    @property
    def recorded_settings(self) -> dict[str, Any]:
        """Returns what lineage records of this step beside its inputs."""
        recorded: dict[str, Any] = {"settings": self.spec.own_settings(), "files": self.file_digests}
        recorded |= {"base": dict(self.base)} if self.base else {}
        recorded |= {"models": {role: dict(model) for role, model in self.models.items()}} if self.models else {}
        recorded |= {"excluded": list(self.excluded)} if self.excluded else {}
        recorded |= {"absent": dict(self.absent)} if self.absent else {}
        return recorded | to_record(self.entries)

    def key(self, inputs: Inputs) -> str:
        """Returns the cache key: equal keys mean equal results."""
        return sha256_bytes(canonical_json(self.key_parts(inputs)))

    def earlier_key(self, inputs: Inputs) -> str | None:
        """Returns the cache key of releases before 0.4 if it differs."""
        parts, settings = self.key_parts(inputs), self.spec.earlier_key_settings()
        if settings == parts["settings"]:
            return None
        return sha256_bytes(canonical_json({**parts, "settings": settings}))

    def origin(self, inputs: Inputs) -> str:
        """Returns a digest of everything that the result depends on except the settings."""
        return sha256_bytes(canonical_json({**self.key_parts(inputs), "settings": None}))

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Returns what the cache key is the digest of; JSON values.

        The parts are the step's name and revision, its settings, the digests of its inputs, the content of the user's
        files, the fingerprints of the base and of other models, the registered versions that are not there, and the
        revisions of the entries that it uses; not names, paths or times, and no version of a package, except of a
        plug-in with an entry without a revision.
        """
        revoked = {_REVOKED: " ".join(self.excluded)} if self.excluded else {}
        parts = {
            "step": self.kind.name,
            "revision": self.revision,
            "settings": self.spec.key_settings(),
            "inputs": {name: [ref.sha256 for ref in refs] for name, refs in inputs.items() if refs},
            "files": self.file_digests | revoked,
            "base": self.base["fingerprint"] if self.base else None,
        }
        if self.base and "vae_fingerprint" in self.base:
            parts["vae"] = self.base["vae_fingerprint"]
        if self.models:
            parts["models"] = {role: model["fingerprint"] for role, model in self.models.items()}
        if self.absent:
            parts["absent"] = sorted(self.absent)
        return parts | to_key(self.entries)

    def with_input_kinds(self, inputs: Inputs, lineage: Lineage) -> Job:
        """Returns this job with the kinds of its input adapters among its entries."""
        return replace(self, entries=tuple(dict.fromkeys((*self.entries, *find_input_kinds(inputs, lineage)))))

    def refreshed(self, lineage: Lineage) -> Job:
        """Returns this job, or the same step read again if the user's files changed since it was prepared."""
        if self.files_are_current():
            return self
        revoked = read_revoked(lineage)
        again = prepare_job(self.name, self.spec, self.folder, revoked, concurrency=self.concurrency)
        return replace(again, absent=self.absent)

    def files_are_current(self) -> bool:
        """Returns True if no file of the user changed since this job was prepared; reads no bytes."""
        paths = {name: self.folder / path for name, path, _ in self.spec.externals()}
        return all(digest.is_current(paths[name]) for name, digest in self.files.items())


@dataclass(frozen=True)
class Outcome:
    """Result of a step.

    Attributes:
        ref: Its artifact.
        cached: True if the result comes from the cache.
        summary: Content of the artifact's summary file (`StepKind.summary`); empty for a kind without one.
    """

    ref: ArtifactRef
    cached: bool
    summary: bytes = field(default=b"", repr=False)


def prepare_job(
    name: str,
    spec: StepSpec,
    folder: Path,
    revoked: Collection[str] = (),
    *,
    concurrency: int | None = None,
    digests: dict[Path, PathDigest] | None = None,
) -> Job:
    """Prepares a step; reads the user's files and the base once.

    Within `downloads(allowed=False)`, a model that is not on this machine is in `undownloaded`.

    Args:
        name: The step's name in the pipeline.
        spec: Its settings.
        folder: The folder of the pipeline file.
        revoked: Digests of revoked images and ids of revoked consents.
        concurrency: Maximum trainings per device at the same time; None means the default of the device.
        digests: Digests of files and folders that were read for other steps; gets those that this one reads.

    Raises:
        EngineError, OSError: The base or a file cannot be read.
    """
    known = {} if digests is None else digests
    files = {}
    for role, path, _ in spec.externals():
        if (place := folder / path) not in known:
            known[place] = digest_path(place)
        files[role] = known[place]
    find_excluded = STEPS[spec.uses].find_excluded
    excluded = sorted(find_excluded(spec, folder, files, revoked)) if find_excluded is not None and revoked else ()
    job = Job(name, spec, folder, files, tuple(excluded), concurrency=concurrency)
    try:
        return _with_models(job)
    except NotDownloadedError as error:
        return replace(job, entries=find_used(spec, None), undownloaded=error.problem)


def _with_models(job: Job) -> Job:
    """Returns a job with its base, the other models that it uses, and its registry entries."""
    spec, folder = job.spec, job.folder
    base = getattr(spec, "base", None)
    located = locate_base(base, folder) if base else None
    source = resolve_base(located) if located else None
    description = _describe_base(source, located) if source and located else None
    vae = getattr(spec, "vae", None)
    if description and vae:
        description |= _describe_vae(locate_base(vae, folder))
    find_models = job.kind.models
    models = find_models(spec, folder, source) if find_models is not None else {}
    return replace(job, base=description, entries=find_used(spec, source), models=models)


def _describe_base(source: BaseSource, located: str) -> dict[str, str]:
    """Returns label, fingerprint and, for a local base, path."""
    is_path = source.revision is None and source.name != TINY
    path = {"path": str(expand_home(located).resolve())} if is_path else {}
    return {"label": source.label, "fingerprint": _fingerprint(located)} | path


def _describe_vae(located: str) -> dict[str, str]:
    """Returns label, fingerprint and, if it is local, path of another autoencoder."""
    source = resolve_vae(located)
    path = {"vae_path": str(source.folder)} if is_present(expand_home(located)) else {}
    return {"vae": source.label, "vae_fingerprint": source.fingerprint()} | path


@lru_cache(maxsize=8)
def _fingerprint(located: str) -> str:
    """Returns the digest of a base model's weights and configuration; read once per process."""
    return resolve_base(located).fingerprint()
