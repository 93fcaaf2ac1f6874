"""`loraline init --from` on whole files as the programs write them, and what trainers do for flows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.coming_from.write import convert_settings
from flows.spec import load_spec
from tests.flows.commands import loraline_here
from tests.flows.shared import draw_noise
from tests.flows.test_coming_from import ONE_TRAINER, SCRIPT, TOOLKIT, train_of
from tests.support.untrained import write_untrained_base

GUI: dict[str, Any] = {
    "LoRA_type": "Standard",
    "LyCORIS_preset": "full",
    "adaptive_noise_scale": 0.005,
    "block_dims": "",
    "blocks_to_swap": 0,
    "cache_latents": True,
    "caption_extension": ".txt",
    "clip_skip": 1,
    "constrain": 0.0,
    "conv_alpha": 4,
    "conv_dim": 8,
    "dataset_config": "",
    "decompose_both": False,
    "discrete_flow_shift": 3.0,
    "dora_wd": False,
    "down_lr_weight": "",
    "dynamo_backend": "no",
    "epoch": 8,
    "factor": -1,
    "flux1_checkbox": False,
    "guidance_scale": 1,
    "learning_rate": 1e-4,
    "logit_mean": 0,
    "logit_std": 1,
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": "",
    "lr_scheduler_num_cycles": "",
    "lr_warmup": 10,
    "max_grad_norm": 1.0,
    "max_resolution": "32,32",
    "max_train_epochs": 0,
    "max_train_steps": 40,
    "mode_scale": 1.29,
    "mixed_precision": "no",
    "model_list": "custom",
    "module_dropout": 0,
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": 6,
    "network_alpha": 2,
    "network_dim": 4,
    "noise_offset": 0.05,
    "noise_offset_type": "Original",
    "num_cpu_threads_per_process": 2,
    "optimizer": "AdamW",
    "optimizer_args": '"weight_decay=0.1" "betas=0.9,0.99"',
    "output_name": "gui",
    "pretrained_model_name_or_path": "tiny",
    "rank_dropout": 0,
    "reg_data_dir": "",
    "resume": "",
    "sample_every_n_steps": 0,
    "sample_prompts": "a ring --w 32 --s 4\n# a comment\na star --ss ddim",
    "sample_sampler": "euler_a",
    "sdxl": False,
    "seed": "1234",
    "stop_text_encoder_training": 0,
    "text_encoder_lr": 0.0,
    "timestep_sampling": "sigma",
    "train_batch_size": 2,
    "train_data_dir": "img",
    "unet_lr": 0.0,
    "unit": 1,
    "use_tucker": False,
    "vae": "",
    "weighting_scheme": "logit_normal",
    "xformers": "xformers",
}
"""Fields of kohya's GUI, as it saves them: also those of other models and kinds."""
KOHYA_FLUX = """\
pretrained_model_name_or_path = "flux1-dev.safetensors"
train_data_dir = "img"
resolution = "32,32"
network_module = "networks.lora_flux"
network_dim = 4
network_train_unet_only = true
max_train_steps = 4
learning_rate = 1e-4
min_snr_gamma = 5
model_prediction_type = "raw"
"""
TOOLKIT_FLUX = """\
config:
  name: flux
  process:
    - type: sd_trainer
      network: {type: lora, linear: 4, linear_alpha: 4}
      datasets: [{folder_path: img, caption_ext: txt, resolution: 32}]
      train: {batch_size: 1, steps: 4, noise_scheduler: flowmatch, optimizer: adamw, lr: 1e-4, dtype: fp32}
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}
      sample: {sampler: flowmatch, sample_every: 2, width: 32, height: 32, prompts: [a ring], sample_steps: 2}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a file beside a folder of images."""

    def write_file(name: str, content: Any) -> Path:
        for index in range(2):
            draw_noise(tmp_path / "img" / "10_sks star" / f"{index}.png", index)
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    (tmp_path / "img" / "10_sks star").mkdir(parents=True)
    return write_file


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("flux") / "small-flux", "small-flux")


Write = Callable[..., Path]


def converted(path: Path, base: Path | None = None) -> tuple[dict[str, Any], str]:
    """Returns the settings of the training, and the names of what was not carried over."""
    done = convert_settings(path.parent / "out", path, base=str(base) if base else None)
    done.path.rename(path.parent / "out" / "last.yaml")
    text = (path.parent / "out" / "last.yaml").read_text()
    done.path.write_text(text)
    settings = train_of(load_spec(done.path)).model_dump()
    done.path.unlink()
    return settings, "; ".join(f"{name}: {reason}" for name, _, reason in done.dropped)


