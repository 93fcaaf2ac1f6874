"""Defines the step `ingest`: imports a folder of images as a manifest and quarantines unusable files with a reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from lora_engine.settings import AddedLater
from registry.policy.consent import ConsentPolicy
from registry.store.artifacts import open_store
from tasks.digests import PathDigest
from tasks.spec import External, StepSpec
from tasks.step import Context, always, step

if TYPE_CHECKING:
    from lora_engine.data.decode_cache import DecodeCache


class Ingest(StepSpec, IngestSettings):
    """The folder or archive of images, that of masks, the file of consents, and the share to hold out from training.

    Attributes:
        images: The folder or archive of images.
        masks: Folder of masks with the names of their images, in the same subfolders; None means that masks are beside
            the images only.
        consent: Table of rights and consent per image; None means that nothing is stated.
        consent_policy: What broken and missing statements do, here and at every promotion of what is made from the
            dataset: `off`, `warn` (shown and recorded) or `strict` (refused). The home's `policy.yaml`
            counts if it is stricter; None of both is `warn`.
        c2pa_roots: PEM file of the root certificates that `c2pa: verify` trusts; None trusts none, so intact signatures
            are `untrusted`.
    """

    uses: Literal["ingest"] = "ingest"
    images: Annotated[str, External("folder or archive")]
    consent: Annotated[str | None, External("file")] = None
    masks: Annotated[str | None, External("folder")] = None
    consent_policy: Annotated[ConsentPolicy | None, AddedLater()] = None
    c2pa_roots: Annotated[str | None, External("file"), AddedLater()] = None

    @model_validator(mode="after")
    def _roots_are_of_a_verification(self) -> Ingest:
        if self.c2pa_roots is not None and self.c2pa != "verify":
            raise ValueError("c2pa_roots is for signatures that are verified; set c2pa to verify, or leave it out")
        return self


def find_revoked_images(
    spec: Ingest, folder: Path, files: Mapping[str, PathDigest], revoked: Collection[str]
) -> set[str]:
    """Returns the revoked images in the folder and the revoked consents in its consent file.

    Args:
        spec: The spec with both paths.
        folder: The folder of the pipeline file.
        files: Digests of the user's files.
        revoked: Digests of images and ids of consents.
    """
    from lora_engine.data.archives import is_archive, is_table
    from lora_engine.data.consent import read_consent

    try:
        stated = read_consent(folder / spec.consent).values() if spec.consent is not None else ()
    except DataError:
        stated = ()  # the step itself reports the error
    if any(is_archive(name) or is_table(name) for name in [spec.images, *files["images"].files]):
        return {*revoked}  # their images are known only after they are read
    consents = {entry.consent for entry in stated if entry.consent is not None}
    return (consents | {*files["images"].files.values()}) & {*revoked}


def find_revision(spec: Ingest, files: Mapping[str, PathDigest]) -> int:
    """Returns the first revision that reads a folder as this release does; see `StepKind.revisions`.

    Since revision 4, a statement about one copy of an image counts for all. Since revision 5, layouts of other programs
    are recognized; since 6, archives, tables and dataset files are. Revision 7 is 6 where HEIC can be read.
    """
    from lora_engine.data.earlier_layouts import is_plain, is_without_archives

    if "images" not in files or (
        spec.layout in {"auto", "plain", "kohya"} and is_without_archives(files["images"].files)
    ):
        is_as_before = spec.layout == "auto" and "images" in files and is_plain(files["images"].files)
        return (3 if spec.consent is None else 4) if is_as_before else 5
    return 7 if find_spec("pillow_heif") is not None else 6


@step(
    Ingest,
    produces="manifest",
    revision=7,
    revisions=find_revision,
    summary="manifest.json",
    find_excluded=find_revoked_images,
    imports=always("lora_engine.data.ingest"),
)
def ingest(spec: Ingest, context: Context) -> None:
    """Writes a manifest with a clean copy of every usable image and its caption."""
    from lora_engine.data.ingest import ingest as ingest_folder
    from tasks.consent import check_new_dataset

    manifest = ingest_folder(
        context.files["images"],
        context.out,
        spec.narrow(IngestSettings),
        consent=context.files.get("consent"),
        masks=context.files.get("masks"),
        revoked=context.excluded,
        cache=_decode_cache(spec, context),
        c2pa_roots=context.files.get("c2pa_roots"),
        progress=context.progress,
    )
    check_new_dataset(context.home, manifest, spec.consent_policy, f"step {context.name!r}")


def _decode_cache(spec: Ingest, context: Context) -> DecodeCache | None:
    """Returns what earlier runs decoded of the folder; a forced step decodes all of it again."""
    from lora_engine.data.decode_cache import DecodeCache

    if context.force:
        return None
    return DecodeCache(
        context.home.cache / "decoded",
        context.files["images"],
        spec.narrow(IngestSettings),
        open_store(context.home).read_digest,
        context.files.get("c2pa_roots"),
    )
