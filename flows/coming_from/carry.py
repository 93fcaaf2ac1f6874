"""Carries over the options of other trainers whose values need more than a type."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    DISTRIBUTIONS,
    DTYPES,
    KINDS,
    LOSSES,
    OPTIMIZERS,
    PRECISIONS,
    WEIGHTINGS,
    NoCounterpart,
    choose,
    integer,
    is_off,
    number,
    plain,
    sizes,
    truth,
)


def _kind(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) in ("lycoris.kohya", ""):
        return  # `algo` says which
    translation.set("train.kind", choose(setting, KINDS, exact=True), setting.name)


def _targets(translation: Translation, setting: Setting) -> None:
    flags, name = translation.counts, setting.name
    if name in ("layer_filter", "layer_filter_preset", "lora_layers", "train.network.network_kwargs"):
        raise NoCounterpart("write the patterns into targets yourself")
    if truth(setting):
        flags[
            {"network_train_unet_only": "no_text", "network_train_text_encoder_only": "no_network"}.get(
                name, "text" if "text_encoder" in name else "network"
            )
        ] = 1.0
    elif name in ("unet.train", "transformer.train", "train.train_unet"):
        flags["no_network"] = 1.0
    elif "text_encoder" in name and "2" not in name:
        flags["no_text"] = 1.0


def _resolution(translation: Translation, setting: Setting) -> None:
    values = sizes(setting)
    side = max(8, round(max(values) / 8) * 8)
    translation.set("preprocess.resolution", side, setting.name)
    if len(set(values)) > 1:
        translation.drop(setting, f"one size for a run; {side} was taken")


def _crop(translation: Translation, setting: Setting) -> None:
    crops = {"enable_bucket": "bucket", "datasets.buckets": "bucket", "aspect_ratio_bucketing": "bucket"}
    if truth(setting):
        translation.set("preprocess.crop", crops.get(setting.name, "center"), setting.name)
    elif setting.name != "center_crop":
        translation.set("preprocess.crop", "center", setting.name)


def _no_upscale(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("preprocess.buckets.enlarge", 1.0, setting.name)


def _text_rate(translation: Translation, setting: Setting) -> None:
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    rates = [number(setting, value) for value in values if value not in (None, "")]
    if not rates:
        return
    if rates[0] == 0:
        translation.counts["no_text"] = 1.0
        return
    translation.set("train.rates.text", rates[0], setting.name)
    if len(set(rates)) > 1 or setting.name in ("text_encoder_lr2", "text_encoder_2.learning_rate"):
        translation.drop(setting, "one rate for all text encoders; rates.layers has one for each")


def _network_rate(translation: Translation, setting: Setting) -> None:
    if setting.value not in (None, "") and number(setting):
        translation.set("train.learning_rate", number(setting), setting.name)


def _optimizer(translation: Translation, setting: Setting) -> None:
    if setting.name in ("use_8bit_adam", "use_lion_optimizer"):
        if truth(setting):
            translation.set("train.rates.optimiser", "lion" if "lion" in setting.name else "adamw-8bit", setting.name)
        return
    translation.set("train.rates.optimiser", choose(setting, OPTIMIZERS), setting.name)
    if plain(setting.value) in ("adam", "pagedadamw8bit", "lion8bit", "pagedlion8bit", "ademamix8bit"):
        translation.drop(setting, f"{translation.get('train.rates.optimiser')!r} is the nearest")


def _betas(translation: Translation, setting: Setting) -> None:
    index = 1 if setting.name.endswith("2") else 0
    if setting.name == "prodigy_beta3":
        raise NoCounterpart("see the options of rates.optimiser")
    if setting.value in (None, ""):
        return
    betas = translation.get("train.rates.optimiser.betas") or [0.9, 0.999]
    translation.set(
        "train.rates.optimiser.betas",
        [number(setting) if n == index else beta for n, beta in enumerate(betas)],
        setting.name,
    )


def _weight_decay(translation: Translation, setting: Setting) -> None:
    if isinstance(setting.value, dict | list) or setting.name == "prodigy_decouple":
        raise NoCounterpart("see the options of rates.optimiser")
    if setting.value not in (None, ""):
        translation.set("train.weight_decay", number(setting), setting.name)


def _warmup(translation: Translation, setting: Setting) -> None:
    value = number(setting)
    translation.counts.pop("warmup", None)
    if 0 < value < 1:
        translation.counts["warmup"] = value
    translation.set("train.warmup", integer(setting) if value >= 1 or value == 0 else 0, setting.name)


def _decay(translation: Translation, setting: Setting) -> None:
    value = number(setting)
    if value:
        translation.counts["decay"] = value
        translation.origins["train.schedule.decay"] = setting.name


def _ema(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value) and plain(setting.value) != "off":
        translation.counts["ema"] = 1.0
        translation.set("train.rates.ema", translation.get("train.rates.ema") or {}, setting.name)


def _precision(translation: Translation, setting: Setting) -> None:
    if setting.name in ("full_fp16", "full_bf16"):
        if truth(setting):
            raise NoCounterpart("the adapter is always trained in fp32")
        return
    if setting.value in (None, ""):
        return
    translation.set("train.precision", choose(setting, {plain(k): v for k, v in PRECISIONS.items()}), setting.name)


def _dtype(translation: Translation, setting: Setting) -> None:
    if setting.value not in (None, ""):
        translation.set("convert.dtype", DTYPES[choose(setting, PRECISIONS)], setting.name)


def _attention(translation: Translation, setting: Setting) -> None:
    if setting.name in ("xformers", "enable_xformers_memory_efficient_attention", "train.xformers") and truth(setting):
        translation.set("train.running.attention", "xformers", setting.name)


def _compile(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.running.compile", "regional", setting.name)


def _quantise(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value):
        translation.set("train.running.quantise", "8bit", setting.name)
        if setting.name.startswith("fp8"):
            translation.drop(setting, "quantise: 8bit is the nearest")


def _checkpointing(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value) and plain(setting.value) != "off":
        translation.set("train.running.gradient_checkpointing", True, setting.name)


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
        raise NoCounterpart("put the masks into a folder `masks` beside the images")


def _method(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) == "embedding":
        translation.set("train.method", "textual-inversion", setting.name)
    elif plain(setting.value) not in ("lora", ""):
        raise NoCounterpart("an adapter is trained, not the whole base")


def _preserve(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.method.preservation", {}, setting.name)


def carry_epochs(translation: Translation, setting: Setting) -> None:
    """Notes the epochs, which become steps when the images are counted."""
    if number(setting):
        translation.counts["epochs"] = number(setting)
        translation.origins["epochs"] = setting.name


def _samples_every(translation: Translation, setting: Setting) -> None:
    if setting.name in ("sample_every_n_epochs", "sample_after"):
        if not is_off(setting.value):
            raise NoCounterpart("set samples.every in steps")
        return
    if number(setting):
        translation.set("train.samples.every", integer(setting), setting.name)


def _prompts(translation: Translation, setting: Setting) -> None:
    value = setting.value
    if setting.name in ("sample.width", "sample.height", "sample.neg"):
        _sample_size(translation, setting)
        return
    prompts = [value] if setting.name.startswith("validation_prompt") and isinstance(value, str) else value
    if isinstance(prompts, list):
        written = [entry.get("prompt", "") if isinstance(entry, dict) else str(entry) for entry in prompts]
        translation.set("train.samples.prompts", [text for text in written if text], setting.name)
    elif not is_off(value):
        raise NoCounterpart("copy the prompts of the file into samples.prompts")


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


def _kind_option(translation: Translation, setting: Setting) -> None:
    option = {"decompose": "both", "tucker": "tucker", "factor": "factor"}
    key = next(ours for part, ours in option.items() if part in setting.name.replace("decompose_factor", "factor"))
    if key == "factor":
        if number(setting) > 0:
            translation.set("train.kind.factor", integer(setting), setting.name)
    elif truth(setting):
        translation.set(f"train.kind.{key}", True, setting.name)


def _dora(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.counts["dora"] = 1.0


def _device(translation: Translation, setting: Setting) -> None:
    """Leaves the device out: `auto` takes the GPU."""


SPECIAL: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.kind": _kind,
    "train.running.device": _device,
    "train.kind.factor": _kind_option,
    "train.kind.tucker": _kind_option,
    "train.kind.both": _kind_option,
    "train.kind.inner": _dora,
    "train.targets": _targets,
    "preprocess.resolution": _resolution,
    "preprocess.crop": _crop,
    "preprocess.buckets.enlarge": _no_upscale,
    "train.rates.text": _text_rate,
    "train.learning_rate": _network_rate,
    "train.rates.optimiser": _optimizer,
    "train.rates.optimiser.betas": _betas,
    "train.weight_decay": _weight_decay,
    "train.warmup": _warmup,
    "train.schedule.decay": _decay,
    "train.rates.ema": _ema,
    "train.precision": _precision,
    "convert.dtype": _dtype,
    "train.running.attention": _attention,
    "train.running.compile": _compile,
    "train.running.quantise": _quantise,
    "train.running.gradient_checkpointing": _checkpointing,
    "train.objective.timesteps.low": _timesteps,
    "train.objective.timesteps.high": _timesteps,
    "train.objective.timesteps.distribution": _distribution,
    "train.objective.weighting": _weighting,
    "train.objective.loss": _loss,
    "train.objective.loss.delta": _delta,
    "train.objective.loss.schedule": _loss_schedule,
    "train.method.mask": _mask,
    "train.method": _method,
    "train.method.preservation": _preserve,
    "train.samples.every": _samples_every,
    "train.samples.prompts": _prompts,
    "train.samples.seeds": _seeds,
    "train.captions.chunks": _chunks,
    "train.checkpoint_every": _checkpoint_every,
}
"""`step.setting` -> the function that carries an option over to it."""
