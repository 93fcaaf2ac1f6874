"""Puts adapters on a base with weights that follow the tags of a prompt: over steps, blocks and layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from lora_engine.adapters.attachment import Attachment, attach, check_fit
from lora_engine.adapters.layer import meta_weight
from lora_engine.adapters.merged_weights import MergedWeights, can_merge
from lora_engine.adapters.module_names import near_names
from lora_engine.bases.base import BaseModel
from lora_engine.errors import SettingsError
from lora_engine.formats import Bundle
from lora_engine.inference import ComposedEngine
from lora_engine.inference.merged_cache import MergedCache, part_of
from lora_engine.inference.prompts.blocks import (
    describe_lists,
    fits_family,
    fits_layer,
    weight_of_layer,
    weight_of_module,
)
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.textual_inversion import attach_embeddings


class Composition:
    """Adapters on a base whose weights follow the tags of a prompt. Created by `compose`.

    Args:
        family: Family of the base.
        tags: The tags, one per adapter.
        merged: What of the adapters is merged into the base's weights; None if nothing is.
        attached: What of each adapter is attached, by its number.
    """

    def __init__(
        self, family: str, tags: Sequence[AdapterTag], merged: MergedWeights | None, attached: Mapping[int, Attachment]
    ) -> None:
        self.tags = tuple(tags)
        self._family, self._merged, self._attached = family, merged, attached
        self._weights: list[tuple[float, float]] = []
        self._factors: dict[tuple[int, str], float] = {}

    @property
    def numbers(self) -> frozenset[int]:
        """The numbers of all adapters."""
        return frozenset(range(len(self.tags)))

    def numbers_of(self, tags: Sequence[AdapterTag]) -> frozenset[int]:
        """Returns the numbers of the adapters with these tags."""
        return frozenset(number for number, tag in enumerate(self.tags) if tag in tags)

    def set_step(
        self, step: int, steps: int, *, active: Collection[int] | None = None, is_enlarged: bool = False
    ) -> None:
        """Sets the weights of the adapters for a step.

        Args:
            step: From 0.
            steps: Number of all steps.
            active: Numbers of the adapters that act; the others have weight 0. None is all.
            is_enlarged: True for the pass over enlarged images.
        """
        acting = self.numbers if active is None else active
        weights = [
            (tag.text_weight(steps, is_enlarged=is_enlarged), tag.denoiser_weight(step, steps, is_enlarged=is_enlarged))
            if number in acting
            else (0.0, 0.0)
            for number, tag in enumerate(self.tags)
        ]
        if weights == self._weights:
            return
        self._weights = weights
        if self._merged is not None:
            self._merged.set_multipliers(self._weight_of)
        for index, attachment in self._attached.items():
            attachment.set_multipliers(partial(self._weight_of, index))

    def _weight_of(self, index: int, module: str) -> float:
        texts, images = self._weights[index]
        if (index, module) not in self._factors:
            tag = self.tags[index]
            block = 1.0 if tag.blocks is None else weight_of_module(module, tag.blocks, self._family)
            self._factors[index, module] = block * weight_of_layer(module, tag.layers)
        return self._factors[index, module] * (texts if module.startswith("text_encoder") else images)


@contextmanager
def compose(
    base: BaseModel,
    adapters: Sequence[tuple[AdapterTag, Bundle]],
    *,
    engine: ComposedEngine = "auto",
    cache: MergedCache | None = None,
) -> Iterator[Composition]:
    """Puts adapters and their learned tokens on a base while the context is open; then the base is as it was.

    Args:
        base: The model.
        adapters: Tags and adapters.
        engine: `merged` computes the weights of the base with all adapters, from kept ones, when a weight of a tag
            changes; drawing then costs what it costs without adapters. `attached` adds each difference to the outputs,
            which costs less if the weights change with every step and images are small, and keeps differences that are
            finer than 16-bit weights. `auto` merges into weights of 32 bits and attaches to others. Quantized weights
            are never merged.
        cache: Keeps merged weights for later compositions of this base; None keeps them until the end of this one.

    Raises:
        SettingsError: Block weights are of another family, or a layer weight names no layer of its adapter.
        AdapterError: An adapter does not fit the base, or two have the same learned token; the base is unchanged.
    """
    for tag, bundle in adapters:
        _check_names(base, tag, bundle)
    bundles = [bundle for _, bundle in adapters]
    for bundle in bundles:
        if bundle.adapter.modules:
            check_fit(base, bundle.adapter)
    merges = [[name for name in bundle.adapter.modules if _merges(base, name, engine)] for bundle in bundles]
    with ExitStack() as stack:
        merged = None
        if any(merges):
            adapters_only = [bundle.adapter for bundle in bundles]
            merged = stack.enter_context((cache or MergedCache(base)).merged(adapters_only, merges))
        rest = {
            index: part_of(bundle.adapter, set(bundle.adapter.modules) - set(merges[index]))
            for index, bundle in enumerate(bundles)
        }
        attached = {index: stack.enter_context(attach(base, part)) for index, part in rest.items() if part.modules}
        # After the last adapter and all at once: they wrap the input embedding.
        embeddings = [embedding for bundle in bundles for embedding in bundle.embeddings]
        stack.enter_context(attach_embeddings(base, embeddings))
        yield Composition(base.family, [tag for tag, _ in adapters], merged, attached)


def _merges(base: BaseModel, module: str, engine: ComposedEngine) -> bool:
    layer = base.get_module(module)
    if engine == "attached" or not can_merge(layer):
        return False
    return engine == "merged" or meta_weight(layer).element_size() >= 4


def _check_names(base: BaseModel, tag: AdapterTag, bundle: Bundle) -> None:
    if tag.blocks is not None and not fits_family(tag.blocks, base.family):
        raise SettingsError(
            f"the block weights of {tag.name!r} are not for a base of the family {base.family!r}",
            allowed=describe_lists(),
        )
    modules = bundle.adapter.modules
    for name, _ in tag.layers:
        if not any(fits_layer(name, module) for module in modules):
            raise SettingsError(
                f"the layer weight {name!r} fits no layer of {tag.name!r}",
                allowed=f"such as {near_names(name, modules)}, the beginning of a name, or a glob such as *.attn2.*",
            )
