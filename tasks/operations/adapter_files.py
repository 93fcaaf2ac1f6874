"""Implements the verbs on files: converts and resizes adapters, converts models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_engine.documents import parse_value
from lora_engine.errors import SettingsError, UnknownBaseError
from lora_engine.files import is_present
from registry.home import Home
from registry.store.snapshot import find_scratch
from tasks.errors import SpecError
from tasks.operations.inspect_files import existing_file, module_shapes_of, open_bundle

if TYPE_CHECKING:
    from lora_engine.formats import Card


def convert_adapter(
    file: Path,
    output: Path,
    to: str,
    *,
    base: str | None,
    dtype: str | None,
    approximation: Mapping[str, Any] | None,
    output_name: str | None = None,
    license_expression: str | None = None,
    recommended: str | None = None,
) -> dict[str, Any]:
    """Writes an adapter in another format.

    Args:
        file: The adapter.
        output: A file or a folder.
        to: Name of a format.
        base: The base, for formats that need its module names; approximating DoRA, OFT or (IA)3 reads its weights.
        dtype: `float32`, `float16` or `bfloat16`; None keeps each factor's dtype.
        approximation: `rank` and `energy` for kinds that the format cannot hold; None refuses to approximate.
        output_name: See `write_adapter`.
        license_expression: License in the header; None keeps that of the file.
        recommended: Weights that the card recommends, as in a tag after the name; None keeps those of the file.

    Returns:
        `format`, `files` with their digests, `approximation` with the shares kept, and `assumed` assumptions.
    """
    from lora_engine.bases.base import load_base
    from lora_engine.families import published
    from lora_engine.files import sha256_file
    from lora_engine.formats import write_adapter
    from lora_engine.formats.card import restate
    from lora_engine.formats.dtypes import dtype_of
    from lora_engine.inference.prompts.tags import parse_arguments
    from lora_engine.merging.approximate import approximate

    if recommended is not None:
        parse_arguments("NAME", recommended)
    try:
        bundle, names = open_bundle(file, base), module_shapes_of(base)
    except UnknownBaseError as error:
        if base is not None or approximation is not None:
            raise
        return _cast_adapter(file, output, to, dtype, error, license_expression, recommended)
    adapter, retained = bundle.adapter, None
    if approximation is not None:
        model = load_base(base, device="cpu") if base is not None and base not in published else None
        result = approximate(adapter, to, **approximation, base=model, module_names=names)
        adapter = result.adapter
        retained = {"retained": result.total, "modules": dict(result.retained)} if result.retained else None
    written = write_adapter(
        output,
        adapter,
        format=to,
        card=restate(bundle.card, license_expression=license_expression, recommended=recommended),
        dtype=dtype_of(dtype),
        embeddings=bundle.embeddings,
        module_names=names,
        output_name=output_name,
    )
    files = [{"file": str(path), "sha256": sha256_file(path)} for path in written]
    return {"format": to, "files": files, "approximation": retained, "assumed": bundle.assumptions or None}


def _cast_adapter(
    file: Path,
    output: Path,
    to: str,
    dtype: str | None,
    unknown: UnknownBaseError,
    license_expression: str | None,
    recommended: str | None,
) -> dict[str, Any]:
    """Writes an adapter of an unknown base in another dtype; raises `unknown` for any other format than the file's."""
    from lora_engine.files import sha256_file
    from lora_engine.formats.card import restate
    from lora_engine.formats.dtypes import dtype_of
    from lora_engine.formats.verbatim import NAMES_KEPT, read_verbatim, write_verbatim

    original = read_verbatim(file)
    if original.codec.name != to:
        raise unknown
    card = restate(original.card, license_expression=license_expression, recommended=recommended)
    stated = {"modelspec.license": license_expression} if license_expression else {}
    original = replace(original, metadata={**original.metadata, **stated})
    written = write_verbatim(output, original, original.adapter, card, dtype=dtype_of(dtype))
    return {
        "format": to,
        "files": [{"file": str(written), "sha256": sha256_file(written)}],
        "approximation": None,
        "assumed": f"{unknown.problem}; {NAMES_KEPT}",
    }


def convert_model(file: Path, output: Path, to: str, **settings: Any) -> dict[str, Any]:
    """Writes a whole model in another layout, or, for `to="plain"`, without quantization.

    Args:
        file: The model.
        output: A file or a folder.
        to: `plain`, or see `checkpoints.convert_checkpoint`.
        settings: See `checkpoints.convert_checkpoint`; `plain` has none.
    """
    from lora_engine.checkpoints import convert_checkpoint
    from lora_engine.files import sha256_file

    if to == "plain":
        from lora_engine.streaming import write_plain

        for name, value in settings.items():
            if value:
                raise SettingsError(f"a conversion to 'plain' takes no {name}", remedy="leave the option out")
        written = write_plain(file, output)
        return {"format": to, "files": [{"file": str(path), "sha256": sha256_file(path)} for path in written]}
    written = convert_checkpoint(file, output, to=to, **settings)  # type: ignore[arg-type]  # the callee checks `to`
    return {"format": to, "files": [{"file": str(path), "sha256": sha256_file(path)} for path in written]}


