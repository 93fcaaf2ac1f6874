"""Describes the images of a dataset with a model: one caption at a time is cached by content, so a run can resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.captioning.source import CaptionerModel, resolve_tagger, resolve_vlm
from lora_engine.captioning.tagger import load_tagger
from lora_engine.captioning.vlm import load_vlm
from lora_engine.captioning.vlm_families import find_vlm_family
from lora_engine.data.captioner_options import MAX_DESCRIPTION, TaggerOptions, VlmOptions, fill_prompt
from lora_engine.data.captioners import DescribeJob
from lora_engine.data.images import open_image
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError, EngineError, SettingsError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes, sha256_file
from lora_engine.progress import Progress

_REVISION = 1
_WITHOUT_EFFECT = {"batch_size", "device", "tagger", "model", "prompt"}
"""Options that the key of a caption does not hold; the prompt is there with its words, the model by its content."""
_HINTED = 500
"""Characters of tags or of an existing caption that a prompt quotes."""


def describe_with_vlm(job: DescribeJob) -> list[str]:
    """Returns the captions of a vision-language model; the tags of its tagger, if any, are hints in the prompt.

    Raises:
        BaseModelError: A model cannot be found, loaded or run.
        SettingsError: This machine lacks the requested device or package, or the model cannot use the tags.
    """
    options = VlmOptions.model_validate(job.options)
    source = resolve_vlm(options.model)
    prompt = _prompt_of(source, options)
    tags: Sequence[str] = [""] * len(job.images)
    progress = job.progress
    if options.tagger is not None:
        tags = _tag(job, options.tagger, _part_of(job.progress, 0))
        progress = _part_of(job.progress, 1)
    words = [
        {**job.words, "tags": hint[:_HINTED], "caption": text[:_HINTED]}
        for hint, text in zip(tags, job.texts, strict=True)
    ]
    settings = options.model_dump(mode="json", exclude=_WITHOUT_EFFECT) | {"prompt": prompt}
    captions = _Cache(job.cache, source, settings, words, job.images)
    missing = captions.missing
    progress(len(job.images) - len(missing), len(job.images), {})
    if not missing:  # the model is not loaded
        return captions.texts
    vlm = load_vlm(source, options)
    try:
        for batch in _batches(missing, vlm.batch_size):
            prompts = [fill_prompt(prompt, {name: vlm.plain(text) for name, text in words[i].items()}) for i in batch]
            captions.add(batch, vlm.describe([open_image(job.images[index]) for index in batch], prompts))
            progress(len(job.images) - len(captions.missing), len(job.images), {})
    finally:
        vlm.close()
    return captions.texts


def _prompt_of(source: CaptionerModel, options: VlmOptions) -> str:
    """Returns the prompt with its placeholders; raises `SettingsError` if it could not use the tags of a tagger."""
    family = find_vlm_family(read_json_object(source.folder / "config.json", BaseModelError), str(source.folder))
    prompt = options.prompt or family.prompts[options.style]
    if options.tagger is None or "{tags}" in prompt:
        return prompt
    if not family.follows_instructions:
        raise SettingsError(
            f"{family.title} follows no instruction, so the tags of the tagger would have no effect",
            remedy="leave the tagger out, use it alone (captioner tagger), or write a prompt with {tags}",
        )
    return prompt + family.hint


def describe_with_tagger(job: DescribeJob) -> list[str]:
    """Returns the tags of a tagger, separated by commas.

    Raises:
        BaseModelError: The model cannot be found, loaded or run.
        SettingsError: This machine lacks the requested device or package.
    """
    return _tag(job, TaggerOptions.model_validate(job.options), job.progress)


def _tag(job: DescribeJob, options: TaggerOptions, progress: Progress) -> list[str]:
    source = resolve_tagger(options.model)
    settings = options.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    captions = _Cache(job.cache, source, settings, [{}] * len(job.images), job.images)
    missing = captions.missing
    progress(len(job.images) - len(missing), len(job.images), {})
    if not missing:
        return captions.texts
    tagger = load_tagger(source, options)
    for index in missing:
        captions.add([index], [text[:MAX_DESCRIPTION] for text in tagger.describe([open_image(job.images[index])])])
        progress(len(job.images) - len(captions.missing), len(job.images), {})
    return captions.texts


class _Cache:
    """The captions of images by what they depend on: pixels, model, prompt, settings; in files if there is a folder."""

    def __init__(
        self,
        folder: Path | None,
        source: CaptionerModel,
        settings: Mapping[str, Any],
        words: Sequence[Mapping[str, str]],
        images: Sequence[Path],
    ) -> None:
        self._folder, self._keys = folder, [""] * len(images)
        self._texts: dict[int, str] = {}
        if folder is None:
            return
        common = {"revision": _REVISION, "model": source.fingerprint(), "settings": settings}
        for index, (image, filled) in enumerate(zip(images, words, strict=True)):
            key = {**common, "words": dict(filled), "image": sha256_file(image)}
            self._keys[index] = sha256_bytes(canonical_json(key))
            text = self._load(index)
            if text is not None:
                self._texts[index] = text

    @property
    def missing(self) -> list[int]:
        """The positions of images without a caption."""
        return [index for index in range(len(self._keys)) if index not in self._texts]

    @property
    def texts(self) -> list[str]:
        """The captions of all images."""
        return [self._texts[index] for index in range(len(self._keys))]

    def add(self, positions: Sequence[int], texts: Sequence[str]) -> None:
        for index, text in zip(positions, texts, strict=True):
            self._texts[index] = text
            if self._folder is not None:
                atomic_write(self._path(index), canonical_json({"text": text}))

    def _load(self, index: int) -> str | None:
        try:
            text = read_json_object(self._path(index), BaseModelError).get("text")
        except (OSError, EngineError):  # absent or damaged: it is written again
            return None
        return text if isinstance(text, str) and len(text) <= MAX_DESCRIPTION else None

    def _path(self, index: int) -> Path:
        key = self._keys[index]
        return (self._folder or Path()) / key[:2] / f"{key}.json"


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _part_of(progress: Progress, part: int) -> Progress:
    """Returns the progress of the first or second half of the work."""

    def report(done: int, total: int, values: Mapping[str, float]) -> None:
        progress(part * total + done, 2 * total, values)

    return report
