"""Merges whole models that are named on the command line. Functions import the engine themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_engine.errors import SettingsError
from lora_engine.files import is_present
from tasks.operations.adapter_files import model_path, parse_weighted


def are_models(texts: Sequence[str]) -> bool:
    """Returns True if `name` or `name:weight` texts name whole models, and False if they name adapters.

    Raises:
        AdapterError: The header of a file cannot be read.
        SettingsError: Some are models, and others adapters.
        SpecError: A weight is not a number.
    """
    from lora_engine.checkpoints import is_checkpoint

    paths = [Path(parse_weighted(text)[0]) for text in texts]
    models = {path: is_checkpoint(path) for path in paths if is_present(path)}
    if len(set(models.values())) > 1:
        adapter = next(path for path, is_whole in models.items() if not is_whole)
        raise SettingsError(
            f"{str(adapter)!r} is not a whole model, and others are",
            allowed="adapters only, or whole models only",
            remedy="add adapters to a model with `loraline fuse`",
        )
    return any(models.values())


def merge_models(
    texts: Sequence[str],
    output: Path,
    *,
    method: str,
    options: Mapping[str, Any],
    base: str | None,
    dataset: str | None,
    seed: int,
    rounding: str = "nearest",
) -> dict[str, Any]:
    """Writes the merge of whole models.

    Args:
        texts: `name` or `name:weight`; a name is a folder, a file or a name of a base.
        output: A file, or a folder if the first model is one.
        method: Name of a checkpoint merge method.
        options: Options of the method.
        base: Must be None; only merges of adapters read a base.
        dataset: Must be None; only merges of adapters learn weights.
        seed: Seed of stochastic rounding; else it must be 0, because no method for models draws.
        rounding: `nearest` or `stochastic`.

    Returns:
        The fields of `CheckpointReport`.

    Raises:
        BaseModelError: A model cannot be read, or does not match the others.
        SettingsError: The method, an option or the weights are not valid.
    """
    from lora_engine.streaming import CHECKPOINT_METHODS, merge_checkpoints

    has_seed = seed != 0 and rounding == "nearest"
    for name, is_set in (("base", base is not None), ("dataset", dataset is not None), ("seed", has_seed)):
        if is_set:
            raise SettingsError(f"a merge of whole models takes no {name}", remedy=f"leave out --{name}")
    named = [parse_weighted(text) for text in texts]
    given = [None if name == text else weight for text, (name, weight) in zip(texts, named, strict=True)]
    weights = CHECKPOINT_METHODS[method].weights_for(given)
    paths = [model_path(name) for name, _ in named]
    report = merge_checkpoints(
        paths,
        weights,
        output,
        method=method,
        options=options,
        rounding=rounding,  # type: ignore[arg-type]  # the callee checks it
        seed=seed,
    )
    return asdict(report)
