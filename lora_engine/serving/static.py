"""The static engine: adapters that are fused once, when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.errors import AdapterError, EngineError, SettingsError
from lora_engine.inference.composition import compose
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.settled_tags import all_tags
from lora_engine.serving.adapter_cache import AdapterCache
from lora_engine.serving.batch import CachedDrawer, SharedComposition, attempt, draw_together
from lora_engine.serving.engine import DrawnImages, ImageJob
from lora_engine.serving.engines import StaticOptions
from lora_engine.serving.grouping import batches_of, has_one_pass


class StaticEngine:
    """Draws jobs with the adapters that were fused at the start; a denoising step costs what it costs without adapters.

    The weights are computed from the base's own, which stay in memory. Adapters on quantized weights are attached. A
    job names no adapters, or the fused ones with their weights; its metadata names them in both cases.

    Args:
        base: The base, or a name for `load_base`.
        options: The options.
        files: File and `name@version` of the adapters in the options, in their order.

    Raises:
        SettingsError: The adapters cannot be read as a prompt, change their weight over the steps, or have other
            options of the base.
        AdapterError: An adapter does not fit the base.
    """

    def __init__(
        self,
        base: str | BaseModel,
        options: StaticOptions | None = None,
        files: Sequence[tuple[Path, str]] = (),
    ) -> None:
        self.options = options or StaticOptions()
        self._tags = _read_tags(self.options.adapters, len(files))
        self._files = tuple(files)
        self._base = load_base(base) if isinstance(base, str) else base
        self._adapters = AdapterCache(self._base, limit=1 << 62)
        self._withdrawn: Path | None = None
        bundles = [self._adapters.bundle(file) for file, _ in self._files]
        self._base.configure(options_of_cards([bundle.card for bundle in bundles]))
        self._open = ExitStack()
        pairs = list(zip(self._tags, bundles, strict=True))
        self._composition = self._open.enter_context(compose(self._base, pairs, engine="merged"))
        self._composition.set_step(0, 1)
        self._mode = SharedComposition(self._base, self._composition)
        self._drawer = CachedDrawer(self._base, self._adapters, lambda adapters, engine: nullcontext(self._composition))

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        """Returns True for jobs of one size, sampler and number of steps."""
        return has_one_pass(first, other, self.options.max_images)

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        """Draws jobs; see `ImageEngine.draw`."""
        refused = {index: error for index, job in enumerate(jobs) if (error := self._refusal(job))}
        chosen = [index for index in range(len(jobs)) if index not in refused]
        drawn = chain.from_iterable(
            self._draw(batch)
            for batch in batches_of(
                [self._with_adapters(jobs[index]) for index in chosen], self.shares_batch, self.options.max_images
            )
        )
        results: dict[int, DrawnImages | EngineError] = {**refused, **dict(zip(chosen, drawn, strict=True))}
        return [results[index] for index in range(len(jobs))]

    def forget(self, file: Path) -> None:
        """Refuses all further jobs if a fused adapter's file is dropped, such as one of a withdrawn version."""
        if file in {own for own, _ in self._files}:
            self._withdrawn = file

    def preview(self, latents: Tensor) -> Tensor:
        """Returns small images of latents; see `ImageEngine.preview`."""
        return self._drawer.preview(latents)

    def close(self) -> None:
        """Puts the weights of the base back, bit for bit."""
        self._open.close()

    def _draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        if len(jobs) == 1:
            return [attempt(self._drawer, jobs[0])]
        return draw_together(self._base, self._adapters, jobs, self._mode)

    def _with_adapters(self, job: ImageJob) -> ImageJob:
        return replace(job, prompt=replace(job.prompt, adapters=self._tags), files=self._files)

    def _refusal(self, job: ImageJob) -> EngineError | None:
        if self._withdrawn is not None:
            names = [name for file, name in self._files if file == self._withdrawn]
            return AdapterError(
                f"the adapter {names[0]!r}, which this server has fused, may not be used any longer",
                remedy="start the server with another version",
            )
        if self._files and job.settings.adapter_guidance != 1.0:
            return SettingsError(
                f"adapter_guidance is {job.settings.adapter_guidance:g}, and this server has fused its adapters",
                allowed="1: the prediction without them does not exist",
                remedy="leave it out, or use a server with the engine dynamic",
            )
        fused = [(file, replace(tag, name="")) for (file, _), tag in zip(self._files, self._tags, strict=True)]
        tags = all_tags(job.prompt, job.settings.regions)
        asked = [(file, replace(tag, name="")) for (file, _), tag in zip(job.files, tags, strict=True)]
        if not asked or (asked == fused and len(job.prompt.adapters) == len(tags)):
            return None
        named = ", ".join(name for _, name in job.files)
        return SettingsError(
            f"the prompt names the adapters {named!r}, and this server has fused its adapters at the start",
            allowed=", ".join(name for _, name in self._files) or "no adapters",
            remedy="leave the adapters out of the prompt, or use a server with the engine dynamic",
        )


def _read_tags(text: str, count: int) -> tuple[AdapterTag, ...]:
    prompt = parse_prompt(text)
    if prompt.text:
        raise SettingsError(
            f"the adapters have words between them: {prompt.text!r}",
            where="adapters",
            allowed="tags alone, such as <lora:zorb@production:0.7>",
        )
    for tag in prompt.adapters:
        if not tag.is_constant:
            raise SettingsError(
                f"the weight of {tag.name!r} changes over the steps, and the static engine fuses once",
                where="adapters",
                allowed="constant weights",
                remedy="use the engine dynamic",
            )
    if len(prompt.adapters) != count:
        raise SettingsError(
            f"{len(prompt.adapters)} adapters and {count} files do not match",
            where="adapters",
            allowed="one file per adapter",
        )
    return prompt.adapters
