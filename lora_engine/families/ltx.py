"""LTX-Video and LTX-2 (Lightricks), which are only recognized."""

from __future__ import annotations

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import NameTable, same_blocks

_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
_VIDEO = {
    **{f"{name}.{part}": "w w" for name in ("attn1", "attn2") for part in _PARTS},
    "ff.net.0.proj": "4w w",
    "ff.net.2": "w 4w",
}
_AUDIO = {
    **{f"{name}.{part}": "a a" for name in ("audio_attn1", "audio_attn2") for part in _PARTS},
    "audio_ff.net.0.proj": "4a a",
    "audio_ff.net.2": "a 4a",
    "audio_to_video_attn.to_q": "a w",
    "audio_to_video_attn.to_k": "a a",
    "audio_to_video_attn.to_v": "a a",
    "audio_to_video_attn.to_out.0": "w a",
    "video_to_audio_attn.to_q": "a a",
    "video_to_audio_attn.to_k": "a w",
    "video_to_audio_attn.to_v": "a w",
    "video_to_audio_attn.to_out.0": "a a",
}


LTX_VIDEO = Family(
    name="ltx_video",
    title="LTX-Video",
    names=NameTable((same_blocks(_VIDEO),), {"patchify_proj": "proj_in"}, {"proj_in": "w 128"}),
    sizes=(
        Size("LTX-Video 2B", {"transformer_blocks": 28}, {"w": 2048}),
        Size("LTX-Video 13B", {"transformer_blocks": 48}, {"w": 4096}),
    ),
    header=r"ltx_?v(ideo)?.*",
)
LTX2 = Family(
    name="ltx2",
    title="LTX-2",
    names=NameTable(
        (same_blocks({**_VIDEO, **_AUDIO}),),
        {"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in"},
        {"proj_in": "w 128", "audio_proj_in": "a 128"},
    ),
    sizes=(Size("LTX-2", {"transformer_blocks": 48}, {"w": 4096, "a": 2048}),),
    marks=r"av_(ca|cross_attn)_|(video|audio)_embeddings_connector_|connectors_|(audio_)?prompt_adaln_single_",
    header=r"ltx_?2.*",
)
for _family in (LTX_VIDEO, LTX2):
    families.add(_family.name, _family)