def test_the_fields_of_kohyas_gui_are_what_it_passes_to_sd_scripts(write: Write) -> None:
    train, dropped = converted(write("gui.json", GUI))
    assert (train["rank"], train["alpha"], train["steps"], train["warmup"], train["seed"]) == (4, 2.0, 40, "10%", 1234)
    assert train["targets"] == ["attention+ff", "unet.*.proj_in", "unet.*.proj_out", "text"]
    assert train["overrides"] == {}, "conv_dim belongs to another kind"
    assert (train["learning_rate"], train["rates"]["text"]) == (1e-4, None)
    assert (train["weight_decay"], train["rates"]["optimiser"]["betas"]) == (0.1, (0.9, 0.99))
    assert (train["objective"]["noise_offset"], train["objective"]["pyramid"]) == (0.05, None)
    assert train["objective"]["timesteps"] == {
        "distribution": {"name": "uniform"},
        "low": 0.0,
        "high": 1.0,
        "shift": None,
    }
    assert train["samples"] is None, "no interval is set"
    assert train["running"]["attention"] == "xformers"
    assert dropped == "adaptive_noise_scale: not available"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"LoRA_type": "Kohya LoCon"}, {"kind": {"name": "lora", "tucker": False}, "targets": ["all", "text"]}),
        ({"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "attn-mlp"}, {"targets": ["attention+ff", "text"]}),
        ({"LoRA_type": "LyCORIS/LoKr", "factor": 8, "decompose_both": True}, {"targets": ["all", "text"]}),
        ({"LoRA_type": "LyCORIS/DyLoRA"}, {"kind": {"name": "lora", "tucker": False}}),
        ({"max_train_steps": 0}, {"steps": "8 epochs"}),
        ({"max_train_epochs": "3"}, {"steps": "3 epochs"}),
        ({"lr_warmup_steps": 7}, {"warmup": 7}),
        ({"unet_lr": 2e-4}, {"targets": ["attention+ff", "unet.*.proj_in", "unet.*.proj_out"], "learning_rate": 2e-4}),
        ({"text_encoder_lr": 5e-5}, {"targets": "text"}),
        ({"xformers": "sdpa"}, {}),
    ],
    ids=str,
)
def test_each_field_of_kohyas_gui_counts_where_the_gui_counts_it(
    write: Write, change: dict[str, Any], expected: dict[str, Any]
) -> None:
    train, _ = converted(write("gui.json", GUI | change))
    assert {name: train[name] for name in expected} == expected
    assert train["running"]["attention"] == change.get("xformers", "xformers")
    kind = change.get("LoRA_type", "")
    assert train["kind"]["name"] == {"LyCORIS/LoHa": "loha", "LyCORIS/LoKr": "lokr"}.get(kind, "lora")
    has_convolutions = kind in ("Kohya LoCon", "LyCORIS/LoKr", "LyCORIS/DyLoRA")
    override = {"kind": None, "rank": 8, "alpha": 4.0}
    assert train["overrides"] == ({r"re:unet\..*\.conv[12]?": override} if has_convolutions else {})


def test_prompts_of_kohyas_gui_are_drawn_at_its_interval(write: Write) -> None:
    train, _ = converted(write("gui.json", GUI | {"sample_every_n_epochs": 2}))
    assert train["samples"]["every"] == "2 epochs"
    assert train["samples"]["prompts"] == ("a ring --w 32 --s 4 --ss euler_a", "a star --ss ddim")


UNIFORM, SIGMOID = {"name": "uniform"}, {"name": "logit_normal", "mean": 0.0, "std": 1.0}


