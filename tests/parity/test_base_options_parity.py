"""`clip_skip`, another autoencoder and the noise schedule against diffusers' pipelines and sd-scripts' formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import BaseOptions
from lora_engine.bases.vae import resolve_vae
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.inference.generate import draw_noise, generate
from lora_engine.training.objective import noisy_and_target
from tests.parity.test_training_step_parity import batch_for
from tests.support.untrained import write_untrained_base

SIZE = (16, 24)
TEXTS = ["a red star", "sks"]
SHAPES = ["small-sd", "small-sd-v", "small-sdxl", "small-flux"]
OWN_LAYER = {"small-sd": 1, "small-sdxl": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in SHAPES}


def pipeline_of(folder: Path) -> Any:
    extra = {} if "xl" in folder.name else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = DiffusionPipeline.from_pretrained(str(folder), **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(base: BaseModel, pipeline: Any, guidance: float = 4.0, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the images of a base and of a pipeline."""
    noise = torch.stack([draw_noise(base.latent_shape(SIZE), seed) for seed in (1, 2)])
    ours = generate(base, TEXTS, seeds=[1, 2], steps=3, guidance=guidance, height=SIZE[0], width=SIZE[1])
    sizes: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 3, "guidance_scale": guidance}
    with torch.no_grad():
        theirs = pipeline(TEXTS, **sizes, latents=noise * 1.0, output_type="pt", **options).images
    return ours / 2 + 0.5, theirs


@pytest.mark.parametrize(
    ("shape", "skipped"), [("small-sd", 0), ("small-sd", 1), ("small-sdxl", 0), ("small-sdxl", -1)]
)
def test_images_with_clip_skip_are_those_of_the_pipeline(folders: dict[str, Path], shape: str, skipped: int) -> None:
    # diffusers counts the layers that are skipped before the base's own one.
    layer = OWN_LAYER[shape] + skipped
    base, pipeline = load_base(folders[shape], options=BaseOptions(clip_skip=layer)), pipeline_of(folders[shape])
    pipeline.scheduler = base.scheduler()
    # diffusers 0.42 looks for an attribute that the model does not have in transformers 5.
    vars(pipeline.text_encoder)["text_model"] = pipeline.text_encoder
    # Without guidance: for negative prompts, diffusers ignores clip_skip with SD 1, unlike sd-scripts and A1111.
    ours, theirs = images(base, pipeline, 1.0, clip_skip=skipped)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    plain = load_base(folders[shape]).encode_text(TEXTS)["states"]
    assert torch.equal(base.encode_text(TEXTS)["states"], plain) == (skipped == 0)


def test_clip_skip_is_the_layer_that_sd_scripts_takes(folders: dict[str, Path]) -> None:
    base: Any = load_base(folders["small-sd"], options=BaseOptions(clip_skip=2))
    ids = base._tokens(TEXTS, "", base.tokenizer)["input_ids"]
    encoder = base.modules["text_encoder"]
    # get_hidden_states of sd-scripts' train_util.py
    output = encoder(ids, output_hidden_states=True, return_dict=True)
    expected = getattr(encoder, "text_model", encoder).final_layer_norm(output["hidden_states"][-2])
    assert torch.equal(base.encode_text(TEXTS)["states"], expected)


def fixed_alphas(alphas_cumprod: Tensor) -> Tensor:
    # fix_noise_scheduler_betas_for_zero_terminal_snr of sd-scripts' custom_train_functions.py
    roots = alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


