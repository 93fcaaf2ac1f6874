"""ComfyUI's format: kohya's for Stable Diffusion and SDXL, because ComfyUI does not read PEFT's attention names.

Files it writes are therefore detected as kohya's. It also reads the dotted original names that ComfyUI calls generic
(`diffusion_model.input_blocks...`), those of the Open Model Initiative (`unet.input_blocks...`, `clip_l...`), and
OneTrainer's without a prefix (`input_blocks...`, `joint_blocks...`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lora_engine.adapters import Adapter, DoraDelta
from lora_engine.catalog import formats as catalog
from lora_engine.errors import AdapterError
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Names
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.ldm_names import ORIGINAL_BEGINNINGS
from lora_engine.formats.naming import DOTTED, FLAT, STARTS, resolve_names
from lora_engine.formats.transformers.names import BARE, BARE_ORIGINAL, COMFYUI_EXPORT_NAMING, is_transformer
from lora_engine.formats.validate import RESHAPE
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_BARE = tuple(f"{beginning}." for beginning in ORIGINAL_BEGINNINGS)
_PREFIXES = (*(f"{prefix}." for prefixes in DOTTED.prefixes.values() for prefix in prefixes if prefix), *_BARE)
_BARE_TRANSFORMER = re.compile(rf"({'|'.join(map(re.escape, BARE_ORIGINAL))})\d+\.")
# The layer that reads FLUX.1's packed latents, and how many channels they have.
_WIDENED, _LATENTS = "diffusion_model.img_in", 64
_TEXT_LAYER = re.compile(r"\.(self_attn|mlp)\.|^text_encoder_2\.text_projection$")
# Only these names identify the format; the others also occur in diffusers' format and our own.
_DISTINCTIVE = re.compile(
    r"(text_encoders\.clip_\w\.transformer|clip_[lg]|lora_unet|lora_te[12]?)\..*"
    rf"|(\w+\.)*?({'|'.join(ORIGINAL_BEGINNINGS)})\..*"
    r"|(model\.)?diffusion_model\.(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\..*"
)


class ComfyuiCodec(KohyaCodec):
    """`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`."""

    format = catalog.COMFYUI
    # ComfyUI does not read (IA)3. For OFT and BOFT it applies the strength twice and ignores the constraint.
    key_layout = KohyaCodec.key_layout.limited("ComfyUI", catalog.COMFYUI.kinds)
    transformers = COMFYUI_EXPORT_NAMING

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if the names are dotted, and some occur in no other format."""
        is_dotted = all(key.startswith(_PREFIXES) for key in keys)
        if any(_BARE_TRANSFORMER.match(key) and not key.startswith(BARE) for key in keys):
            return True
        if all(key.startswith(("diffusion_model.", "text_encoders.")) for key in keys) and is_transformer(keys):
            return True
        return is_dotted and any(_DISTINCTIVE.fullmatch(key) for key in keys)

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns canonical names, looked up among the base's modules, flattened or dotted."""
        naming = FLAT if all(name.startswith(STARTS) for name in raw) else DOTTED
        return resolve_names(raw, metadata, known, naming)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata.

        Raises:
            AdapterError: As other codecs; for a DoRA with output magnitudes, where ComfyUI divides by the norm of the
                base's weight, not of the changed one (`weight_decompose`); for text encoder layers that are not in its
                `LORA_CLIP_MAP`.
        """
        for name, delta in adapter.modules.items():
            if name.startswith("text_encoder") and not (
                _TEXT_LAYER.search(name) or COMFYUI_EXPORT_NAMING.applies_to(adapter)
            ):
                raise AdapterError(
                    "ComfyUI does not read adapters of this text encoder layer",
                    where=name,
                    allowed="layers of attention and feed-forward (self_attn, mlp), and SDXL's second text_projection",
                    remedy="leave the module out, or choose another format",
                )
            if isinstance(delta, DoraDelta) and delta.axis == 0:
                raise AdapterError(
                    "the magnitude is per output, where ComfyUI divides by the norm of the base's weight",
                    where=name,
                    allowed=f"a magnitude per input, [1, in]; this one has {list(delta.magnitude.shape)}",
                    remedy="train with axis: input, or approximate it by a LoRA (--approximate)",
                )
        tensors, metadata = super().encode(adapter, card, names)
        return {**tensors, **_paddings(tensors)}, metadata


def _paddings(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the shapes to which ComfyUI pads weights: control adapters widen the input of the plain FLUX.1.

    Without them, ComfyUI cannot apply such an adapter to the model that it was made for.
    """
    up, down = (tensors.get(f"{_WIDENED}.lora_{side}.weight") for side in ("up", "down"))
    if up is None or down is None or down[0].numel() <= _LATENTS:
        return {}
    return {f"{_WIDENED}.{RESHAPE}": torch.tensor([up.shape[0], down[0].numel()])}
