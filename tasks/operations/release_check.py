"""Checks a promoted version as a user would: alias, bytes, policy, exports, and an image drawn with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lora_engine.errors import EngineError
from registry.entities import AdapterVersion
from registry.errors import RegistryError
from registry.home import Home
from registry.versions.versions import Versions
from tasks.operations.draw_request import DrawRequest
from tasks.operations.images import draw
from tasks.operations.upstream import find_upstream_steps
from tasks.step import STEPS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseCheck:
    """What is checked.

    Attributes:
        after: Delay before the check; seconds.
        sample: True draws one image.
        prompt: Its prompt; None means the adapter's trigger word.
        steps: Its denoising steps.
    """

    after: float = 0.0
    sample: bool = True
    prompt: str | None = None
    steps: int = 4


def find_release_problems(home: Home, version: AdapterVersion, alias: str, check: ReleaseCheck) -> list[str]:
    """Reads a promoted version back by its alias, and returns every problem; empty if there is none."""
    if check.after:
        time.sleep(check.after)
    problems = []
    parts = {"registry": _check_alias, "exports": _check_exports}
    if check.sample:
        parts["sample"] = _check_sample
    for name, part in parts.items():
        try:
            problems += [f"{name}: {problem}" for problem in part(home, version, alias, check)]
        except (EngineError, RegistryError, OSError) as error:
            problems.append(f"{name}: {getattr(error, 'problem', '') or error}")
    return problems


def _check_alias(home: Home, version: AdapterVersion, alias: str, check: ReleaseCheck) -> Iterator[str]:
    from lora_engine.formats import read_bundle

    with closing(Versions(home)) as versions:
        current = versions.get(version.name, alias)  # verifies bytes, signature, state and policy
        if (current.version, current.sha256) != (version.version, version.sha256):
            yield f"{version.name}@{alias} is {current.ref}, not {version.ref}"
        with home.temporary_folder(current.size) as folder:
            versions.store.checkout_file(current.artifact, current.adapter_path, folder / "adapter.safetensors")
            read_bundle(folder / "adapter.safetensors")


def _check_exports(home: Home, version: AdapterVersion, alias: str, check: ReleaseCheck) -> Iterator[str]:
    """Loads the files that `convert` steps made of the version."""
    from lora_engine.formats import read_bundle

    with closing(Versions(home)) as versions:
        revision, digest = str(STEPS["convert"].revision), version.artifact.sha256
        made = versions.lineage.completed_executions("convert", revision, {digest})
        outputs = {execution.output for execution in made if execution.output is not None}
        for output in sorted(outputs, key=lambda ref: ref.sha256):
            with home.temporary_folder(version.size * 4) as folder:
                versions.store.checkout(output, folder / "export")
                for path in sorted((folder / "export").rglob("*.safetensors")):
                    try:
                        read_bundle(path)
                    except EngineError as error:
                        yield f"{path.relative_to(folder / 'export')}: {error.problem}"


def _check_sample(home: Home, version: AdapterVersion, alias: str, check: ReleaseCheck) -> Iterator[str]:
    """Draws an image; values that are not finite raise an error."""
    prompt = check.prompt or version.card.get("trigger") or "a photo"
    request = DrawRequest(
        f"{prompt} <lora:{version.name}@{alias}:1>", base=_find_base(home, version), steps=check.steps
    )
    with home.temporary_folder() as folder:
        (path,) = draw(request, folder, home.path)
        if is_flat(path):
            yield f"the image of {request.prompt!r} is flat"


def is_flat(path: Path) -> bool:
    """Returns True if every pixel of an image has the same color."""
    from PIL import Image

    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(1)
    return colors is not None


def _find_base(home: Home, version: AdapterVersion) -> str:
    with closing(Versions(home)) as versions:
        upstream = find_upstream_steps(versions.lineage, version)
    paths = [step.settings.get("base", {}).get("path") for step in upstream.steps.values()]
    return next((str(path) for path in paths if path), None) or str(version.card.get("base") or "tiny")
