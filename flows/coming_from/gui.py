"""Turns the settings of kohya's GUI (kohya_ss) into the options that it passes to sd-scripts.

The GUI writes all of its fields, with those of other models and kinds of adapters. The source is `train_model` of
kohya_gui/lora_gui.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flows.coming_from.read import Setting
from flows.coming_from.values import is_off, number

_LYCORIS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout")
_BLOCKS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "down_lr_weight", "mid_lr_weight",
           "up_lr_weight", "rank_dropout", "module_dropout")  # fmt: skip
_KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Standard": ("networks.lora", _BLOCKS),
    "Kohya LoCon": ("networks.lora", ("conv_dim", "conv_alpha", *_BLOCKS)),
    "Kohya LoHa": ("networks.loha", ("use_tucker", *_LYCORIS)),
    "Kohya LoKr": ("networks.lokr", ("use_tucker", "factor", *_LYCORIS)),
    "Kohya DyLoRA": ("networks.dylora", ("conv_dim", "conv_alpha", *_BLOCKS)),
    "LoRA-FA": ("networks.lora_fa", _BLOCKS),
    "Flux1": ("networks.lora_flux", ("train_t5xxl", "rank_dropout", "module_dropout")),
    "Flux1 OFT": ("networks.oft_flux", ()),
    "LoCon": ("locon", ("use_tucker", "dora_wd", *_LYCORIS)),
    "LyCORIS/LoCon": ("locon", ("use_tucker", "dora_wd", *_LYCORIS)),
    "LyCORIS/LoHa": ("loha", ("use_tucker", "dora_wd", *_LYCORIS)),
    "LyCORIS/LoKr": ("lokr", ("factor", "use_cp", "decompose_both", "dora_wd", *_LYCORIS)),
    "LyCORIS/GLoRA": ("glora", ("use_tucker", *_LYCORIS)),
    "LyCORIS/DyLoRA": ("dylora", ("use_tucker", *_LYCORIS)),
    "LyCORIS/Diag-OFT": ("diag-oft", _LYCORIS),
    "LyCORIS/BOFT": ("boft", _LYCORIS),
    "LyCORIS/iA3": ("ia3", ("conv_dim", "conv_alpha")),
    "LyCORIS/Native Fine-Tuning": ("full", ("rank_dropout", "module_dropout")),
}
"""`LoRA_type` -> the network module or LyCORIS' algorithm, and the fields that it takes."""
_OF_KINDS = frozenset(name for _, fields in _KINDS.values() for name in fields)
_FLUX = frozenset({"discrete_flow_shift", "timestep_sampling", "model_prediction_type", "guidance_scale", "ae",
                   "fp8_base_unet", "split_mode", "apply_t5_attn_mask", "t5xxl_max_token_length", "mem_eff_save",
                   "cpu_offload_checkpointing", "single_blocks_to_swap", "double_blocks_to_swap"})  # fmt: skip
_SD3 = frozenset({"weighting_scheme", "logit_mean", "logit_std", "mode_scale", "clip_g"})
_TRANSFORMERS = frozenset({"blocks_to_swap", "clip_l", "t5xxl"})
_OF_NOISE = {
    "Original": ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"),
    "Multires": ("multires_noise_iterations", "multires_noise_discount"),
}
_OF_PROGRAM = frozenset({
    "LoRA_type", "LyCORIS_preset", "model_list", "save_as_bool", "noise_offset_type", "lr_warmup", "lr_warmup_steps",
    "use_wandb", "num_cpu_threads_per_process", "num_machines", "main_process_port", "gpu_ids", "dynamo_backend",
    "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "block_lr_zero_threshold", "train_blocks", "unit",
    "train_on_input", "constrain", "rescaled", "bypass_mode", "use_scalar", "rank_dropout_scale", "train_norm",
    "stop_text_encoder_training", "stop_text_encoder_training_pct", "sdxl_no_half_vae", "lowvram",
    "sdxl_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk",
    "sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk",
})  # fmt: skip
"""Fields that start the program, are read here, or belong to kinds in a way that has no counterpart."""


