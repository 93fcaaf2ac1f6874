"""Merges adapters that are named on the command line, and prepares the images of merges that learn their weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lora_engine.errors import SettingsError
from lora_engine.files import is_present
from registry.context import RegistryContext
from registry.entities import ArtifactRef
from registry.errors import RightsError
from registry.home import Home
from registry.lineage.rows import artifact_ref
from registry.lineage.walk import LEAST_DIGITS
from registry.policy.ancestry import trace
from registry.policy.revocations import read_revoked, revoked_in
from registry.refs import split_ref
from registry.store.database import begins_with
from registry.store.snapshot import find_scratch
from registry.store.tables import ArtifactRow
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.execution import subjects_of
from tasks.operations.adapter_files import checkout_adapters
from tasks.operations.results import VerbRecorder, recorder_of
from tasks.operations.verb_run import describe_verb, verb_run

if TYPE_CHECKING:
    from lora_engine.merging.report import Report

_ALLOWED = "a folder of images, a dataset folder, NAME@REF, or the digest of a dataset"


def merge_named(
    texts: Sequence[str],
    output: Path,
    home: Path,
    *,
    method: str,
    options: Mapping[str, Any],
    base: str | None,
    dataset: str | None,
    seed: int,
    vae: str | None = None,
) -> Report:
    """Merges adapters into one, and records the result if the registry knows one of them.

    Args:
        texts: `name` or `name:weight`; a name is a file or `name@ref`.
        output: The file to write.
        home: The home with the named versions.
        method: Name of a merge method.
        options: Options of the method.
        base: The base; None means the one that all adapters name, if the method learns weights.
        dataset: The images of a method that learns weights; see `checkout_dataset`.
        seed: Random seed.
        vae: The autoencoder that the adapters were trained with, for a method that learns weights.

    Raises:
        AdapterError: An adapter is incomplete, or they are for different bases.
        SettingsError: The method or an option is unknown, or the base or the images are missing.
        SpecError: No dataset has that name.
        RegistryError: A version does not exist, or the images are revoked.
    """
    from lora_engine.merging.files import learns, merge_files
    from lora_engine.merging.methods import parse_options

    recorder = recorder_of(home, "merge", output)
    with ExitStack() as stack:
        inputs = stack.enter_context(checkout_adapters(texts, home, recorder))
        parsed = parse_options(method, options)
        files, weights = [file for file, _ in inputs], [weight for _, weight in inputs]
        folder = None if dataset is None else Path(dataset)
        if learns(parsed):
            base = base or carried_base(files)
            if dataset is not None:
                folder = stack.enter_context(checkout_dataset(dataset, home, base, recorder))
        elif vae is not None:
            raise SettingsError(f"method {method!r} reads no autoencoder", where="vae", remedy="leave it out")
        report = merge_files(
            files, weights, output, method=method, options=parsed, seed=seed, base=base, dataset=folder, vae=vae
        )
        on_base = {"base": base} if learns(parsed) else {}
        recorder.record({"method": method, "weights": weights, **on_base})
    return report


def carried_base(files: Sequence[Path]) -> str | None:
    """Returns the base that all adapter files name in their cards; None if they name none, or several."""
    from lora_engine.formats import inspect

    bases = {str(inspect(file)["card"].get("base") or "") for file in files}
    return bases.pop() or None if len(bases) == 1 else None


@contextmanager
def checkout_dataset(text: str, home: Path, base: str | None, recorder: VerbRecorder) -> Iterator[Path]:
    """Yields the folder of a captioned dataset, and adds it to the sources of the merge; deletes copies at the end.

    Args:
        text: A folder of images with captions beside them, a dataset folder, `name@ref` of a version, whose dataset is
            used, or the digest of a dataset or its first digits.
        home: The home with the versions and datasets.
        base: The base, whose resolution images get.
        recorder: The recorder of the merge.

    Raises:
        DataError: The folder has no usable images, or one has no caption.
        RightsError: The dataset contains a revoked image or consent.
        SpecError: No dataset has that name, or the version has several.
        RegistryError: The version does not exist.
    """
    folder = Path(text)
    if (folder / "manifest.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=find_scratch()) as name:
        out = Path(name) / "dataset"
        if is_present(text):
            _prepare(folder, out, Path(name), home, base, recorder)
        else:
            _check_out(text, out, Home.open_to_read(home), recorder)
        yield out


def _prepare(images: Path, out: Path, work: Path, home: Path, base: str | None, recorder: VerbRecorder) -> None:
    from lora_engine.bases.defaults import training_defaults
    from lora_engine.bases.source import resolve_base
    from lora_engine.data.caption import caption
    from lora_engine.data.ingest import ingest
    from lora_engine.data.preprocess import preprocess
    from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
    from lora_engine.families import families

    if base is None:
        raise SpecError("the base is not known, so the size of the images is not", remedy="name it with --base")
    reads_framing = families[resolve_base(base).family].reads_framing
    opened = Home.open_to_read(home)
    with closing(Versions(opened)) as versions:
        revoked = read_revoked(versions.lineage) if opened.exists else {}
        ingest(images, work / "ingested", IngestSettings(heldout=0.0), revoked=revoked)
        preprocess(
            work / "ingested",
            work / "sized",
            PreprocessSettings(resolution=training_defaults(base).resolution, original_sizes=reads_framing),
        )
        caption(work / "sized", out, CaptionSettings())
        if opened.exists and not opened.read_only:
            recorder.add_artifact(_store(versions, out))


def _store(context: RegistryContext, folder: Path) -> ArtifactRef:
    """Stores a dataset, and records its images, so that a revocation of one finds the merge."""
    from lora_engine.data.manifest import Manifest

    ref, lineage = context.store.put("manifest", folder), context.lineage
    with verb_run(lineage, "merge", {"verb": "merge"}) as run:
        lineage.log_execution(
            describe_verb(run, "images", "ingest", ["merge images", run.id], output=ref),
            contents=context.store.files(ref),
            subjects=subjects_of(Manifest.load(folder)),
        )
    return ref


def _check_out(text: str, out: Path, home: Home, recorder: VerbRecorder) -> None:
    if not home.exists:
        raise SpecError(f"there is no dataset {text!r}", where="--dataset", allowed=_ALLOWED, remedy="check the path")
    with closing(Versions(home)) as versions:
        ref = _dataset_of(versions, text) if "@" in text else _by_digest(versions, text)
        with versions.lineage.database.read() as session:
            revoked = revoked_in(session, [ref.sha256])
        if revoked:
            raise RightsError(
                f"its dataset contains revoked items: {', '.join(revoked)}",
                where=f"--dataset {text}",
                remedy="use images that are not revoked",
            )
        versions.store.checkout(ref, out)
    recorder.add_artifact(ref)


def _dataset_of(versions: Versions, text: str) -> ArtifactRef:
    version = versions.show(*split_ref(text))
    with versions.lineage.database.read() as session:
        datasets = trace(session, version.artifact).datasets
    if len(datasets) != 1:
        listed = ", ".join(ref.sha256[:16] for ref in datasets)
        raise SpecError(
            f"{version.ref} was made from {len(datasets) or 'no'} datasets",
            where="--dataset",
            allowed=listed or _ALLOWED,
            remedy="give the digest of one of them" if datasets else "give a folder of images",
        )
    return datasets[0]


def _by_digest(versions: Versions, text: str) -> ArtifactRef:
    digest = text.removeprefix("sha256:").lower()
    rows: list[ArtifactRow] = []
    if len(digest) >= LEAST_DIGITS:
        wanted = select(ArtifactRow).where(ArtifactRow.kind == "manifest", begins_with(ArtifactRow.sha256, digest))
        with versions.lineage.database.read() as session:
            rows = list(session.scalars(wanted.limit(2)))
    if len(rows) != 1:
        problem = f"several datasets begin with {text!r}" if rows else f"there is no dataset {text!r}"
        raise SpecError(problem, where="--dataset", allowed=_ALLOWED, remedy="see `loraline lineage NAME@REF`")
    return artifact_ref(rows[0])
