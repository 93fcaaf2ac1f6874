"""Z-Image at tiny random weights: files of every program, training, generation, against diffusers' pipeline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli import app
from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import AdapterError
from lora_engine.formats import inspect, read_adapter, write_adapter
from lora_engine.inference.composed_images import generate_composed
from lora_engine.inference.composition import compose
from lora_engine.inference.generate import draw_noise, generate
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.source_image import SourceImage
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.denoising import predict
from lora_engine.training.losses import DenoisingLoss
from lora_engine.training.objective import measure_for
from lora_engine.training.run import ADAPTER, train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.objective import Objective
from registry.home import Home

SIZE = (32, 48)
TEXTS = ["a red star", "sks"]  # of different lengths: the network reads no padding
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a Z-Image with two layers and random weights."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ZImageTransformer2DModel(
            dim=64,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=4,
            n_kv_heads=4,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 16, 16],
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            sample_size=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text = Qwen3Model(
            Qwen3Config(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
            )
        )
        for name, parameter in transformer.named_parameters():
            if name.endswith("pad_token"):  # zeros otherwise, and padding must not matter by accident
                torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("base") / "z-image"
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    ZImagePipeline(scheduler, vae, text, byte_tokenizer(), transformer).save_pretrained(path, safe_serialization=True)
    return path


def byte_tokenizer() -> Any:
    """Returns a tokenizer of single bytes, with Qwen's special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], additional_special_tokens=list(SPECIAL[1:])
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(str(folder))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn_by_diffusers(pipeline: Any, base: BaseModel, guidance: float) -> Any:
    noise = torch.stack([draw_noise(base.latent_shape(SIZE), seed) for seed in (1, 2)])
    return pipeline(
        list(TEXTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
    ).images


def drawn_by_us(base: BaseModel, guidance: float) -> torch.Tensor:
    settings: dict[str, Any] = {"steps": 3, "guidance": guidance, "height": SIZE[0], "width": SIZE[1]}
    return generate(base, TEXTS, seeds=[1, 2], **settings) / 2 + 0.5


def moved(base: BaseModel, targets: Any = "attention", rank: int = 2) -> Adapter:
    draw = torch.Generator().manual_seed(5)
    fresh = create_adapter(base, targets, "lora", rank, generator=draw)
    factors = {
        name: {key: value + 0.3 * torch.randn(value.shape, generator=draw) for key, value in delta.factors().items()}
        for name, delta in fresh.modules.items()
    }
    return Adapter({name: delta.with_factors(factors[name]) for name, delta in fresh.modules.items()}, fresh.base)


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@torch.no_grad()
def test_an_image_equals_that_of_the_pipeline(base: BaseModel, pipeline: Any, guidance: float) -> None:
    """The pipeline's guidance scale is added to the conditional prediction, ours to the unconditional one."""
    expected = drawn_by_diffusers(pipeline, base, guidance)
    torch.testing.assert_close(drawn_by_us(base, guidance + 1.0), expected, rtol=0, atol=2e-5)
    assert (drawn_by_us(base, guidance + 2.0) - expected).abs().max() > 1e-4


@torch.no_grad()
def test_an_image_from_an_image_equals_that_of_the_pipeline(base: BaseModel, folder: Path) -> None:
    from diffusers import ZImageImg2ImgPipeline

    pipeline = ZImageImg2ImgPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    # It scales latents of 16 channels as if they were pixels, and samples those of an image; ours are the mode.
    pipeline.image_processor.preprocess = lambda image, **_: image
    source = SourceImage(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1, 0.75)
    expected = pipeline(
        ["a red star"] * 2,
        image=base.encode_images(source.pixels[None]).expand(2, -1, -1, -1),
        strength=source.strength,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt",
    ).images
    settings: dict[str, Any] = {"seeds": [1, 2], "steps": 4, "guidance": 3.0, "height": SIZE[0], "width": SIZE[1]}
    prompt, negative = parse_prompt("a red star"), parse_prompt("", is_negative=True)
    with compose(base, []) as composition:
        actual = generate_composed(base, prompt, composition, negative=negative, source=source, **settings)
        plain = generate_composed(base, prompt, composition, negative=negative, **settings)
    torch.testing.assert_close(actual / 2 + 0.5, expected, rtol=0, atol=1e-4)
    assert (actual - plain).abs().max() > 0.01


def test_a_training_step_equals_one_written_with_the_pipelines_network(base: BaseModel, pipeline: Any) -> None:
    draw = generator(0, "parity")
    latents, noise = (torch.randn(2, *base.latent_shape(SIZE), generator=draw) for _ in range(2))
    timesteps = torch.tensor([3.5, 700.25])
    with torch.no_grad():
        conditioning = base.encode_text(TEXTS)
        texts, _ = pipeline.encode_prompt(list(TEXTS), "cpu", do_classifier_free_guidance=False)
    batch = Batch(latents, noise, timesteps, conditioning, 2)
    adapter = moved(base)
    with attach(base, adapter, trainable=True) as attachment:
        sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        output = base.modules["transformer"](list(noisy.unsqueeze(2)), 1 - timesteps / 1000, texts, return_dict=False)
        reference = ((-torch.stack(output[0]).squeeze(2) - (noise - latents)) ** 2).mean()
        ours = DenoisingLoss(measure_for(Objective(), base.noise))(*predict(base, batch), batch).sum()
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss, attachment.parameters()) for loss in (ours, reference)]
    assert max(gradient.abs().max() for gradient in gradients[1]) > 1e-4
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_states_of_a_prompt_do_not_depend_on_the_others(base: BaseModel) -> None:
    both, alone = base.encode_text(TEXTS), base.encode_text(TEXTS[1:])
    lengths = both["lengths"].tolist()
    assert lengths[0] > lengths[1] == alone["lengths"].item()
    torch.testing.assert_close(both["states"][1], alone["states"][0])
    assert not both["states"][1, lengths[1] :].any()


