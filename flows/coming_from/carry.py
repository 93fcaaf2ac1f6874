"""Carries over the options of other trainers whose values need more than a type: images, network, rates, devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flows.coming_from.carry_objective import OF_OBJECTIVE
from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    DTYPES,
    KIND_NAMES,
    OPTIMIZERS,
    PRECISIONS,
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
    translation.set("train.kind", choose(setting, KIND_NAMES, exact=True), setting.name)


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


def _wildcards(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.captions.wildcards", True, setting.name)
        # sd-scripts draws one line of a caption file with it, and reads the first without.
        translation.set("ingest.several_captions", "draw", setting.name)


def _prompt_source(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) in ("sample", "concept"):
        translation.set("ingest.several_captions", "draw", setting.name)


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
    if plain(setting.value) == "pagedadamw8bit":
        translation.set("train.rates.optimiser.paged", True, setting.name)
    if plain(setting.value) in ("adam", "lion8bit", "pagedlion8bit", "ademamix8bit"):
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
        form = "fp8" if "fp8" in setting.name else "8bit"
        translation.set("train.running.quantise", form, setting.name)


def _offload(translation: Translation, setting: Setting) -> None:
    if setting.name == "blocks_to_swap" and not is_off(setting.value):
        raise NoCounterpart("a share of the layers; set running.offload, such as 0.5")
    if number(setting):
        translation.set("train.running.offload", number(setting), setting.name)


def _checkpointing(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value) and plain(setting.value) != "off":
        translation.set("train.running.gradient_checkpointing", True, setting.name)


def carry_epochs(translation: Translation, setting: Setting) -> None:
    """Notes the epochs, which become steps when the images are counted."""
    if number(setting):
        translation.counts["epochs"] = number(setting)
        translation.origins["epochs"] = setting.name


def _kind_factor(translation: Translation, setting: Setting) -> None:
    if number(setting) > 0:
        translation.set("train.kind.factor", integer(setting), setting.name)


def _kind_switch(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        option = "both" if "both" in setting.name else "tucker"
        translation.set(f"train.kind.{option}", True, setting.name)


def _dora(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.counts["dora"] = 1.0


def _device(translation: Translation, setting: Setting) -> None:
    """Leaves the device out: `auto` takes the GPU."""


SPECIAL: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.kind": _kind,
    "train.running.device": _device,
    "train.kind.factor": _kind_factor,
    "train.kind.tucker": _kind_switch,
    "train.kind.both": _kind_switch,
    "train.kind.inner": _dora,
    "train.targets": _targets,
    "preprocess.resolution": _resolution,
    "preprocess.crop": _crop,
    "preprocess.buckets.enlarge": _no_upscale,
    "train.captions.wildcards": _wildcards,
    "ingest.several_captions": _prompt_source,
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
    "train.running.offload": _offload,
    "train.running.gradient_checkpointing": _checkpointing,
    **OF_OBJECTIVE,
}
"""`step.setting` -> the function that carries an option over to it."""