def to_options(settings: Sequence[Setting]) -> list[Setting]:
    """Returns the options that kohya's GUI passes for its fields, in their order.

    Raises:
        SpecError: A number is none.
    """
    fields = {setting.name: setting for setting in settings}
    unused = _unused(fields)
    # The GUI passes no field that is empty, off or 0.
    options = [_of_field(field) for field in settings if field.name not in unused and not is_off(field.value)]
    return [*options, *_network(fields), *_warmup(fields), *_parts(fields)]


def _unused(fields: Mapping[str, Setting]) -> set[str]:
    """Returns the fields that are not passed as they are."""
    is_flux, is_sd3 = (_is_on(fields, f"{name}_checkbox") for name in ("flux1", "sd3"))
    unused = set(_OF_PROGRAM)
    if _text(fields, "xformers") in ("sdpa", "none"):
        unused.add("xformers")
    if not is_flux:
        unused |= _FLUX
    if not is_sd3:
        unused |= _SD3
    if not (is_flux or is_sd3):
        unused |= _TRANSFORMERS
    if "LoRA_type" in fields:
        unused |= _OF_KINDS - set(_kind(fields)[1])
    noise = _text(fields, "noise_offset_type")
    unused |= {name for kind, names in _OF_NOISE.items() if noise and kind != noise for name in names}
    lengths = [name for name in ("max_train_steps", "max_train_epochs") if _is_on(fields, name)]
    unused |= {"max_train_steps", "max_train_epochs"} - set(lengths)
    if lengths:
        unused.add("epoch")  # of a computation of max_train_steps
    if not _is_on(fields, "multi_gpu"):
        unused.add("num_processes")
    if not any(_is_on(fields, f"sample_every_n_{unit}") for unit in ("steps", "epochs")):
        unused |= {"sample_prompts", "sample_sampler"}
    return unused


def _is_on(fields: Mapping[str, Setting], name: str) -> bool:
    return name in fields and not is_off(fields[name].value)


def _text(fields: Mapping[str, Setting], name: str) -> str:
    return str(fields[name].value) if name in fields else ""


def _kind(fields: Mapping[str, Setting]) -> tuple[str, tuple[str, ...]]:
    """Returns what `_KINDS` says of the type; of an unknown one its own name."""
    name = _text(fields, "LoRA_type")
    return _KINDS.get(name, (name, ()))


def _of_field(setting: Setting) -> Setting:
    """Returns a field as an option: the GUI has texts where sd-scripts has lists, files or switches."""
    value: Any = setting.value
    if setting.name.endswith("_args") and isinstance(value, str):
        value = value.replace('"', "").split()
    elif setting.name == "xformers" and value == "xformers":
        value = True
    elif setting.name == "sample_prompts" and isinstance(value, str):
        value = [line for line in value.splitlines() if line.strip() and not line.startswith("#")]
    return Setting(setting.name, value, setting.where)


def _network(fields: Mapping[str, Setting]) -> list[Setting]:
    """Returns the options for the kind of the adapter; an unknown one is passed, and noted later."""
    if "LoRA_type" not in fields:
        return []
    name, taken = _kind(fields)
    where = fields["LoRA_type"].where
    options = [Setting("network_module" if name.startswith("networks.") else "algo", name, where)]
    if name == "full" or "conv_dim" in taken:
        preset = _text(fields, "LyCORIS_preset")
        options += [Setting("preset", preset, where)] if preset and not name.startswith("networks.") else []
    return options


def _warmup(fields: Mapping[str, Setting]) -> list[Setting]:
    """Returns the warmup: its steps, or else a share; the GUI has percent."""
    if _is_on(fields, "lr_warmup_steps"):
        return [fields["lr_warmup_steps"]]
    if not _is_on(fields, "lr_warmup"):
        return []
    percent = fields["lr_warmup"]
    return [Setting("lr_warmup_steps", number(percent) / 100, percent.where)]


def _parts(fields: Mapping[str, Setting]) -> list[Setting]:
    """Returns which parts are trained; a rate of 0 is that of `learning_rate` if both are 0."""
    if not {"unet_lr", "text_encoder_lr"} <= fields.keys():
        return []
    text, network = (_is_on(fields, name) for name in ("text_encoder_lr", "unet_lr"))
    where = fields["unet_lr"].where
    if text == network:
        return []
    return [Setting("network_train_text_encoder_only" if text else "network_train_unet_only", True, where)]
