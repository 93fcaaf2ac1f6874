"""What a step ran on: packages, code, interpreter, machine. Recorded in lineage, never part of an artifact.

What the process computes with (device, threads, torch's build) is in `lora_engine.compute`, since it is known only once
torch is loaded.
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

PACKAGES = ("flows", "lora_engine", "registry", "tasks")
"""The packages of the product, whose source can change a result."""
_SHOWN = ("loraline", "torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "mlflow", "prefect")
_SECONDS = 20


@lru_cache(maxsize=1)
def describe_environment() -> dict[str, Any]:
    """Everything but the inputs, the settings and the device that can change a result; read once per process.

    Returns:
        `packages`: the few that matter most; `distributions`: all that is installed, as lineage keeps it once; `code`:
        see `describe_code`; interpreter, system, processors and threads.
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
    """`name==version` of all that is installed, sorted; ` @ URL` behind what did not come from an index."""
    # The first of a name is the one that is imported.
    found: dict[str, str] = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name:
            found.setdefault(name, f"{name}=={distribution.version}{_origin(distribution)}")
    return sorted(found.values())


def describe_code() -> dict[str, Any]:
    """Digest of the source of the four packages; where it is a checkout, the commit and whether that was changed."""
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
    # Without locks: other processes of the same checkout may be at it.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _origin(distribution: Distribution) -> str:
    written = distribution.read_text("direct_url.json")
    if not written:
        return ""
    try:
        origin = json.loads(written)
    except ValueError:
        return ""
    revision = origin.get("vcs_info", {}).get("commit_id") or origin.get("archive_info", {}).get("hash") or ""
    # A folder of this machine says nothing elsewhere, and may name a person.
    return (
        f" @ {origin['url']} {revision}".rstrip() if not str(origin.get("url", "")).startswith("file:") else " @ folder"
    )
