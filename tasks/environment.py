"""Describes the environment of a step for lineage: packages, code, interpreter, machine. Never part of an artifact.

`lora_engine.compute` describes device, threads and torch's build, which are known only once torch is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_engine.files import canonical_json, sha256_bytes, sha256_file
from registry.store.redaction import redact_url

PACKAGES = ("flows", "lora_engine", "registry", "tasks")
"""Loraline's packages, whose source can change a result."""
_SHOWN = ("loraline", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "mlflow", "prefect")
_SECONDS = 20


@lru_cache(maxsize=1)
def describe_environment() -> dict[str, Any]:
    """Describes everything that can change a result except inputs, settings and device; read once per process.

    Returns:
        `packages`: versions of the most important packages. `distributions`: all installed distributions. `code`: see
        `describe_code`. Also interpreter, system, CPUs and threads.
    """
    installed = list_distributions()
    versions = dict(entry.split(" @ ")[0].split("==") for entry in installed)
    return {
        "packages": {name: versions.get(name, "not installed") for name in _SHOWN},
        "distributions": installed,
        "code": describe_code(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def list_distributions() -> list[str]:
    """Returns `name==version` of each installed distribution, sorted; with ` @ URL` if it is not from an index."""
    # Of several distributions with one name, Python imports the first.
    entries: dict[str, str] = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name:
            entries.setdefault(name, f"{name}=={distribution.version}{_origin(distribution)}")
    return sorted(entries.values())


def describe_code() -> dict[str, Any]:
    """Returns the digest of the four packages' source; for a git checkout also the commit and `changed`."""
    folders = {name: folder for name in PACKAGES if (folder := _folder(name)) is not None}
    files = {
        f"{name}/{path.relative_to(folder).as_posix()}": sha256_file(path)
        for name, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {"sha256": sha256_bytes(canonical_json(files)), "files": len(files), **_checkout(list(folders.values()))}


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _checkout(folders: list[Path]) -> dict[str, Any]:
    root = folders[0].parent
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *(folder.name for folder in folders))
    return {} if commit is None or changed is None else {"commit": commit.strip(), "changed": bool(changed.strip())}


def _git(root: Path, *arguments: str) -> str | None:
    # Other processes may use git in the same checkout.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout if completed.returncode == 0 else None


def _origin(distribution: Distribution) -> str:
    written = distribution.read_text("direct_url.json")
    if not written:
        return ""
    try:
        origin = json.loads(written)
    except ValueError:
        return ""
    revision = origin.get("vcs_info", {}).get("commit_id") or origin.get("archive_info", {}).get("hash") or ""
    # The path of a local folder is useless on other machines, and may contain a user's name.
    return (
        f" @ {redact_url(origin['url'])} {revision}".rstrip()
        if not str(origin.get("url", "")).startswith("file:")
        else " @ folder"
    )
