"""The formats of programs that write kohya's names with a difference: a row each.

Files of these formats are read as kohya's, which they are but for the wrapper's prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from lora_engine.formats.codec import codecs
from lora_engine.formats.key_layout import DIFFUSERS, LYCORIS
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.naming import STARTS
from lora_engine.formats.transformers.names import (
    AITOOLKIT_DIT,
    LYCORIS_DIT,
    ONETRAINER_DIT,
    is_aitoolkit,
    is_initiative,
)


class LycorisCodec(KohyaCodec):
    """LyCORIS' own loaders: diffusers' names for every family, as they are taken from the model that is loaded.

    The files of its wrapper (`lycoris_down_blocks_...`, which SimpleTuner writes too) are read.
    """

    name: ClassVar[str] = "lycoris"
    transformers = LYCORIS_DIT
    starts = (*STARTS, "lycoris_")
    original = ()


class OnetrainerCodec(KohyaCodec):
    """OneTrainer: diffusers' names for every family; its embeddings lie in the same file.

    Read are also its files in the names of the Open Model Initiative (`transformer.double_blocks.0.img_attn.qkv.0`),
    which have the parts of fused layers one by one.
    """

    name: ClassVar[str] = "onetrainer"
    style = LYCORIS.limited("OneTrainer", ("lora", "loha", "lokr", "dora"), (DIFFUSERS,))
    transformers = ONETRAINER_DIT
    original = ()
    starts = (*STARTS, "lora_transformer_")
    embeddings = "clip"

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether all names begin as OneTrainer's flattened ones do, or are the initiative's."""
        return super().detect(keys, metadata) or is_initiative(keys)


class AitoolkitCodec(KohyaCodec):
    """ai-toolkit: kohya's names, and LoRA or LoKr alone."""

    name: ClassVar[str] = "aitoolkit"
    style = LYCORIS.limited("ai-toolkit", ("lora", "lokr"), (DIFFUSERS,))
    transformers = AITOOLKIT_DIT
    starts = ()

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether the names are those of ai-toolkit's transformers; its other files are kohya's."""
        return is_aitoolkit(keys)


for _codec in (LycorisCodec(), OnetrainerCodec(), AitoolkitCodec()):
    codecs.add(_codec.name, _codec)