def test_a_trained_adapter_is_read_and_changes_images(folder: Path, base: BaseModel, tmp_path: Path) -> None:
    tiles = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    digest = hashlib.sha256(b"0").hexdigest()
    name = f"pictures/{digest[:16]}.png"
    write_png(tmp_path / "data" / name, tiles.repeat_interleave(8, 1).repeat_interleave(8, 2))
    entry: dict[str, Any] = {"width": 32, "height": 32, "caption": "a sks star", "source": "0.png"}
    image = ImageEntry(sha256=digest, file=name, split="train", **entry)
    Manifest(pictures=(image,), trigger="sks", class_word="star").save(tmp_path / "data")
    settings = TrainSettings.model_validate(
        {"method": "finetune", "rank": 2, "steps": 2, "batch": 1, "seed": 7, "learning_rate": 1e-2}
    )
    train(settings, str(folder), tmp_path / "data", tmp_path / "out", tmp_path / "work")
    adapter, card = read_adapter(tmp_path / "out" / ADAPTER)
    assert (adapter.base, card.base) == ("z_image", "z-image")
    assert set(adapter.modules) == {
        f"transformer.layers.{layer}.attention.{part}"
        for layer in range(2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    plain = drawn_by_us(base, 1.0)
    with attach(base, adapter):
        assert not torch.equal(drawn_by_us(base, 1.0), plain)
    assert torch.equal(drawn_by_us(base, 1.0), plain)


@torch.no_grad()
def test_diffusers_draws_the_same_image_with_our_file(base: BaseModel, pipeline: Any, tmp_path: Path) -> None:
    adapter = moved(base, "attention+ff")
    write_adapter(tmp_path / "adapter", adapter, format="diffusers")
    plain = drawn_by_diffusers(pipeline, base, 0.0)
    pipeline.load_lora_weights(tmp_path / "adapter")
    try:
        reference = drawn_by_diffusers(pipeline, base, 0.0)
    finally:
        pipeline.unload_lora_weights()
    with attach(base, adapter):
        actual = drawn_by_us(base, 1.0)
    assert (actual - plain).abs().max() > 1e-3
    torch.testing.assert_close(actual, reference, rtol=0, atol=5e-5)


@pytest.mark.parametrize("form", ["aitoolkit", "kohya"])  # diffusers does not split the fused layers of ComfyUI's
def test_diffusers_reads_the_same_layers_in_our_files(base: BaseModel, form: str, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline

    adapter = moved(base, "attention+ff")
    write_adapter(tmp_path / "a.safetensors", adapter, format=form)
    theirs = ZImagePipeline.lora_state_dict(str(tmp_path / "a.safetensors"))
    assert len(theirs) == 2 * len(adapter.modules)
    for name, delta in adapter.modules.items():
        down, up = (theirs[f"{name}.lora_{factor}.weight"] for factor in "AB")
        weight = torch.zeros(up.shape[0], down.shape[1])
        torch.testing.assert_close(up @ down, delta.delta_weight(weight), rtol=1e-4, atol=1e-5)


W = 3840
SPLIT = [f"attention.to_{part}" for part in "qkv"]
SPELLINGS = {
    "kohya": (
        "kohya",
        {f"lora_unet_layers_3_{name.replace('.', '_')}": (W, W) for name in SPLIT},
        ("lora_down.weight", "lora_up.weight"),
    ),
    "ai-toolkit": (
        "aitoolkit",
        {f"diffusion_model.layers.3.{name}": (W, W) for name in SPLIT},
        ("lora_A.weight", "lora_B.weight"),
    ),
    "OneTrainer": (
        "loraline",
        {f"transformer.layers.3.{name}": (W, W) for name in SPLIT},
        ("lora_down.weight", "lora_up.weight"),
    ),
    "diffusers": (
        "diffusers",
        {f"transformer.layers.3.{name}": (W, W) for name in SPLIT},
        ("lora_A.weight", "lora_B.weight"),
    ),
    "DiffSynth": (
        "diffusers",
        {f"layers.3.{name}": (W, W) for name in SPLIT},
        ("lora_A.default.weight", "lora_B.default.weight"),
    ),
    "ComfyUI": (
        "comfyui",
        {"diffusion_model.layers.3.attention.qkv": (3 * W, W)},
        ("lora_down.weight", "lora_up.weight"),
    ),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_the_files_of_every_program_are_read_without_a_base(program: str, tmp_path: Path) -> None:
    form, modules, (down, up) = SPELLINGS[program]
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, (rows, columns) in modules.items():
        tensors |= {
            f"{name}.{down}": torch.randn(1, columns, generator=draw),
            f"{name}.{up}": torch.randn(rows, 1, generator=draw),
        }
    save_file(tensors, tmp_path / "file.safetensors")
    assert (inspect(tmp_path / "file.safetensors")["format"], inspect(tmp_path / "file.safetensors")["family"]) == (
        form,
        "z_image",
    )
    adapter, _ = read_adapter(tmp_path / "file.safetensors")
    assert (adapter.base, set(adapter.modules)) == ("z_image", {f"transformer.layers.3.{name}" for name in SPLIT})


def test_fused_and_split_names_of_one_layer_are_refused(tmp_path: Path) -> None:
    """A fault of real files: one of the two would be ignored."""
    tensors = {
        f"diffusion_model.layers.0.attention.{name}.lora_{factor}.weight": torch.ones(shape)
        for name, rows in (("qkv", 3 * W), ("to_q", W))
        for factor, shape in (("A", (1, W)), ("B", (rows, 1)))
    }
    save_file(tensors, tmp_path / "both.safetensors")
    with pytest.raises(AdapterError, match="in the file twice"):
        read_adapter(tmp_path / "both.safetensors")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_the_verbs_convert_and_import_a_file(folder: Path, base: BaseModel, home: Path, tmp_path: Path) -> None:
    adapter = moved(base)
    write_adapter(tmp_path / "own.safetensors", adapter)
    run("convert", tmp_path / "own.safetensors", "--to", "comfyui", "-o", tmp_path / "comfy.safetensors")
    tensors = load_file(tmp_path / "comfy.safetensors")
    assert tensors["diffusion_model.layers.0.attention.qkv.lora_up.weight"].shape[0] == 3 * 64
    save_file(tensors, tmp_path / "foreign.safetensors")  # without our header
    Home.open(home)
    imported = run_json(
        "import", tmp_path / "foreign.safetensors", "--name", "star", "--base", folder, "--license", "Apache-2.0"
    )
    assert (imported["name"], imported["version"]) == ("star", 1)
    again = run_json(
        "convert", tmp_path / "foreign.safetensors", "--to", "kohya", "--base", folder, "-o", tmp_path / "k"
    )
    back, _ = read_adapter(again["files"][0]["file"])
    assert (back.base, list(back.modules)) == ("z_image", list(adapter.modules))
    weight = torch.zeros(64, 64)
    for name, delta in adapter.modules.items():
        torch.testing.assert_close(back.modules[name].delta_weight(weight), delta.delta_weight(weight))
