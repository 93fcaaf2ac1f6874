"""`loraline init --from` on whole files as the programs write them, and what trainers do for flows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.coming_from.write import convert_settings
from tests.flows.commands import loraline_here
from tests.flows.test_coming_from import KOHYA, ONE_TRAINER, SCRIPT, TOOLKIT
from tests.flows.test_kohya_gui import GUI, Write, converted, write
from tests.support.untrained import write_untrained_base

__all__ = ["write"]

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


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("flux") / "small-flux", "small-flux")


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
        "trainer.json": {**ONE_TRAINER, **(added if isinstance(added, dict) else {})},
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


def test_prompts_are_read_from_the_file_of_the_trainer(write: Write, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# portraits\na ring --w 32 --h 64 --d 1\n\na star\n")
    text = KOHYA.replace("seed = 42", 'seed = 42\nsample_prompts = "prompts.txt"\nsample_every_n_epochs = 1')
    train, _ = converted(write("config.toml", text))
    assert (train["samples"]["every"], train["samples"]["prompts"]) == (
        "1 epoch",
        ("a ring --w 32 --h 64 --d 1", "a star"),
    )
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "a ring", "seed": 3}]))
    train, _ = converted(write("trainer.json", ONE_TRAINER | {"sample_definition_file_name": "samples.json"}))
    assert train["samples"]["prompts"] == ("a ring --d 3",)
    train, dropped = converted(write("config.toml", text.replace("prompts.txt", "gone.txt")))
    assert train["samples"] is None
    assert "sample_prompts: copy the prompts of the file" in dropped
    script = SCRIPT.replace("--snr_gamma", "--num_validation_images=2 --validation_epochs=3 --snr_gamma")
    train, _ = converted(write("run.sh", script))
    assert (train["samples"]["every"], train["samples"]["seeds"]) == ("3 epochs", (0, 1))
