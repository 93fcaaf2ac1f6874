"""Carries over the options of other trainers for the objective, the method and the captions' length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    DISTRIBUTIONS,
    LOSSES,
    ONE_TRAINER_DISTRIBUTIONS,
    WEIGHTINGS,
    NoCounterpart,
    choose,
    integer,
    is_off,
    number,
    plain,
    truth,
)


def _timesteps(translation: Translation, setting: Setting) -> None:
    end = "low" if "min" in setting.name else "high"
    value = number(setting)
    share = value if setting.name.endswith("noising_strength") else value / 1000
    if share != (0 if end == "low" else 1):
        translation.set(f"train.objective.timesteps.{end}", share, setting.name)


def _distribution(translation: Translation, setting: Setting) -> None:
    """Carries the distribution over; names that also say the shift are completed when the base is known."""
    name = setting.name
    if name in ("logit_mean", "logit_std", "mode_scale"):
        key = name.replace("logit_", "").replace("mode_", "")
        translation.set(f"train.objective.timesteps.distribution.{key}", number(setting), name)
    elif name in ("sigmoid_scale", "noising_weight", "noising_bias"):
        translation.counts[name] = number(setting)
    elif name in ("timestep_sampling", "train.timestep_type"):
        if not is_off(setting.value):
            translation.texts["timestep sampling"] = plain(setting.value)
            translation.origins["timestep sampling"] = name
    elif name == "train.content_or_style":
        if plain(setting.value) != "balanced":
            raise NoCounterpart("see objective.timesteps: low, high and distribution")
    elif not is_off(setting.value):
        names = ONE_TRAINER_DISTRIBUTIONS if name == "timestep_distribution" else DISTRIBUTIONS
        chosen = choose(setting, names)
        if chosen != "uniform":
            translation.set("train.objective.timesteps.distribution", chosen, name)


def _shift(translation: Translation, setting: Setting) -> None:
    if setting.name == "dynamic_timestep_shifting":
        translation.counts["own shift"] = float(truth(setting))
    elif not is_off(setting.value):
        translation.set("train.objective.timesteps.shift", number(setting), setting.name)


def _weighting(translation: Translation, setting: Setting) -> None:
    if setting.name == "debiased_estimation_loss":
        if truth(setting):
            translation.set("train.objective.weighting", "debiased", setting.name)
        return
    name = choose(setting, WEIGHTINGS)
    if name != "none":
        translation.set("train.objective.weighting", name, setting.name)


def _loss(translation: Translation, setting: Setting) -> None:
    if not setting.name.endswith("_strength"):
        translation.set("train.objective.loss", choose(setting, LOSSES), setting.name)
    elif number(setting) and not setting.name.startswith("mse"):
        translation.set("train.objective.loss", setting.name.split("_")[0].replace("mae", "l1"), setting.name)


def _delta(translation: Translation, setting: Setting) -> None:
    if setting.name == "huber_scale":
        if number(setting) != 1:
            raise NoCounterpart("multiply loss.delta by it")
        return
    translation.set("train.objective.loss.delta", number(setting), setting.name)


def _loss_schedule(translation: Translation, setting: Setting) -> None:
    translation.set("train.objective.loss.schedule", str(setting.value).lower(), setting.name)


def _mask(translation: Translation, setting: Setting) -> None:
    if is_off(setting.value):
        return
    translation.counts["mask"] = 1.0
    translation.set("train.method.mask", translation.get("train.method.mask") or {}, setting.name)
    if setting.name not in ("masked_loss", "masked_training"):
        raise NoCounterpart("set masks of the ingest step to the folder of masks")


def _alpha(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.counts["mask"] = 1.0
        translation.set("ingest.alpha", "mask", setting.name)
        translation.set("train.method.mask", translation.get("train.method.mask") or {}, setting.name)


def _method(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) == "embedding":
        translation.set("train.method", "textual-inversion", setting.name)
    elif plain(setting.value) not in ("lora", ""):
        raise NoCounterpart("an adapter is trained, not the whole base")


def _preserve(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.method.preservation", {}, setting.name)


def _chunks(translation: Translation, setting: Setting) -> None:
    if setting.name == "max_token_length" and setting.value not in (None, "") and integer(setting) > 75:
        translation.set("train.captions.chunks", -(-integer(setting) // 75), setting.name)
    elif setting.name != "max_token_length":
        raise NoCounterpart("the base's own length applies")


def _checkpoint_every(translation: Translation, setting: Setting) -> None:
    if setting.name == "checkpointing_steps":
        translation.set("train.checkpoint_every", integer(setting), setting.name)


def _clip_skip(translation: Translation, setting: Setting) -> None:
    """Carries the layer over; OneTrainer's number of skipped layers is completed when the base is known."""
    if is_off(setting.value):
        return
    if "layer_skip" not in setting.name:
        if integer(setting) > 1:
            translation.set("train.clip_skip", integer(setting), setting.name)
    elif "2" in setting.name:
        raise NoCounterpart("clip_skip is one number for all text encoders")
    else:
        translation.set("train.clip_skip", integer(setting) + 1, setting.name)


def _prediction(translation: Translation, setting: Setting) -> None:
    if setting.name == "prediction_type":
        if not is_off(setting.value):
            names = {"epsilon": "epsilon", "vprediction": "v_prediction"}
            translation.set("train.prediction", choose(setting, names, exact=True), setting.name)
    elif truth(setting):
        value = "epsilon" if "epsilon" in setting.name else "v_prediction"
        translation.set("train.prediction", value, setting.name)


OF_OBJECTIVE: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.objective.timesteps.low": _timesteps,
    "train.objective.timesteps.high": _timesteps,
    "train.objective.timesteps.distribution": _distribution,
    "train.objective.timesteps.shift": _shift,
    "train.objective.weighting": _weighting,
    "train.objective.loss": _loss,
    "train.objective.loss.delta": _delta,
    "train.objective.loss.schedule": _loss_schedule,
    "train.method.mask": _mask,
    "ingest.alpha": _alpha,
    "train.method": _method,
    "train.method.preservation": _preserve,
    "train.captions.chunks": _chunks,
    "train.checkpoint_every": _checkpoint_every,
    "train.clip_skip": _clip_skip,
    "train.prediction": _prediction,
}
"""`step.setting` -> the function that carries an option over to it."""