@pytest.mark.parametrize("shape", ["small-sd", "small-sdxl", "small-sd-v"])
def test_the_rescaled_schedule_is_that_of_sd_scripts(folders: dict[str, Path], shape: str) -> None:
    options = BaseOptions(prediction="v_prediction", zero_terminal_snr=True)
    base, plain = load_base(folders[shape], options=options), load_base(folders[shape])
    torch.testing.assert_close(
        base.noise.alphas_cumprod, fixed_alphas(plain.noise.alphas_cumprod), rtol=1e-4, atol=1e-6
    )
    assert base.noise.alphas_cumprod[-1] == 0 < plain.noise.alphas_cumprod[-1]
    config = DDPMScheduler.load_config(str(folders[shape]), subfolder="scheduler")
    config |= {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = DDPMScheduler.from_config(config)
    batch = batch_for(base, torch.tensor([0, 300, 998, 999]), 4)
    noisy, target = noisy_and_target(base.noise, batch)
    torch.testing.assert_close(noisy, scheduler.add_noise(batch.latents, batch.noise, batch.timesteps))
    torch.testing.assert_close(target, scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps))
    assert torch.equal(noisy[-1], batch.noise[-1])


def test_images_of_the_rescaled_schedule_are_those_of_the_pipeline(folders: dict[str, Path]) -> None:
    from diffusers import DPMSolverMultistepScheduler

    options = BaseOptions(prediction="v_prediction", zero_terminal_snr=True)
    base, pipeline = load_base(folders["small-sd"], options=options), pipeline_of(folders["small-sd"])
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **changes)
    ours, theirs = images(base, pipeline)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert int(base.scheduler(3).timesteps[0]) == 999
    plain = load_base(folders["small-sd"])
    assert not torch.allclose(images(plain, pipeline)[0], ours, atol=1e-3)


def test_images_with_another_autoencoder_are_those_of_the_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    other = resolve_vae(folders["small-sd-v"])  # the folder of a base: its subfolder `vae`
    pipeline = pipeline_of(folders["small-sd"])
    with torch.no_grad():
        changed = AutoencoderKL.from_pretrained(str(other.folder))
        for value in changed.parameters():
            value.mul_(1.5)
        changed.save_pretrained(tmp_path / "changed")
    base = load_base(folders["small-sd"], options=BaseOptions(vae=resolve_vae(tmp_path / "changed")))
    pipeline.vae, pipeline.scheduler = changed, base.scheduler()
    ours, theirs = images(base, pipeline)
    torch.testing.assert_close(ours, theirs.clamp(0, 1), rtol=0, atol=2e-5)
    pixels = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = changed.encode(pixels).latent_dist.mode() * changed.config.scaling_factor
        assert torch.equal(base.encode_images(pixels), expected)
        assert not torch.equal(load_base(folders["small-sd"]).encode_images(pixels), expected)
    assert resolve_vae(tmp_path / "changed").fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ("small-sd", BaseOptions(clip_skip=99), r"clip_skip is 99, but text_encoder has \d layers"),
        ("small-sd", BaseOptions(zero_terminal_snr=True), "zero_terminal_snr is set, but the base predicts noise"),
        ("small-flux", BaseOptions(clip_skip=2), "clip_skip is set, but the base .* is of family 'flux'"),
        ("small-flux", BaseOptions(prediction="v_prediction"), "prediction is set"),
    ],
)
def test_options_that_do_not_suit_the_base_are_refused(
    folders: dict[str, Path], shape: str, options: BaseOptions, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_base(folders[shape], options=options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 8}, r"another number of latent channels \(8\) than that of the base \(4\)"),
        ({"levels": 3}, r"another number of pixels per latent \(4\) than that of the base \(2\)"),
    ],
)
def test_an_autoencoder_with_other_latents_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, int], message: str
) -> None:
    levels = change.get("levels", 2)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        latent_channels=change.get("latent_channels", 4),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    with pytest.raises(BaseModelError, match=message):
        load_base(folders["small-sd"], options=BaseOptions(vae=resolve_vae(tmp_path / "vae")))


def test_an_unknown_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"unknown autoencoder 'no-such'.*neither a folder nor a hub id"):
        resolve_vae("no-such")
    with pytest.raises(BaseModelError, match="there are no weights"):
        resolve_vae(tmp_path)
