"""`loraline init --from` on the settings that kohya's GUI saves: all of its fields, also those that do not count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.coming_from.write import convert_settings
from flows.spec import load_spec
from tests.flows.shared import draw_noise
from tests.flows.test_coming_from import train_of

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
