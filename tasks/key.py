"""The cache key: the name of a piece of work, made of all that its result depends on and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from tasks.spec import StepSpec
from tasks.step import Inputs, StepKind, locate_base


def cache_key(kind: StepKind, spec: StepSpec, folder: Path, inputs: Inputs, files: Mapping[str, str]) -> str:
    """The name of the work: equal keys mean equal results.

    Made of the step's name and revision, its own settings, the digests of its inputs, the content of the user's files
    and the fingerprint of the base; not of names, paths or times.

    Args:
        kind: The kind of step.
        spec: Its settings.
        folder: Where the pipeline file lies.
        inputs: The artifacts that it takes.
        files: The digests of the user's files, as `digest_files` gives them.
    """
    own = spec.own_settings()
    base = own.pop("base", None)
    parts = {
        "step": kind.name,
        "revision": kind.revision,
        "settings": own,
        "inputs": {field: [ref.sha256 for ref in refs] for field, refs in inputs.items() if refs},
        "files": dict(files),
        "base": base_fingerprint(base, folder) if base is not None else None,
    }
    return sha256_bytes(canonical_json(parts))


def digest_files(spec: StepSpec, folder: Path) -> dict[str, str]:
    """The digests of the files and folders that a spec points to, by field."""
    return {field: digest_path(folder / path) for field, path, _ in spec.externals()}


def digest_path(path: Path) -> str:
    """The digest of a file's bytes, or of all names and bytes below a folder."""
    if not path.is_dir():
        return sha256_file(path)
    entries = {
        item.relative_to(path).as_posix(): f"-> {item.readlink()}" if item.is_symlink() else sha256_file(item)
        for item in sorted(path.rglob("*"))
        if item.is_symlink() or item.is_file()
    }
    return sha256_bytes(canonical_json(entries))


def describe_base(base: str, folder: Path) -> dict[str, str]:
    """What finds a base again and proves that it is the same: its label, where it lies if that is a path, fingerprint.

    Args:
        base: As the pipeline file names it.
        folder: Where the pipeline file lies.
    """
    from lora_engine.bases.source import TINY, resolve_base

    located = locate_base(base, folder)
    source = resolve_base(located)
    is_path = source.revision is None and source.name != TINY
    path = {"path": str(Path(located).expanduser().resolve())} if is_path else {}
    return {"label": source.label, "fingerprint": base_fingerprint(base, folder)} | path


@lru_cache(maxsize=8)
def base_fingerprint(base: str, folder: Path) -> str:
    """The digest of a base model's weights and configuration; read once per process."""
    from lora_engine.bases.source import resolve_base

    return resolve_base(locate_base(base, folder)).fingerprint()
