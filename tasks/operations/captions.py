"""Finds the models of captioners, and reports the captions of a dataset: origins, and what is wrong with them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_engine.bases.source import digest_files, resolve_base
from lora_engine.data.caption_checks import CaptionFinding, check_captions
from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.spec import PLACEHOLDERS, CaptionSettings
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write, canonical_json, expand_home, is_present_folder
from lora_engine.registries import import_target
from registry.home import Home
from tasks.step import locate_base

REPORT = "captions.json"
"""The file of the report beside the manifest."""
_CLIP_FILES = (".safetensors", ".json", ".txt")
_Spec = TypeVar("_Spec", bound=BaseModel)
_log = logging.getLogger(__name__)


def check_settings(spec: type[_Spec], values: Mapping[str, Any]) -> _Spec:
    """Returns settings that a verb takes from its options.

    Raises:
        SettingsError: A value is invalid.
    """
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        # Of a union, the deepest error is about the option that was meant.
        first = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
        name = ".".join(part for part in map(str, first["loc"]) if part.isidentifier()) or "the settings"
        raise SettingsError(f"{name}: {first['msg']}, not {repr(first['input'])[:200]}") from None


def choose_captioner(
    vlm: str | None, tagger: str | None, prompt: str | None, style: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the captioner of a verb: a vision-language model, with a tagger's tags as a hint, or a tagger.

    Args:
        vlm: Hub id or folder; None means none.
        tagger: Hub id or folder; None means none.
        prompt: The instruction; None means that of the model's family.
        style: See `VlmOptions`.
        options: Further options of the captioner.

    Raises:
        SettingsError: There is no model, or an option of the other captioner.
    """
    if vlm is None and tagger is None:
        raise SettingsError("there is no model", remedy="give --captioner or --tagger, a hub id or a folder")
    if vlm is not None:
        hint = {"tagger": {"model": tagger}} if tagger is not None else {}
        return {"name": "vlm", "model": vlm, "prompt": prompt, "style": style, **hint, **options}
    if prompt is not None or style != "sentences":
        raise SettingsError("a tagger has no prompt and no style", remedy="leave them out, or give --captioner")
    return {"name": "tagger", "model": tagger, **options}


def caption_cache(home: Home) -> Path:
    """Returns the folder with the captions of single images, by content."""
    return home.cache / "captions"


