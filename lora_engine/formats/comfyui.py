"""ComfyUI's format: kohya's, for Stable Diffusion and SDXL, as ComfyUI reads none of PEFT's names of attention layers.

Such a file is detected as kohya's, which it is. Read are also the dotted original names that ComfyUI calls generic
(`diffusion_model.input_blocks...`), those of the Open Model Initiative (`unet.input_blocks...`, `clip_l...`), and
OneTrainer's, which have no prefix (`input_blocks...`, `joint_blocks...`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from lora_engine.adapters import Adapter, DoraDelta
from lora_engine.errors import AdapterError
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Names, codecs
from lora_engine.formats.key_layout import LYCORIS
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.ldm_names import ORIGINAL_BEGINNINGS
from lora_engine.formats.naming import DOTTED, FLAT, STARTS, resolve_names
from lora_engine.formats.transformers.names import COMFYUI_DIT, is_dit

_OTHERWISE = ("ia3", "oft", "boft")
_BARE = tuple(f"{beginning}." for beginning in ORIGINAL_BEGINNINGS)
_PREFIXES = (*(f"{prefix}." for prefixes in DOTTED.prefixes.values() for prefix in prefixes if prefix), *_BARE)
_BARE_SD3 = re.compile(r"joint_blocks\.\d+\.")
_TEXT_LAYER = re.compile(r"\.(self_attn|mlp)\.|^text_encoder_2\.text_projection$")
# In these names alone; the others are those of diffusers' format and our own too.
_TELLING = re.compile(
    r"(text_encoders\.clip_\w\.transformer|clip_[lg]|lora_unet|lora_te[12]?)\..*"
    rf"|(\w+\.)*?({'|'.join(ORIGINAL_BEGINNINGS)})\..*"
    r"|(model\.)?diffusion_model\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\..*"
)


class ComfyuiCodec(KohyaCodec):
    """`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`."""

    name: ClassVar[str] = "comfyui"
    # ComfyUI reads no (IA)3; of OFT and BOFT it applies the strength twice and overlooks the constraint.
    style = KohyaCodec.style.limited("ComfyUI", [kind for kind in LYCORIS.spellings if kind not in _OTHERWISE])
    transformers = COMFYUI_DIT

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether the names are dotted, and some are such that other formats have not."""
        is_dotted = all(key.startswith(_PREFIXES) for key in keys)
        if any(_BARE_SD3.match(key) for key in keys):
            return True
        if all(key.startswith(("diffusion_model.", "text_encoders.")) for key in keys) and is_dit(keys):
            return True
        return is_dotted and any(_TELLING.fullmatch(key) for key in keys)

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Canonical names by way of a table of the base's modules, flattened or dotted."""
        naming = FLAT if all(name.startswith(STARTS) for name in raw) else DOTTED
        return resolve_names(raw, metadata, known, naming)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata.

        Raises:
            AdapterError: As others; for a DoRA whose magnitude is that of the outputs, where ComfyUI divides by the
                norm of the base's weight and not of the changed one (`weight_decompose`); and for layers of text
                encoders that it does not look for under kohya's names (`LORA_CLIP_MAP`).
        """
        for name, delta in adapter.modules.items():
            if name.startswith("text_encoder") and not (_TEXT_LAYER.search(name) or COMFYUI_DIT.applies_to(adapter)):
                raise AdapterError(
                    "ComfyUI reads no change of this layer of a text encoder",
                    where=name,
                    allowed="those of its attentions and feed-forwards (self_attn, mlp), SDXL's second text_projection",
                    remedy="leave the module out, or choose another format",
                )
            if isinstance(delta, DoraDelta) and delta.axis == 0:
                raise AdapterError(
                    "the magnitude is that of the outputs, and ComfyUI divides by the norm of the base's weight there",
                    where=name,
                    allowed=f"a magnitude of the inputs, [1, in]; this one has {list(delta.magnitude.shape)}",
                    remedy="train with axis: input, or ask for an approximation, which is a LoRA",
                )
        return super().encode(adapter, card, names)


codecs.add(ComfyuiCodec.name, ComfyuiCodec())