def resize_adapter(file: Path, output: Path, *, base: str | None, **settings: Any) -> dict[str, Any]:
    """Writes an adapter at another rank; returns what each module keeps. `settings`: see `merging.resize`.

    If the base family is unknown or not supported, names and header stay, and `assumed` says why.
    """
    from lora_engine.bases.base import load_base
    from lora_engine.formats import write_adapter
    from lora_engine.formats.verbatim import NAMES_KEPT, read_verbatim, write_verbatim
    from lora_engine.merging.resize import resize

    try:
        bundle = open_bundle(file, base)
    except UnknownBaseError as error:
        if base is not None:
            raise
        original = read_verbatim(file)
        adapter, report = resize(original.adapter, **settings)
        write_verbatim(output, original, adapter, _resized_card(original.card, settings, report.retained))
        return report.as_json() | {"assumed": f"{error.problem}; {NAMES_KEPT}"}
    model = load_base(base, device="cpu") if base is not None and settings.get("others") == "lora" else None
    adapter, report = resize(bundle.adapter, base=model, **settings)
    card = _resized_card(bundle.card, settings, report.retained)
    write_adapter(output, adapter, card=card, embeddings=bundle.embeddings)
    return report.as_json()


def _resized_card(card: Card, settings: Mapping[str, Any], retained: float) -> Card:
    recorded = {name: value for name, value in settings.items() if value not in (None, "refuse")}
    recipe = card.recipe | {"resized": recorded | {"retained_energy": round(retained, 6)}}
    return card.model_copy(update={"recipe": recipe})


def model_path(base: str) -> Path:
    """Returns the folder or file of a base model's weights, by path or by name.

    Raises:
        BaseModelError: The base does not exist.
    """
    if Path(base).exists():
        return Path(base)
    from lora_engine.bases.source import resolve_base

    return resolve_base(base).folder


def parse_weighted(text: str) -> tuple[str, float]:
    """Parses `name` or `name:weight`; an existing file whose name has a colon is a name."""
    name, colon, weight = text.rpartition(":")
    if not colon or is_present(text):
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise SpecError(f"invalid adapter {text!r}", allowed="FILE or FILE:WEIGHT, such as a.safetensors:0.7") from None


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses `name=value` pairs with YAML values."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise SpecError(f"invalid setting {pair!r}", allowed="NAME=VALUE, such as density=0.3")
        settings[name] = parse_value(value, f"--set {name}", SpecError)
    return settings


@contextmanager
def checkout_adapters(
    texts: Sequence[str], home: Path, recorder: SourceRecorder | None = None
) -> Iterator[list[tuple[Path, float]]]:
    """Yields files and weights of adapters that are named by file or `name@ref`; deletes copies at the end.

    Args:
        texts: `name` or `name:weight`.
        home: The home with the named versions.
        recorder: Records the adapters as sources of what is made from them.

    Raises:
        AdapterError: A file does not exist.
        SpecError: A weight is not a number.
        RegistryError: A version does not exist.
    """
    named = [parse_weighted(text) for text in texts]
    with tempfile.TemporaryDirectory(dir=find_scratch()) as folder:
        inputs = [
            (fetch_adapter(ref, home, Path(folder) / str(index))[0], weight)
            for index, (ref, weight) in enumerate(named)
        ]
        for (ref, _), (path, _) in zip(named, inputs, strict=True):
            if recorder is not None:
                recorder.add_source(ref, path)
        yield inputs


class SourceRecorder(Protocol):
    """Records the sources of a result; see `tasks.operations.results.VerbRecorder`."""

    def add_source(self, text: str, path: Path) -> None:
        """Adds a source by the user's text and the file to read."""
        ...


@contextmanager
def checkout_adapter(text: str, home: Path, recorder: SourceRecorder) -> Iterator[Path]:
    """Yields the file of one adapter, which has no weight; see `checkout_adapters`."""
    with tempfile.TemporaryDirectory(dir=find_scratch()) as folder:
        path, _ = fetch_adapter(text, home, Path(folder))
        recorder.add_source(text, path)
        yield path


def fetch_adapter(ref: str, home: Path, folder: Path) -> tuple[Path, str]:
    """Returns the file of an adapter, and its `name@version` or the name of the file.

    Args:
        ref: A file, or `name@version` or `name@alias`.
        home: The home with the named versions.
        folder: The folder for the file of a version.
    """
    if "@" not in ref or is_present(ref):
        return existing_file(Path(ref)), Path(ref).name
    from registry.versions.versions import Versions
    from tasks.operations.promote import find_usable

    versions, path = Versions(Home.open(home, create=False)), folder / "adapter.safetensors"
    version = find_usable(versions, ref)
    versions.checkout_adapter(version, path)
    return path, f"{version.name}@{version.version}"
