"""Reads the adapter file of an import, which is untrusted: copies it, and validates the copy against its base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import AdapterError
from lora_engine.files import is_present
from tasks.operations.import_request import ImportRequest

if TYPE_CHECKING:
    from lora_engine.formats import Bundle, Card


def inspect_file(file: Path) -> dict[str, Any]:
    """Returns the header facts of a file: format, kinds, `card` with license, trigger and base, digests of its `files`.

    Raises:
        AdapterError: The file is no valid adapter.
    """
    from lora_engine.formats import inspect

    if not is_present(file):
        raise AdapterError("the file does not exist", where=str(file), remedy="check the path")
    return inspect(file)


def copy_recognized(file: Path, names: Mapping[str, str], folder: Path) -> None:
    """Copies the recognized files of an adapter, which may be a folder, and no others."""
    source = file if file.is_dir() else file.parent
    for relative in names:
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target)


def read_import(path: Path, request: ImportRequest, original: Mapping[str, str], form: str) -> Bundle:
    """Reads the adapter, validates it against its base, and adds the import to its card.

    Args:
        path: The copy of the file.
        request: The user's statements about it.
        original: Name -> digest of the original files.
        form: Format of the file.

    Raises:
        AdapterError: The file is no valid adapter, has non-finite values, or is not for that base.
        BaseModelError: The base does not exist.
    """
    from lora_engine.adapters import Adapter
    from lora_engine.bases.structure import base_module_shapes
    from lora_engine.formats import Bundle, Card, read_bundle, read_embeddings

    shapes = base_module_shapes(request.base)
    label, family, fingerprint = _describe_base(request.base)
    if form == "embedding":
        from lora_engine.formats.embeddings import check_widths

        embeddings = tuple(read_embeddings(path))
        check_widths(embeddings, shapes)
        bundle = Bundle(Adapter({}, family, fingerprint), Card(), embeddings)
    else:
        bundle = read_bundle(path, shapes)
    adapter = bundle.adapter
    claims = {"family": (adapter.base, family), "base model": (adapter.fingerprint, fingerprint)}
    for noun, (stated, requested) in claims.items():
        if stated and requested and stated != requested:
            raise AdapterError(
                f"the file is for {noun} {stated!r}, but --base is {requested!r}",
                where=path.name,
                remedy="give the base that the adapter was trained on",
            )
    imported = {"format": form, "files": sorted(original.values())}
    imported |= {"assumed": bundle.assumptions} if bundle.assumptions else {}
    # A published name has no fingerprint; that of the header is only a claim, so the card and the rights leave it out.
    card = _card(bundle.card, request, label, fingerprint, imported)
    return Bundle(
        replace(adapter, base=family, fingerprint=fingerprint or adapter.fingerprint), card, bundle.embeddings
    )


def _describe_base(base: str) -> tuple[str, str, str | None]:
    from lora_engine.bases.source import resolve_base
    from lora_engine.families import published

    if base in published:
        return base, published[base].family, None
    source = resolve_base(base)
    return source.label, source.family, source.fingerprint()


def _card(card: Card, request: ImportRequest, label: str, fingerprint: str | None, imported: Mapping[str, Any]) -> Card:
    stated = {"license": request.license} | ({"trigger": request.trigger} if request.trigger else {})
    stated |= {"recommended": request.recommended} if request.recommended else {}
    # The user's statements replace those of the header.
    replaced = {"modelspec.license", *(["modelspec.trigger_phrase"] if request.trigger else [])}
    replaced |= {"modelspec.usage_hint"} if request.recommended else set()
    original_recipe = {"made": card.recipe} if card.recipe else {}
    return card.model_copy(
        update={
            **stated,
            "title": card.title or request.name,
            "base": label,
            "base_fingerprint": fingerprint,
            "recipe": {"imported": imported, "parents": [f"base:{label}"], **original_recipe},
            "extra": {key: text for key, text in card.extra.items() if key not in replaced},
        }
    )


def write_import(out: Path, bundle: Bundle) -> None:
    """Writes the adapter with its new card into a folder."""
    from lora_engine.formats import write_adapter

    path = out / "adapter.safetensors"
    write_adapter(path, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)
