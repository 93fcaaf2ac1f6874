"""Writes a diffusers folder of a conversion: weights, settings and tokenizers. It appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_engine.checkpoints.folder import write_settings
from lora_engine.checkpoints.stored_tensor import PlannedTensor
from lora_engine.checkpoints.tensor_files import write_tensors
from lora_engine.checkpoints.tokenizers import write_tokenizer
from lora_engine.errors import BaseModelError
from lora_engine.families import Architecture, ComponentConfig
from lora_engine.families.layout import text_encoder_of
from lora_engine.files import write_within

_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def write_folder(
    out: Path,
    architecture: Architecture,
    pipeline: str,
    components: Mapping[str, ComponentConfig],
    plans: Mapping[str, Mapping[str, PlannedTensor]],
    tokenizers: Mapping[str, Path],
) -> list[Path]:
    """Writes a diffusers folder, and returns its files, sorted.

    Args:
        out: A new or empty folder.
        architecture: The published base with these components.
        pipeline: Name of the pipeline's class.
        components: Class and settings of the components that it has.
        plans: The tensors of each component with weights.
        tokenizers: A folder with the files of each tokenizer; without an entry it is left out.

    Raises:
        BaseModelError: `out` is not empty, values are not finite, or a tokenizer does not fit its text encoder.
    """
    with _new_folder(out) as folder:
        written = []
        for name, source in tokenizers.items():
            text = components[text_encoder_of(name)]
            written += write_tokenizer(source, folder / name, architecture.components[name], text)
        for name, plan in plans.items():
            path = folder / name / _WEIGHTS[components[name].library]
            write_tensors(path, plan, {"format": "pt"})
            written.append(path)
        written += write_settings(folder, architecture, pipeline, components, tokenizers)
    return sorted(out / path.relative_to(folder) for path in written)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out` and renames it to `out` on success."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BaseModelError("the output already exists", where=str(out), allowed="a new or empty folder")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with write_within(partial):
            yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