def caption_labels(settings: CaptionSettings, models: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Returns role -> label of the captioner's models, without those of checks."""
    return {role: models[role]["label"] for role in settings.models()}


def with_located_models(settings: CaptionSettings, folder: Path) -> CaptionSettings:
    """Returns settings in which paths of models, which are relative to a folder, are full."""
    values = settings.model_dump(mode="json")
    for part in (values["captioner"] if settings.models() else None, values["check"]):
        _locate(part, folder)
    return type(settings).model_validate(values)


def _locate(part: Any, folder: Path) -> None:
    for name in ("model", "base", "clip") if isinstance(part, dict) else ():
        if isinstance(part.get(name), str):
            part[name] = locate_base(part[name], folder)
    if isinstance(part, dict):
        _locate(part.get("tagger"), folder)


def find_caption_models(settings: CaptionSettings, folder: Path) -> dict[str, dict[str, str]]:
    """Returns the models of captioner and checks; see `StepKind.models`.

    Args:
        settings: The settings.
        folder: The folder that relative paths start from.

    Raises:
        BaseModelError: One is missing, incomplete or unsafe.
    """
    models = {}
    for role, (name, target) in settings.models().items():
        source = import_target(CAPTIONERS, settings.captioner_name, target)(locate_base(name, folder))
        place = {"revision": source.revision} if source.revision else {"path": str(source.folder)}
        models[role] = {"name": name, "label": source.label, "fingerprint": source.fingerprint(), **place}
    check = settings.check
    if check is not None and check.base is not None:
        base = resolve_base(locate_base(check.base, folder))
        # Only tokenizers and configurations are read.
        files = [name for name in base.layout.files if name.startswith(("tokenizer", "text_encoder"))]
        files = [name for name in files if not name.endswith(".safetensors")]
        place = {"revision": base.revision} if base.revision else {"path": str(base.folder)}
        fingerprint = digest_files(base.folder, files)
        models["tokenizers"] = {"name": check.base, "label": base.label, "fingerprint": fingerprint, **place}
    if check is not None and check.clip is not None:
        clip = expand_home(folder / check.clip).resolve()
        if not is_present_folder(clip):
            raise SettingsError(
                f"check.clip is {check.clip!r}: there is no such folder",
                remedy="give a local folder that CLIPModel.save_pretrained wrote, with its tokenizer",
            )
        names = sorted(file.name for file in clip.iterdir() if file.suffix in _CLIP_FILES)
        fingerprint = digest_files(clip, names)
        models["clip"] = {"name": check.clip, "label": clip.name, "fingerprint": fingerprint, "path": str(clip)}
    return models


def find_caption_problems(
    captions: Mapping[str, str],
    images: Mapping[str, Path],
    settings: CaptionSettings,
) -> tuple[list[CaptionFinding], dict[str, float]]:
    """Returns what is wrong with captions, and their CLIP scores if a CLIP is given.

    Args:
        captions: Name of an image -> caption.
        images: Name of an image -> file.
        settings: Has trigger, class word and `check`.
    """
    findings = check_captions(captions, (settings.trigger, settings.class_word))
    scores: dict[str, float] = {}
    check = settings.check
    if check is not None and check.base is not None:
        from lora_engine.captioning.checks import check_lengths, check_trigger, load_base_tokenizers

        tokenizers = load_base_tokenizers(resolve_base(check.base))
        findings = check_lengths(captions, tokenizers) + findings
        if settings.trigger is not None:
            findings = check_trigger(settings.trigger, tokenizers) + findings
    if check is not None and check.clip is not None:
        from lora_engine.captioning.checks import check_match
        from lora_engine.embedding.embedder import load_embedder

        unlike, scores = check_match(images, captions, load_embedder(check.clip))
        findings += unlike
    return findings, scores


def captions_to_check(images: Iterable[ImageEntry], folder: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """Returns name -> caption, and name -> file; the alternatives have names such as `a.png, caption 2`."""
    captions: dict[str, str] = {}
    files: dict[str, Path] = {}
    for image in images:
        for number, text in enumerate(image.captions, start=1):
            name = image.source if number == 1 else f"{image.source}, caption {number}"
            captions[name], files[name] = text, folder / image.file
    return captions, files


def report_captions(
    folder: Path, manifest: Manifest, settings: CaptionSettings, models: Mapping[str, Mapping[str, str]]
) -> list[CaptionFinding]:
    """Writes `captions.json` beside the manifest: models, findings, and caption, origin and score of each image.

    Class images are left out. Returns the findings.
    """
    concept = [image for image in manifest.pictures if image.split != "class"]
    captions, files = captions_to_check(concept, folder)
    words = {name: getattr(manifest, name) for name in PLACEHOLDERS}
    findings, scores = find_caption_problems(captions, files, settings.model_copy(update=words))
    report = {
        # Names and paths would make the bytes depend on the machine.
        "models": {role: {k: v for k, v in m.items() if k not in {"name", "path"}} for role, m in models.items()},
        "findings": [asdict(finding) for finding in findings],
        "images": [
            {"source": image.source, "caption": image.caption, "origin": image.caption_origin or ".txt"}
            | ({"alternatives": [*image.alternatives]} if image.alternatives else {})
            | ({"clip_score": scores[image.source]} if image.source in scores else {})
            for image in concept
        ],
    }
    atomic_write(folder / REPORT, canonical_json(report))
    return findings


def log_findings(findings: list[CaptionFinding]) -> None:
    """Logs each finding as a warning, which lineage records and the summary of a run shows."""
    for finding in findings:
        _log.warning("%s", finding)
