"""Carries over which layers other trainers adapt, and by which kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import KIND_NAMES, NoCounterpart, choose, integer, is_off, number, plain, truth

_LYCORIS: Mapping[str, str] = {"full": "all", "fulllin": "linear", "attnmlp": "attention+ff", "attnonly": "attention"}
"""`preset` of LyCORIS -> targets."""
_ONE_TRAINER: Mapping[str, str] = {"full": "all", "blocks": "all", "attnmlp": "attention+ff", "attnonly": "attention"}
"""`layer_filter_preset` of OneTrainer -> targets."""
_TARGETS = {"sd": "attention+ff", "diffusers": "attention", "aitk": "attention+ff", "ot": "all"}
_TRAIN_TEXT = {"sd", "ot"}
"""Trainers that adapt the text encoders unless an option says otherwise."""
_NO_RANK = ("ia3", "full")
_WIDE_CONVOLUTIONS = r"re:unet\..*\.conv[12]?"
"""Names of the convolutions of 3 x 3, to which `conv_dim` applies."""


def _kind(translation: Translation, setting: Setting) -> None:
    if setting.name == "algo" or plain(setting.value) == "lycoris.kohya":
        translation.counts["lycoris"] = 1.0
    if plain(setting.value) in ("lycoris.kohya", ""):
        return  # `algo` says which
    translation.set("train.kind", choose(setting, KIND_NAMES, exact=True), setting.name)


def _factor(translation: Translation, setting: Setting) -> None:
    if number(setting) > 0:
        translation.set("train.kind.factor", integer(setting), setting.name)


def _switch(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        option = "both" if "both" in setting.name else "tucker"
        translation.set(f"train.kind.{option}", True, setting.name)


def _dora(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.counts["dora"] = 1.0


def _targets(translation: Translation, setting: Setting) -> None:
    flags, name = translation.counts, setting.name
    if name in ("preset", "layer_filter_preset"):
        names = _LYCORIS if name == "preset" else _ONE_TRAINER
        if not is_off(setting.value) and plain(setting.value) != "custom":
            translation.set("train.targets", choose(setting, names), name)
        return
    if name == "lora_layers" and isinstance(setting.value, str):
        parts = [part.strip() for part in setting.value.split(",") if part.strip()]
        translation.set("train.targets", [f"*.{part}" for part in parts], name)
        return
    if name in ("layer_filter", "layer_filter_regex"):  # the patterns of the preset, or others without one
        if name == "layer_filter" and not is_off(setting.value):
            translation.texts["layer filter"] = str(setting.value)
        return
    if name in ("lora_layers", "network.network_kwargs"):
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


def _convolutions(translation: Translation, setting: Setting) -> None:
    """Notes the rank and alpha of convolutions of 3 x 3."""
    if setting.name not in ("conv_dim", "conv_alpha", "network.conv", "network.conv_alpha"):
        raise NoCounterpart('set `overrides` by pattern, such as "unet.mid_block.*": {rank: 4}')
    if not is_off(setting.value):
        if setting.name.endswith("alpha"):
            translation.counts["conv alpha"] = number(setting)
        else:
            translation.counts["conv rank"] = integer(setting)
            usual = 1.0 if setting.name == "conv_dim" else number(setting)
            translation.counts.setdefault("conv alpha", usual)


def set_layers(translation: Translation, trainer: str) -> None:
    """Completes the targets, the kind and the overrides.

    Args:
        translation: The settings; its `counts` say whether the base has a U-Net or is a flow.
        trainer: A key of `TRAINERS`.
    """
    flags = translation.counts
    if "unet" not in flags or translation.get("train.kind") in _NO_RANK:
        flags.pop("conv rank", None)
    patterns = translation.texts.get("layer filter")
    if patterns is not None and translation.get("train.targets") in (None, "all"):
        translation.drop(Setting("layer_filter", patterns, ""), "write the patterns into targets yourself")
    targets = [] if "no_network" in flags else _network_targets(translation, trainer)
    if "no_text" not in flags and (trainer in _TRAIN_TEXT or "text" in flags):
        targets.append("text")
    if "text" not in targets and translation.get("train.rates.text") is not None:
        translation.steps["train"]["rates"].pop("text")
    targets = targets or _network_targets(translation, trainer)
    origin = translation.origins.get("train.targets", "the layers that are adapted")
    translation.set("train.targets", targets[0] if len(targets) == 1 else targets, origin)
    _set_convolutions(translation)
    if "dora" in flags:
        inner = translation.name_of("train.kind") or "lora"
        translation.set("train.kind", {"name": "dora", "inner": inner}, "decomposed weights")


def drop_unsuited(translation: Translation) -> None:
    """Drops the regularization that the kind of the adapter lacks here; its layers have no plain `up @ down`."""
    is_plain = translation.name_of("train.kind") in (None, "lora", "rslora", "lora-fa")
    if is_plain and not translation.get("train.kind.tucker"):
        return
    for key in ("rank_dropout", "norm_limit"):
        translation.remove(f"train.{key}", "for kinds lora, rslora and lora-fa without tucker")


def _network_targets(translation: Translation, trainer: str) -> list[str]:
    """Returns the layers of the denoiser: those of an option, or the trainer's own."""
    flags, chosen = translation.counts, translation.get("train.targets")
    if chosen is not None:
        return list(chosen) if isinstance(chosen, list) else [chosen]
    if trainer in ("sd", "aitk") and "flow" in flags:
        return ["linear"]
    if trainer == "diffusers" and "flux" in flags:
        return ["attention", "transformer.*.ff*.net.*"]
    if "lycoris" in flags or "conv rank" in flags:
        return ["all"]
    if trainer == "sd" and "unet" in flags:
        return ["attention+ff", "unet.*.proj_in", "unet.*.proj_out"]
    return [_TARGETS[trainer]]


def _set_convolutions(translation: Translation) -> None:
    flags = translation.counts
    if "conv rank" in flags and "all" in translation.steps["train"]["targets"]:
        override = {"rank": int(flags["conv rank"]), "alpha": flags["conv alpha"]}
        translation.set("train.overrides", {_WIDE_CONVOLUTIONS: override}, "conv_dim, conv_alpha")


OF_LAYERS: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.kind": _kind,
    "train.kind.factor": _factor,
    "train.kind.tucker": _switch,
    "train.kind.both": _switch,
    "train.kind.inner": _dora,
    "train.targets": _targets,
    "train.overrides": _convolutions,
}
"""`step.setting` -> the function that carries an option over to it."""
