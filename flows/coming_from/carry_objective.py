"""Carries over the options of other trainers for the objective, the method and the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    DISTRIBUTIONS,
    LOSSES,
    WEIGHTINGS,
    NoCounterpart,
    choose,
    integer,
    is_off,
    number,
    plain,
    truth,
)
from lora_engine.bases.samplers import find_sampler
from lora_engine.errors import SettingsError


def _timesteps(translation: Translation, setting: Setting) -> None:
    end = "low" if "min" in setting.name else "high"
    value = number(setting)
    share = value if setting.name.endswith("noising_strength") else value / 1000
    if share != (0 if end == "low" else 1):
        translation.set(f"train.objective.timesteps.{end}", share, setting.name)


def _distribution(translation: Translation, setting: Setting) -> None:
    if setting.name in ("logit_mean", "logit_std", "mode_scale"):
        key = setting.name.replace("logit_", "").replace("mode_", "")
        translation.set(f"train.objective.timesteps.distribution.{key}", number(setting), setting.name)
        return
    if not is_off(setting.value):
        name = choose(setting, DISTRIBUTIONS)
        if name != "uniform":
            translation.set("train.objective.timesteps.distribution", name, setting.name)


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


def _every(path: str, translation: Translation, setting: Setting) -> None:
    """Carries an interval over: steps, or epochs; OneTrainer has its unit in another option."""
    if is_off(setting.value):
        return
    if setting.name in ("sample_after", "save_every"):
        raise NoCounterpart(f"set {path.partition('.')[2]} in steps, or epochs such as '2 epochs'")
    if number(setting):
        count = integer(setting)
        translation.set(
            path, f"{count} epoch{'s' if count > 1 else ''}" if "epochs" in setting.name else count, setting.name
        )


def _prompts(translation: Translation, setting: Setting) -> None:
    value = setting.value
    if setting.name in ("sample_sampler", "sample.sampler"):
        if not is_off(value) and str(value) != "flowmatch":  # ai-toolkit's name of the only sampler of a flow
            _sampler(translation, setting)
        return
    if setting.name in ("sample.width", "sample.height", "sample.neg"):
        _sample_size(translation, setting)
        return
    prompts = [value] if setting.name.startswith("validation_prompt") and isinstance(value, str) else value
    if isinstance(prompts, list):
        written = [entry.get("prompt", "") if isinstance(entry, dict) else str(entry) for entry in prompts]
        translation.set("train.samples.prompts", [text for text in written if text], setting.name)
    elif not is_off(value):
        raise NoCounterpart("copy the prompts of the file into samples.prompts")


def _sampler(translation: Translation, setting: Setting) -> None:
    """Notes the sampler of all samples, which becomes an option of each prompt."""
    try:
        find_sampler(str(setting.value))
    except SettingsError as error:
        raise NoCounterpart(f"samplers are {error.allowed}") from None
    translation.origins["sample sampler"] = str(setting.value)


def _sample_size(translation: Translation, setting: Setting) -> None:
    """Notes the size and the negative prompt of all samples, which become options of each prompt."""
    key = setting.name.rpartition(".")[2]
    if key in ("width", "height"):
        translation.counts[f"sample {key}"] = integer(setting)
    elif key == "neg" and setting.value:
        translation.origins["sample negative"] = str(setting.value)


def _seeds(translation: Translation, setting: Setting) -> None:
    if setting.name == "sample.seed":
        translation.set("train.samples.seeds", [integer(setting)], setting.name)


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
    "train.objective.weighting": _weighting,
    "train.objective.loss": _loss,
    "train.objective.loss.delta": _delta,
    "train.objective.loss.schedule": _loss_schedule,
    "train.method.mask": _mask,
    "ingest.alpha": _alpha,
    "train.method": _method,
    "train.method.preservation": _preserve,
    "train.samples.every": partial(_every, "train.samples.every"),
    "train.save_every": partial(_every, "train.save_every"),
    "train.samples.prompts": _prompts,
    "train.samples.seeds": _seeds,
    "train.captions.chunks": _chunks,
    "train.checkpoint_every": _checkpoint_every,
    "train.clip_skip": _clip_skip,
    "train.prediction": _prediction,
}
"""`step.setting` -> the function that carries an option over to it."""
