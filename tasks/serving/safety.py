"""Loads the safety hook of a server, which may refuse images before they leave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from registry.entities import Decision
from tasks.errors import SpecError
from tasks.serving.job import ImagesRefused, Job

if TYPE_CHECKING:
    from PIL.Image import Image

GROUP = "loraline.safety"
"""Group of the entry points."""
SafetyHook = Callable[[Sequence["Image"], Job], Decision]
"""Decides about the images of a job before anyone can read them; called by one thread."""
_logger = logging.getLogger(__name__)


def load_hook(name: str) -> SafetyHook:
    """Returns a safety hook.

    Args:
        name: `package:function`, or the name of an entry point of `GROUP`.

    Raises:
        SpecError: There is no such function.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    module, colon, attribute = (found[0].value if found else name).partition(":")
    try:
        if not colon:
            raise SpecError(
                f"no safety hook {name!r}",
                where="--safety",
                allowed=f"package:function, or an entry point of {GROUP}: "
                + (", ".join(entry.name for entry in entry_points(group=GROUP)) or "none is installed"),
            )
        hook = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(
            f"the safety hook {name!r} cannot be imported: {error}",
            where="--safety",
            remedy="install the package, and name a function of one of its modules",
        ) from error
    if not callable(hook):
        raise SpecError(f"the safety hook {name!r} is no function", where="--safety")
    return hook  # type: ignore[no-any-return]  # what it returns is checked at each call


def require_safe(hook: SafetyHook, images: Sequence[Image], job: Job) -> None:
    """Asks the hook about the images of a job. A hook that fails refuses them.

    Raises:
        ImagesRefused: They may not leave.
    """
    try:
        decision = hook(images, job)
    except Exception as error:  # any error of another package's code; without a decision, nothing leaves
        _logger.exception("the safety hook failed for job %s", job.id)
        raise ImagesRefused(f"the safety hook failed ({type(error).__name__}); its images are refused") from error
    if not isinstance(decision, Decision):
        raise ImagesRefused(
            f"the safety hook returned {type(decision).__name__}; its images are refused",
            remedy="return registry.entities.Decision(allowed, reasons) from the hook",
        )
    if not decision.allowed:
        _logger.warning("the safety hook refused job %s of %s: %s", job.id, job.tenant, "; ".join(decision.reasons))
        raise ImagesRefused("the safety hook refuses the images", reasons=decision.reasons)
