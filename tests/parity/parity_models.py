"""Tiny random models of the real classes, and their outputs with our adapters attached."""

from functools import cache

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from law_adapters import random_delta
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_engine.adapters import Adapter, DictTree, attach, module_shapes, select_modules


def make_tokenizer():
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=16)


def make_pipeline():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = make_unet()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in (unet, text, vae):
        part.eval().requires_grad_(False)
    return pipeline


def make_unet():
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@cache
def plain_pipeline():
    """Returns a shared pipeline for attaching only; no test loads a file into it."""
    return make_pipeline()


def tree_of(pipeline):
    return DictTree({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, "sd")


@cache
def pipeline_shapes():
    return module_shapes(tree_of(make_pipeline()))


def adapter_for(kind="lora", ranks=(2,), alphas=(1.0,), targets=("all", "text")):
    """Returns a random adapter for the pipeline with alternating ranks and alphas."""
    shapes = pipeline_shapes()
    modules = {
        name: random_delta(kind, shapes[name], ranks[place % len(ranks)], alphas[place % len(alphas)], place)
        for place, name in enumerate(select_modules(shapes, list(targets)))
    }
    return Adapter(modules, "sd")


@torch.no_grad()
def predict(pipeline):
    """Returns the combined output of the two adapted networks."""
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    states = pipeline.text_encoder(torch.tensor([[52, 3, 1, 53]])).last_hidden_state
    return pipeline.unet(noisy, torch.tensor([500]), states).sample


def ours(adapter, compute=predict):
    """Returns the output of the pipeline with the adapter attached."""
    with attach(tree_of(plain_pipeline()), adapter):
        return compute(plain_pipeline())
