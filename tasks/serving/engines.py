"""Makes the engine that a service's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tasks.errors import SpecError
from tasks.serving.settings import ServiceSettings

if TYPE_CHECKING:
    from lora_engine.serving.engine import ImageEngine


def load_engine(settings: ServiceSettings, adapters: Sequence[tuple[Path, str, float]] = ()) -> ImageEngine:
    """Returns the engine of a service; loads its base.

    Args:
        settings: The settings.
        adapters: File, `name@version` and weight of the adapters of the static engine.

    Raises:
        SpecError: The engine has no such option, or not with this value.
        BaseModelError: No such base.
        AdapterError: An adapter does not match the base.
    """
    from lora_engine.serving import engines

    kind = engines.ENGINES[settings.engine].options
    allowed = ", ".join(name for name in kind.model_fields if name != "adapters")
    where = f"options of the engine {settings.engine!r}"
    if "adapters" in settings.engine_options:
        raise SpecError("adapters is no option here", where=where, allowed=allowed, remedy="name them by --adapter")
    values = {"max_images": settings.batch_images, **settings.engine_options}
    if adapters and kind is not engines.StaticOptions:
        raise SpecError(
            f"the engine {settings.engine!r} takes adapters by request",
            where="--adapter",
            allowed="adapters at the start with the engine 'static'",
            remedy="leave --adapter out, or choose --engine static",
        )
    if adapters:
        values["adapters"] = " ".join(f"<lora:{reference}:{weight:g}>" for _, reference, weight in adapters)
    try:
        options = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise SpecError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=where,
            allowed=allowed,
        ) from None
    files = [(file, reference) for file, reference, _ in adapters]
    return engines.make_engine(settings.engine, settings.base, options, files=files)
