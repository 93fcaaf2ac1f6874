"""Fits translated settings to the base: what only some families have, and what trainers do for flows."""

from __future__ import annotations

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from lora_engine.bases.defaults import transformer_config
from lora_engine.families import Family

_TIMESTEPS = "train.objective.timesteps"
_SIGMOIDS = ("sigmoid", "shift", "fluxshift")
"""Ways of sd-scripts and ai-toolkit to draw timesteps by a sigmoid of normal numbers; see `_sampling`."""


def fit_base(translation: Translation, trainer: str, base: str, family: Family) -> None:
    """Completes a translation in place for its base.

    Args:
        translation: The settings; its `counts` get what later steps ask: `unet`, `flow` and `flux`.
        trainer: A key of `TRAINERS`.
        base: The base, as a name for `resolve_base`.
        family: Its family.
    """
    flags = {"unet": family.unet is not None, "flow": family.is_flow, "flux": family.name == "flux"}
    translation.counts.update({name: 1.0 for name, is_set in flags.items() if is_set})
    _fit_clip_skip(translation, family.name)
    if family.is_flow:
        _fit_sampling(translation, trainer, family.name)
        _drop_what_flows_lack(translation, trainer)
    else:
        translation.remove(f"{_TIMESTEPS}.shift")
    _fit_one_trainer(translation)
    _fit_offload(translation, base)


def _fit_clip_skip(translation: Translation, family: str) -> None:
    """Makes the layer one of the base's text encoders."""
    origin, layer = translation.origins.get("train.clip_skip"), translation.get("train.clip_skip")
    if layer is None or origin is None:
        return
    if family == "sdxl" and origin != "clip_skip":
        translation.set("train.clip_skip", layer + 1, origin)  # its own layer is the last but one
    elif family != "sd":
        reason = "sd-scripts ignores it for SDXL" if family == "sdxl" else "the base has no such layers"
        translation.remove("train.clip_skip", reason)


def _fit_sampling(translation: Translation, trainer: str, family: str) -> None:
    """Sets distribution and shift of the timesteps as the trainer draws them for a flow."""
    usual = {"sd": "sigma", "aitk": "sigmoid"}.get(trainer, "")
    way = translation.texts.get("timestep sampling", usual)
    origin = translation.origins.get("timestep sampling", "default of the trainer")
    if trainer == "diffusers" and family == "flux":
        translation.set(f"{_TIMESTEPS}.shift", 1.0, "the script shifts no timesteps")
    elif trainer == "ot":
        if translation.counts.get("own shift"):
            translation.remove(f"{_TIMESTEPS}.shift")
        elif translation.get(f"{_TIMESTEPS}.shift") is None:
            translation.set(f"{_TIMESTEPS}.shift", 1.0, "default of timestep_shift")
    elif trainer == "sd":
        _sampling(translation, way, origin, shift=3.0 if family == "flux" else 1.0)
    elif trainer == "aitk":
        # Its `shift` draws evenly and shifts as the base does, which is the default here.
        way = {"linear": "uniform", "shift": "", "fluxshift": "", "lumina2shift": ""}.get(way, way)
        _sampling(translation, way, origin, shift=1.0)


def _sampling(translation: Translation, way: str, origin: str, *, shift: float) -> None:
    """Sets what a name of `timestep_sampling` means in sd-scripts (`get_noisy_model_input_and_timesteps`).

    Args:
        translation: The settings.
        way: `sigma` shifts the distribution of `weighting_scheme`; `uniform` and `sigmoid` shift nothing; `shift`
            shifts a sigmoid, `fluxshift` shifts it as the base does; empty sets nothing.
        origin: The option that it is from.
        shift: Shift without an option.
    """
    if not way:
        return
    if way not in ("sigma", "uniform", *_SIGMOIDS):
        translation.drop(Setting(origin, way, ""), "there is no counterpart; timesteps are drawn as the base does")
        return
    if way in _SIGMOIDS:
        scale = translation.counts.get("sigmoid_scale", 1.0)
        form = {"name": "logit_normal", "std": scale} if scale not in (0.0, 1.0) else "logit_normal"
        translation.set(f"{_TIMESTEPS}.distribution", form, origin)
    elif way == "uniform":
        translation.remove(f"{_TIMESTEPS}.distribution")
    if way in ("uniform", "sigmoid"):
        translation.set(f"{_TIMESTEPS}.shift", 1.0, origin)
    elif way == "fluxshift":
        translation.remove(f"{_TIMESTEPS}.shift")
    elif translation.get(f"{_TIMESTEPS}.shift") is None:
        translation.set(f"{_TIMESTEPS}.shift", shift, "default of the trainer")


def _drop_what_flows_lack(translation: Translation, trainer: str) -> None:
    translation.remove("train.objective.weighting", "a flow has no such weights")
    for name in ("prediction", "zero_terminal_snr"):
        translation.remove(f"train.{name}", "the base is a flow")
    if trainer == "sd":
        for name in ("noise_offset", "pyramid"):
            translation.remove(f"train.objective.{name}", "sd-scripts ignores it for such a base")


def _fit_one_trainer(translation: Translation) -> None:
    """Completes OneTrainer's logit-normal distribution: `noising_bias` and 1 + `noising_weight`."""
    path = f"{_TIMESTEPS}.distribution"
    mean, more = (translation.counts.get(f"noising_{name}", 0.0) for name in ("bias", "weight"))
    if translation.get(path) == "logit_normal" and (mean or more):
        form = {"name": "logit_normal", "mean": mean, "std": 1.0 + more}
        translation.set(path, form, f"{translation.origins[path]}, noising_bias, noising_weight")


def _fit_offload(translation: Translation, base: str) -> None:
    """Turns a number of blocks into a share of the layers: a single-stream block counts as half of another one."""
    if blocks := translation.counts.get("blocks to swap"):
        origin, config = translation.origins["blocks to swap"], transformer_config(base)
        total = config.get("num_layers", 0) + config.get("num_single_layers", 0) / 2
        if total:
            translation.set("train.running.offload", round(min(1.0, blocks / total), 4), origin)
        else:
            translation.drop(Setting(origin, f"{blocks:g}", ""), "the base has no transformer blocks")
    if translation.get("train.running.offload") and translation.get("train.running.quantise") in ("8bit", "4bit"):
        translation.remove("train.running.offload", "offload goes with quantise none and fp8")
