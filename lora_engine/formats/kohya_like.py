"""Formats that differ from kohya's in a few names; all are read by kohya's code."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_engine.catalog import formats as catalog
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, KeyLayout
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.naming import STARTS
from lora_engine.formats.transformers.names import (
    AITOOLKIT_EXPORT_NAMING,
    LYCORIS_EXPORT_NAMING,
    ONETRAINER_EXPORT_NAMING,
    is_aitoolkit,
    is_initiative,
)


class LycorisCodec(KohyaCodec):
    """LyCORIS' own loaders: diffusers' names for every family, as in the loaded model.

    Also reads the files of its wrapper (`lycoris_down_blocks_...`), which SimpleTuner writes too.
    """

    format = catalog.LYCORIS
    key_layout = KeyLayout("LyCORIS", writes_alpha=True, extends=LYCORIS_KEYS, also=(DIFFUSERS_KEYS,))
    transformers = LYCORIS_EXPORT_NAMING
    starts = (*STARTS, "lycoris_")
    original = ()


class OnetrainerCodec(KohyaCodec):
    """OneTrainer: diffusers' names for every family, with embeddings in the same file.

    Also reads its files with names of the Open Model Initiative (`transformer.double_blocks.0.img_attn.qkv.0`), which
    store the parts of fused layers separately.
    """

    format = catalog.ONETRAINER
    key_layout = LYCORIS_KEYS.limited("OneTrainer", catalog.ONETRAINER.kinds, (DIFFUSERS_KEYS,))
    transformers = ONETRAINER_EXPORT_NAMING
    original = ()
    starts = (*STARTS, "lora_transformer_")
    embeddings = "clip"

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names have OneTrainer's flattened prefixes, or are the initiative's."""
        return super().detect(keys, metadata) or is_initiative(keys)


class AitoolkitCodec(KohyaCodec):
    """ai-toolkit: kohya's names; only LoRA and LoKr."""

    format = catalog.AITOOLKIT
    key_layout = LYCORIS_KEYS.limited("ai-toolkit", catalog.AITOOLKIT.kinds, (DIFFUSERS_KEYS,))
    transformers = AITOOLKIT_EXPORT_NAMING
    starts = ()

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True for ai-toolkit's names of transformer modules; its other files are kohya's."""
        return is_aitoolkit(keys)