@pytest.mark.parametrize(
    ("name", "added", "distribution", "shift"),
    [
        ("config.toml", "", UNIFORM, 3.0),
        ("config.toml", 'weighting_scheme = "logit_normal"\ndiscrete_flow_shift = 2.0', SIGMOID, 2.0),
        ("config.toml", 'timestep_sampling = "uniform"', UNIFORM, 1.0),
        ("config.toml", 'timestep_sampling = "sigmoid"\nsigmoid_scale = 0.5', {**SIGMOID, "std": 0.5}, 1.0),
        ("config.toml", 'timestep_sampling = "shift"\ndiscrete_flow_shift = 3.1582', SIGMOID, 3.1582),
        ("config.toml", 'timestep_sampling = "flux_shift"\ndiscrete_flow_shift = 3.0', SIGMOID, None),
        ("toolkit.yaml", "", SIGMOID, 1.0),
        ("toolkit.yaml", "timestep_type: linear", UNIFORM, 1.0),
        ("toolkit.yaml", "timestep_type: shift", UNIFORM, None),
        ("trainer.json", {"timestep_distribution": "UNIFORM"}, UNIFORM, 1.0),
        (
            "trainer.json",
            {"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.3, "noising_weight": -0.2, "timestep_shift": 2},
            {**SIGMOID, "mean": 0.3, "std": 0.8},
            2.0,
        ),
        (
            "trainer.json",
            {"timestep_distribution": "LOGIT_NORMAL", "dynamic_timestep_shifting": True, "timestep_shift": 1.0},
            SIGMOID,
            None,
        ),
        ("run.sh", "", UNIFORM, 1.0),
    ],
)
def test_timesteps_of_a_flow_are_drawn_as_the_trainer_draws_them(
    write: Write, flux: Path, name: str, added: Any, distribution: dict[str, Any], shift: float | None
) -> None:
    content: dict[str, Any] = {
        "config.toml": f"{KOHYA_FLUX}{added}\n",
        "toolkit.yaml": TOOLKIT.replace("train: {batch_size: 1,", f"train: {{batch_size: 1,{added}{',' * bool(added)}"),
        "trainer.json": {**ONE_TRAINER, **(added or {})},
        "run.sh": SCRIPT.replace("--train_text_encoder", ""),
    }
    train, _ = converted(write(name, content[name]), flux)
    assert (train["objective"]["timesteps"]["distribution"], train["objective"]["timesteps"]["shift"]) == (
        distribution,
        shift,
    )
    assert train["objective"]["weighting"] == {"name": "none"}


def test_layers_and_blocks_of_a_flow_are_those_of_sd_scripts(write: Write, flux: Path) -> None:
    train, dropped = converted(write("config.toml", KOHYA_FLUX + "blocks_to_swap = 1\nfp8_base = true\n"), flux)
    assert train["targets"] == "linear"
    # One double-stream and two single-stream blocks: two that sd-scripts counts.
    assert (train["running"]["offload"], train["running"]["quantise"]) == (0.5, "fp8")
    assert "min_snr_gamma" in dropped or "weighting" in dropped
    text = KOHYA_FLUX.replace("flux1-dev.safetensors", "tiny")
    train, dropped = converted(write("config.toml", text + "blocks_to_swap = 1\n"))
    assert train["running"]["offload"] == 0.0
    assert "the base has no transformer blocks" in dropped


def test_settings_of_one_trainer_count_with_their_units_and_switches(write: Write) -> None:
    saved = {
        "timestep_shift": 1.0,
        "validation": False,
        "validate_after": 1,
        "validate_after_unit": "EPOCH",
        "save_every": 2,
        "save_every_unit": "EPOCH",
        "sample_after": 10,
        "sample_after_unit": "MINUTE",
        "layer_filter": "attentions",
        "layer_filter_preset": "attn-mlp",
        "unet": {"weight_dtype": "FLOAT_8", "train": True},
        "samples": [
            {"enabled": True, "prompt": "a ring", "width": 32, "height": 64, "seed": 5, "cfg_scale": 7.0},
            {"enabled": False, "prompt": "a star"},
        ],
    }
    train, dropped = converted(write("trainer.json", ONE_TRAINER | saved))
    assert train["objective"]["timesteps"]["shift"] is None
    assert (train["validate_every"], train["save_every"]) == (0, "2 epochs")
    assert (train["targets"], train["running"]["quantise"]) == ("attention+ff", "fp8")
    assert train["running"]["gradient_checkpointing"], "its default"
    assert train["samples"]["prompts"] == ("a ring --w 32 --h 64 --l 7.0 --d 5",)
    assert "sample_after: set samples.every in steps" in dropped
    train, _ = converted(write("trainer.json", ONE_TRAINER | saved | {"validation": True, "sample_after_unit": "STEP"}))
    assert (train["validate_every"], train["samples"]["every"]) == ("1 epoch", 10)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "content", "on_flux"),
    [
        ("gui.json", GUI | {"xformers": "sdpa", "max_train_steps": 4}, False),
        ("config.toml", KOHYA_FLUX + 'timestep_sampling = "flux_shift"\n', True),
        ("toolkit.yaml", TOOLKIT_FLUX, True),
        ("trainer.json", ONE_TRAINER | {"resolution": "32", "epochs": 1, "learning_rate_warmup_steps": 0,
                                        "optimizer": {"optimizer": "ADAMW"}}, False),
        ("run.sh", SCRIPT.replace("=64", "=32").replace("=50", "=4"), False),
    ],
    ids=["kohya's GUI", "sd-scripts, FLUX", "ai-toolkit, FLUX", "OneTrainer", "diffusers"],
)  # fmt: skip
def test_a_converted_file_of_each_trainer_trains(
    write: Write, flux: Path, tmp_path: Path, name: str, content: Any, on_flux: bool
) -> None:
    done = convert_settings(tmp_path / "out", write(name, content), base=str(flux) if on_flux else None)
    ran = loraline_here("run", done.path, "--to", "adapter", home=tmp_path / "home")
    assert ran.returncode == 0, ran.stderr
