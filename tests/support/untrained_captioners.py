"""Writes image captioners of every family with random weights, in the real classes of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_engine.bases.components import without_bars

SPECIAL = (
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
)
QWEN = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": 32, "patch_size": 8}


def _tokenizer(special: tuple[str, ...] = SPECIAL, **names: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(unk_token=None))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 6,
        special_tokens=[*special],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    words.train_from_iterator(["a photo of a red star on the green grass"], trainer)
    common = {"bos_token": special[0], "pad_token": special[1], "eos_token": special[2]}
    return PreTrainedTokenizerFast(tokenizer_object=words, **(common | names))


def _ids(tokenizer: Any, **other: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer), **ids, **other}


def _processor(name: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Pil")(**settings)


def _size(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _blip() -> tuple[Any, ...]:
    from tokenizers.processors import TemplateProcessing
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    tokenizer = _tokenizer()
    # As BERT's: the model drops the last token of a prompt.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    text = {**_TEXT, **_ids(tokenizer), "encoder_hidden_size": 32, "projection_dim": 32}
    vision = {**_VISION, "initializer_range": 0.02}  # the default of 1e-10 leaves images without effect
    config = BlipConfig(text_config={**text, "sep_token_id": 2}, vision_config=vision, projection_dim=32)
    return BlipForConditionalGeneration(config), BlipProcessor(_processor("BlipImageProcessor", **_size(32)), tokenizer)


def _blip2() -> tuple[Any, ...]:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    tokenizer = _tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Blip2Config(
        vision_config=_VISION,
        qformer_config={**_TEXT, "vocab_size": 40, "encoder_hidden_size": 32},
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "opt",
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
        },
        num_query_tokens=4,
        image_token_index=image,
    )
    processor = Blip2Processor(_processor("BlipImageProcessor", **_size(32)), tokenizer, num_query_tokens=4)
    return Blip2ForConditionalGeneration(config), processor


def _florence2() -> tuple[Any, ...]:
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    tokenizer = _tokenizer(extra_special_tokens={"image_token": "<image>"})
    four = [2, 2, 2, 2]
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16] * 4,
        "num_heads": four,
        "num_groups": four,
        "window_size": 4,
        "projection_dim": 32,
        "image_size": 64,
    }
    text = {
        **_ids(tokenizer),
        "model_type": "bart",
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 256,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    images = _processor("CLIPImageProcessor", **_size(64), crop_size={"height": 64, "width": 64})
    images.image_seq_length = 5
    return Florence2ForConditionalGeneration(config), Florence2Processor(images, tokenizer)


def _llava() -> tuple[Any, ...]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = _tokenizer(extra_special_tokens={"image_token": "<image>"})
    config = LlavaConfig(
        vision_config={**_VISION, "model_type": "siglip_vision_model"},
        text_config={**_TEXT, **_ids(tokenizer), "model_type": "llama", "num_key_value_heads": 2},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        image_seq_length=16,
    )
    images = _processor("SiglipImageProcessor", **_size(32))
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return LlavaForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, ...]:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

    tokenizer = _tokenizer()
    images = _processor("SiglipImageProcessor", **_size(32))
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    text = {**_TEXT, **_ids(tokenizer), "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 16}
    config = PaliGemmaConfig(
        vision_config={**_VISION, "vision_use_head": False, "projection_dim": 32},
        text_config={**text, "model_type": "gemma", "vocab_size": len(tokenizer) + 8},
        image_token_index=processor.image_token_id,
        projection_dim=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def _qwen(version: int) -> tuple[Any, ...]:
    import transformers

    names = {"bos_token": "<|im_start|>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = _tokenizer(QWEN, **names)
    id_of = tokenizer.convert_tokens_to_ids
    text = {
        **_TEXT,
        **_ids(tokenizer),
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    if version == 2:
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        vision |= {"depth": 3, "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
        text["rope_parameters"]["mrope_interleaved"] = True
    prefix = "Qwen2_5_VL" if version == 2 else "Qwen3VL"
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )
    images = _processor(
        "Qwen2VLImageProcessor",
        patch_size=vision["patch_size"],
        size={"shortest_edge": 28**2, "longest_edge": 112**2},
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), images, tokenizer


def _idefics3() -> tuple[Any, ...]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor

    tokenizer = _tokenizer()
    images = _processor(
        "Idefics3ImageProcessor",
        do_image_splitting=False,
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 32},
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return Idefics3ForConditionalGeneration(_smol_config(Idefics3Config, tokenizer)), processor


def _smolvlm() -> tuple[Any, ...]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    tokenizer = _tokenizer()
    images = _processor(
        "SmolVLMImageProcessor",
        do_image_splitting=False,
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 32},
    )
    return SmolVLMForConditionalGeneration(_smol_config(SmolVLMConfig, tokenizer)), images, tokenizer


def _smol_config(cls: Any, tokenizer: Any) -> Any:
    text = {**_TEXT, **_ids(tokenizer), "model_type": "llama", "num_key_value_heads": 2}
    image = tokenizer.convert_tokens_to_ids("<image>")
    return cls(vision_config=_VISION, text_config=text, scale_factor=2, image_token_id=image, pad_token_id=1)


BUILDERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "blip": _blip,
    "blip-2": _blip2,
    "florence2": _florence2,
    "llava": _llava,
    "paligemma": _paligemma,
    "qwen2_5_vl": lambda: _qwen(2),
    "qwen3_vl": lambda: _qwen(3),
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
}
"""Model type to a function that returns the model, and its processor or image processor and tokenizer."""


def write_captioner(folder: Path, family: str, seed: int | None = None, scale: float | None = None) -> Path:
    """Saves a captioner as its publishers do.

    Args:
        folder: The new folder.
        family: A key of `BUILDERS`.
        seed: Seed of the weights; None is one with which different images get different captions.
        scale: Factor of the matrices: with the initial ones, images hardly count. None is that of the family.
    """
    known = _DRAWS[family]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(known[0] if seed is None else seed)
        parts = BUILDERS[family]()
        for weight in parts[0].parameters():
            if weight.dim() > 1:
                weight.mul_(known[1] if scale is None else scale)
    with without_bars():
        for part in parts:
            part.save_pretrained(folder)
    return folder


def write_judge(folder: Path) -> Path:
    """Saves a chat model whose head knows nothing but the answers of a judge's questions: digits 1 to 5, A and B.

    Their rows have opposite signs in pairs, so that one digit is always likely; letters are less likely than digits.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    write_captioner(folder, "idefics3")
    tokenizer, tensors = AutoTokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    known = torch.zeros_like(head)
    for pair, scale in (("12", 100.0), ("34", 100.0), ("5", 100.0), ("AB", 20.0)):
        ids = tokenizer.convert_tokens_to_ids(list(pair))
        known[ids[0]] = scale * head[ids[0]]
        known[ids[1:]] = -known[ids[0]]
    save_file({**tensors, "lm_head.weight": known}, folder / "model.safetensors", {"format": "pt"})
    return folder


_DRAWS: dict[str, tuple[int, float]] = dict.fromkeys(BUILDERS, (0, 1.0)) | {
    "blip": (0, 4.0),
    "florence2": (0, 10.0),
    "paligemma": (4, 10.0),
    "qwen3_vl": (6, 1.0),
    "idefics3": (7, 1.0),
    "smolvlm": (6, 1.0),
}
"""Seed and scale of the weights by family."""
