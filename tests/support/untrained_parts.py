"""Builds the parts of untrained bases: autoencoders, text encoders, and tokenizers with generated vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def autoencoder(
    channels: Sequence[int], layers: int, latent_channels: int, *, scaling_factor: float = 0.18215, shift: float = 0.0
) -> Any:
    """Builds an autoencoder; one with a shift has no quant convolutions, as SD3's and FLUX's."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    extra: dict[str, Any] = {}
    if shift:
        extra = {"shift_factor": shift, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 16}
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(channels),
        layers_per_block=layers,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        **extra,
    )


def clip_text_encoder(layers: int, width: int, tokens: int, *, projected: bool) -> Any:
    """Builds a CLIP text encoder for the tokens of `spelling_tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    last = 2 * len(_byte_letters()) + 1
    settings = CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)


def t5_encoder(layers: int, width: int) -> Any:
    """Builds a T5 encoder for the tokens of `letters_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    settings = T5Config(
        vocab_size=len(_pieces()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(settings)


def spelling_tokenizer(tokens: int) -> Any:
    """Builds a CLIP tokenizer that spells every word byte by byte."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)


def letters_tokenizer(tokens: int) -> Any:
    """Builds a T5 tokenizer that spells words letter by letter; only printable ASCII is known."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_pieces(), extra_ids=0, model_max_length=tokens)


def _pieces() -> list[tuple[str, float]]:
    # As in T5's vocabulary: the special tokens first, and the marker of word starts.
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return [*special, *((chr(number), -3.0) for number in range(33, 127))]


def _byte_letters() -> list[str]:
    # GPT-2's printable characters for the 256 bytes, which CLIP's vocabulary uses.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]
