"""PEFT's and LyCORIS' modules beside ours on the layers of the laws: how each is built, and which cells a peer lacks.

A new kind, type of layer or form of a peer gets its cells from its entry in a table. `EXCEPTIONS` lists what a peer
cannot do, and the matrix checks that it still cannot.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from law_adapters import LAYERS, MATRICES, layer_of
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, module_shapes
from lora_engine.formats import codecs, read_adapter

NORMS = tuple(name for name in LAYERS if name not in MATRICES)
PLAIN = ("linear", "linear without bias", "conv 1x1")


@dataclass(frozen=True)
class Form:
    """One form of a kind in a peer.

    Attributes:
        kind: Name of our kind.
        make: LyCORIS' class, or PEFT's configuration for the names of the modules.
        options: Options of LyCORIS' class.
        layers: Names of layers; a kind's first form has all.
        gradients: Ratio of PEFT's gradient to ours by our factor; None means that they differ.
        half: Half strength in the peer: "same" as ours, "other", or "" if the peer has no strength.
        alters_alpha: True if the file's alpha has no meaning and we write another one.
    """

    kind: str
    make: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: Collection[str] = tuple(LAYERS)
    gradients: Mapping[str, float | None] = field(default_factory=dict)
    half: str = "same"
    alters_alpha: bool = False

    @property
    def read_as(self) -> str:
        """Name of the kind that we read from a file of this form."""
        return "lora" if self.kind == "rslora" else self.kind


@dataclass(frozen=True)
class Exception_:
    """Cells that deviate from parity.

    Attributes:
        form: Pattern of a form's name.
        layers: Names of layers.
        kind: "refused" by the peer, "unread" by us, "weight" if the peer's output differs from its own merged weight,
            or "output" if the peer cannot merge.
        match: Pattern of the error; None if a wrong output raises no error.
    """

    peer: str
    form: str
    layers: Collection[str]
    kind: str
    match: str | None = None


# Further forms of the factors beside the kind's first one; they do not change how the weight is applied.
SOME = {"layers": ("linear", "linear without bias", "conv 3x3", "conv 1x1", "conv grouped")}
LYCORIS = {
    "lora": Form("lora", LoConModule),
    "lora tucker": Form("lora", LoConModule, {"use_tucker": True}, **SOME),
    "rslora": Form("rslora", LoConModule, {"lora_dim": 3, "alpha": 2.0, "rs_lora": True}),
    "loha": Form("loha", LohaModule),
    "loha tucker": Form("loha", LohaModule, {"use_tucker": True}, **SOME),
    "lokr": Form("lokr", LokrModule),
    "lokr both": Form("lokr", LokrModule, {"decompose_both": True}, **SOME),
    "lokr full": Form("lokr", LokrModule, {"full_matrix": True}, alters_alpha=True, **SOME),
    "lokr tucker factor": Form("lokr", LokrModule, {"use_tucker": True, "factor": 4}, **SOME),
    "glora": Form("glora", GLoRAModule),
    "ia3": Form("ia3", IA3Module),
    "ia3 on input": Form("ia3", IA3Module, {"train_on_input": True}, **SOME),
    "oft": Form("oft", DiagOFTModule, {"lora_dim": 2}),
    "oft rescaled": Form("oft", DiagOFTModule, {"lora_dim": 2, "rescaled": True}, half="other", **SOME),
    "oft constrained": Form("oft", DiagOFTModule, {"lora_dim": 2, "constraint": 0.05}, **SOME),
    "boft": Form("boft", ButterflyOFTModule, {"lora_dim": 6}, half="other"),
    "boft rescaled": Form("boft", ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}, half="other", **SOME),
    "boft constrained": Form("boft", ButterflyOFTModule, {"lora_dim": 6, "constraint": 0.05}, half="other", **SOME),
    "full": Form("full", FullModule, layers=MATRICES),
    "full of a norm": Form("full", NormModule, layers=NORMS),
}
# LyCORIS lets gradients through DoRA's norm, which the paper detaches (section 4.3), as PEFT does and we do.
LYCORIS |= {
    f"dora of {name} on {axis}": replace(
        form,
        kind="dora",
        options={**form.options, "weight_decompose": True, "wd_on_out": axis == "output"},
        layers=tuple(LAYERS) if (name, axis) == ("lora", "output") else SOME["layers"],
        half="other",
    )
    for axis in ("output", "input")
    for name, form in LYCORIS.items()
    if form.kind in ("lora", "loha", "lokr")
}
_OFT = {"layers": (*PLAIN, "embedding"), "half": ""}
PEFT = {
    "lora": Form("lora", lambda t: LoraConfig(r=4, lora_alpha=6, target_modules=t, init_lora_weights=False)),
    "lora with bias": Form(
        "lora",
        lambda t: LoraConfig(r=4, lora_alpha=6, target_modules=t, init_lora_weights=False, lora_bias=True),
        layers=[name for name in MATRICES if name != "embedding"],
        gradients={"bias": 4 / 6},  # PEFT scales the bias of `lora_B`
    ),
    "rslora": Form(
        "rslora", lambda t: LoraConfig(r=4, lora_alpha=6, target_modules=t, init_lora_weights=False, use_rslora=True)
    ),
    "dora": Form(
        "dora",
        lambda t: LoraConfig(r=4, lora_alpha=6, target_modules=t, init_lora_weights=False, use_dora=True),
        half="other",
    ),
    "loha": Form("loha", lambda t: LoHaConfig(r=2, alpha=5, target_modules=t, init_weights=False)),
    "loha cores": Form(
        "loha",
        lambda t: LoHaConfig(r=2, alpha=5, target_modules=t, init_weights=False, use_effective_conv2d=True),
        gradients={"up1": None, "up2": None},
    ),
    "lokr": Form("lokr", lambda t: LoKrConfig(r=1, alpha=5, target_modules=t, init_weights=False)),
    "lokr whole": Form(
        "lokr",
        lambda t: LoKrConfig(r=50, alpha=7, target_modules=t, init_weights=False),
        gradients={"left": 50 / 7},  # we fold the scale into the left factor
    ),
    "lokr both": Form(
        "lokr", lambda t: LoKrConfig(r=1, alpha=5, target_modules=t, init_weights=False, decompose_both=True)
    ),
    "lokr core": Form(
        "lokr",
        lambda t: LoKrConfig(
            r=1, alpha=5, target_modules=t, init_weights=False, use_effective_conv2d=True, decompose_factor=4
        ),
        layers=("linear", "conv 3x3", "conv 1x1", "conv grouped"),
    ),
    "ia3": Form("peft-ia3", lambda t: IA3Config(target_modules=t, feedforward_modules=[]), half=""),
    "ia3 on inputs": Form(
        "peft-ia3", lambda t: IA3Config(target_modules=t, feedforward_modules=[n for n in t if n != "linear"]), half=""
    ),
    "oft": Form("peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=4), half=""),
    "oft exact": Form(
        "peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=4, use_cayley_neumann=False), **_OFT
    ),
    "oft two terms": Form(
        "peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=4, num_cayley_neumann_terms=2), **_OFT
    ),
    "oft three terms": Form(
        "peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=2, num_cayley_neumann_terms=3), **_OFT
    ),
    "oft seven terms": Form(
        "peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=4, num_cayley_neumann_terms=7), **_OFT
    ),
    "oft constrained": Form(
        "peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=4, coft=True, eps=0.3), **_OFT
    ),
    "oft shared": Form("peft-oft", lambda t: OFTConfig(target_modules=t, oft_block_size=2, block_share=True), **_OFT),
    "boft": Form("peft-boft", lambda t: BOFTConfig(target_modules=t, boft_block_size=4), half=""),
}
FORMS = {"lycoris": LYCORIS, "peft": PEFT}

_TRAINING_ALONE = "exists for training alone; in files it is a LoRA"
UNCOMPARED = {
    "lycoris": {
        **dict.fromkeys(("peft-ia3", "peft-oft", "peft-boft"), "is what PEFT means by the name"),
        **dict.fromkeys(("lora-fa", "pissa"), _TRAINING_ALONE),
        "replacement": "is of control adapters; LyCORIS has differences alone",
        "lokr-rows": "is a part of a fused layer; LyCORIS has whole layers",
        "oft-parts": "is of kohya's sd-scripts",
    },
    "peft": {
        **dict.fromkeys(("ia3", "oft", "boft"), "is what LyCORIS means by the name"),
        "glora": "is of LyCORIS; PEFT has none",
        "lora-fa": _TRAINING_ALONE,
        "pissa": f"{_TRAINING_ALONE}: see test_pissa_trains_as_pefts_does_after_its_own_conversion_to_lora",
        "full": "PEFT's files hold whole modules (modules_to_save), no differences",
        "replacement": "is of control adapters; PEFT has none",
        "lokr-rows": "is a part of a fused layer; PEFT has whole layers",
        "oft-parts": "is of kohya's sd-scripts",
    },
}
"""Kinds that a peer does not have, with the reason."""

EXCEPTIONS = [
    Exception_("lycoris", "full of a norm", ("rms norm", "rms norm of diffusers"), "refused", "empty sequence"),
    Exception_("lycoris", "[!f]*", (*NORMS, "embedding"), "refused", "not supported in"),
    Exception_("lycoris", "full", ("embedding",), "refused", "not supported in"),
    Exception_("lycoris", "ia3 on input", ("conv grouped",), "refused", "must match the size"),
    Exception_("lycoris", "glora", ("conv grouped",), "refused", "is invalid for input"),
    # LyCORIS always pads with zeros.
    Exception_("lycoris", "*", ("conv circular",), "weight"),
    Exception_("peft", "*", NORMS, "refused", "not supported"),
    Exception_("peft", "dora", ("embedding",), "unread", "rank is not that of"),
    Exception_("peft", "lo[hk]*", ("embedding",), "refused", "not supported"),
    Exception_("peft", "ia3*", ("embedding",), "refused", "not supported"),
    Exception_("peft", "boft", ("embedding",), "refused", "not supported"),
    # PEFT's second factor has a share of the rank for each group, which is not a low rank of the weight.
    *(
        Exception_("peft", form, ("conv grouped",), "unread", "rank is not that of")
        for form in ("lora*", "rslora", "dora")
    ),
    Exception_("peft", "boft", ("conv grouped",), "refused", "groups > 1"),
    # A group's inputs share their columns of the weight, so a gain for each input is no change of the weight.
    Exception_("peft", "ia3 on inputs", ("conv grouped",), "unread", "4 values"),
    Exception_("peft", "oft", ("conv grouped",), "unread", "18 blocks"),
    Exception_("peft", "oft", ("conv dilated",), "refused", "dilation > 1"),
    # PEFT takes the kernel for a square.
    Exception_("peft", "boft", ("conv oblong",), "unread", "rotates 4 inputs"),
    Exception_("peft", "oft", ("conv oblong",), "refused", "is invalid for input"),
    # Even an untrained one changes the output: PEFT cuts the image into patches and adds up overlaps.
    Exception_("peft", "oft", ("conv 3x3", "conv strided", "conv circular"), "weight"),
    Exception_("peft", "boft", ("conv dilated",), "weight", "Invalid padding string"),
    Exception_("peft", "lora with bias", ("conv dilated",), "refused", "Impossible to merge"),
    Exception_("peft", "lora with bias", ("linear without bias",), "output", "Impossible to merge"),
    # PEFT's convolution between the factors has neither the layer's dilation nor its padding mode.
    *(Exception_("peft", form, ("conv dilated", "conv circular"), "weight") for form in ("lora*", "rslora", "dora")),
    *(Exception_("peft", form, ("conv circular",), "weight") for form in ("lo[hk]*", "boft")),
]


def exception_of(peer: str, form: str, layer: str) -> Exception_ | None:
    """Returns the first exception that matches a cell; None if there is none."""
    return next(
        (item for item in EXCEPTIONS if item.peer == peer and fnmatchcase(form, item.form) and layer in item.layers),
        None,
    )


@dataclass
class Pair:
    """A peer's module on a layer, and our delta with the same factors.

    Attributes:
        layer: The layer, without an adapter.
        delta: Our delta, read from the peer's saved tensors.
        tensors: The peer's saved tensors by the names of our stored format; empty for PEFT, which saves folders.
        call: The peer's output.
        half: The peer's output at half its strength.
        weight: The peer's merged weight.
        bias: The peer's merged bias, None if there is none.
        parameters: The peer's parameters by our factors.
        module: The peer's module.
    """

    layer: nn.Module
    delta: Delta
    tensors: dict[str, Tensor]
    call: Callable[[Tensor], Tensor]
    half: Callable[[Tensor], Tensor]
    weight: Callable[[], tuple[Tensor, Tensor | None]]
    parameters: Callable[[], dict[str, Tensor]]
    module: nn.Module


def pair_of(peer: str, form: str, layer: str) -> Pair:
    """Returns a cell of the matrix.

    Raises:
        Exception: The peer does not have the cell, or its file is not read.
    """
    return lycoris_pair(form, layer) if peer == "lycoris" else peft_pair(form, layer)


# Kinds whose parameters have other names than the tensors in files.
_LYCORIS_NAMES = {"scale": "weight", "blocks": "oft_blocks", "rescale": "rescale", "diff": "weight", "bias": "bias"}
_NORM_NAMES = {"diff": "w_norm", "bias": "b_norm"}


@cache
def lycoris_pair(form: str, layer_name: str) -> Pair:
    """Returns LyCORIS' module on a layer, with random factors, and our delta."""
    entry = LYCORIS[form]
    layer = layer_of(layer_name)
    plain = copy.deepcopy(layer).requires_grad_(False)
    options = {"multiplier": 1.0, "lora_dim": 1, "alpha": 0.5, **entry.options}
    peer_module = entry.make("unet_layer", layer, **({} if entry.make is NormModule else options))
    for name, parameter in list(peer_module.named_parameters()):
        if name == "dora_scale":
            peer_module.dora_scale = nn.Parameter(parameter.detach() * 1.3)  # must stay a parameter after the cast
        else:
            nn.init.normal_(parameter, std=0.3)
    tensors = lycoris_tensors(peer_module)
    delta = codecs["loraline"].decode(tensors, {}).modules["unet.layer"]
    with torch.no_grad():
        merged = lycoris_weight(peer_module, plain)
    peer_module.apply_to()

    def half(x: Tensor) -> Tensor:
        peer_module.multiplier = 0.5
        try:
            return layer(x)
        finally:
            peer_module.multiplier = 1.0

    def parameters() -> dict[str, Tensor]:
        inner = re.findall(r"\w+", form)[2] if entry.kind == "dora" else entry.read_as
        names: Mapping[str, str] = _NORM_NAMES if entry.make is NormModule else _LYCORIS_NAMES
        if inner in ("lora", "loha", "lokr", "glora"):
            names = {**codecs["loraline"].key_layout.factor_keys[inner].names, "magnitude": "dora_scale"}
        live = dict(peer_module.named_parameters())
        return {factor: live[names[factor]] for factor in delta.factors()}

    return Pair(plain, delta, tensors, layer, half, lambda: merged, parameters, peer_module)


def lycoris_tensors(peer_module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that LyCORIS saves for a module, under our module name."""
    if isinstance(peer_module, FullModule):  # stores the difference until it is applied
        bias = {} if peer_module.bias is None else {"diff_b": peer_module.bias}
        tensors = {"diff": peer_module.weight, **bias}
    else:
        tensors = {key: value for key, value in peer_module.state_dict().items() if key != "scalar"}
    return {f"unet.layer.{key}": value.detach().clone() for key, value in tensors.items()}


def lycoris_weight(peer_module: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias that LyCORIS trains.

    Its merge of LoHa and LoKr has alpha / rank twice, which a test of its own pins.
    """
    shape = layer.weight.shape
    if isinstance(peer_module, LohaModule | LokrModule):
        weight = layer.weight + peer_module.get_weight(shape)
        return (peer_module.apply_weight_decompose(weight) if peer_module.wd else weight), getattr(layer, "bias", None)
    weight, bias = peer_module.get_merged_weight(1.0, shape)
    return weight.reshape(shape), getattr(layer, "bias", None) if bias is None else bias


def slug(layer: str) -> str:
    """Returns a layer's name as that of a module; an embedding is known by its name in PEFT's files."""
    return "token_embedding" if layer == "embedding" else layer.replace(" ", "_")


def model_of(layers: Collection[str]) -> nn.ModuleDict:
    """Returns a model of these layers."""
    return nn.ModuleDict({slug(layer): layer_of(layer) for layer in layers})


def compared(peer: str, form: str) -> list[str]:
    """Returns the layers of a form that both sides support."""
    exceptions = {layer: exception_of(peer, form, layer) for layer in FORMS[peer][form].layers}
    return [layer for layer, item in exceptions.items() if item is None or item.kind in ("weight", "output")]


def peft_model(form: str, layers: Collection[str]) -> nn.Module:
    """Returns PEFT's model of these layers with random factors."""
    with torch.random.fork_rng():
        model = get_peft_model(model_of(layers), PEFT[form].make([slug(layer) for layer in layers]))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    around = parameter if "magnitude" in key else float("ia3_l" in key or "boft_s" in key)
                    parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return model


def peft_folder(form: str, layers: Collection[str], folder: Path) -> Path:
    """Saves a model of these layers with PEFT and returns the folder."""
    peft_model(form, layers).save_pretrained(folder)
    return folder


def read_folder(model: nn.Module, layers: Collection[str]) -> Adapter:
    """Returns our adapter from a folder that PEFT saved."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_adapter(Path(folder), module_shapes({"unet": model_of(layers)}))[0]


@cache
def peft_side(form: str) -> tuple[nn.Module, Adapter, dict[str, Tensor]]:
    """Returns PEFT's model of all layers that are compared, our adapter of the same factors, and PEFT's factors.

    The last are copies, since constrained OFT changes its own when it is called.
    """
    layers = compared("peft", form)
    model = peft_model(form, layers)
    factors = {key: value.clone() for key, value in model.state_dict().items() if "default" in key}
    return model, read_folder(model, layers), factors


_PEFT_NAMES = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_B.bias": "bias",
    "lora_embedding_A": "up",
    "lora_embedding_B": "down",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "scale",
    "oft_R": "angles",
    "oft_embedding_R": "angles",
    "boft_R": "blocks",
    "boft_s": "scale",
}


def peft_pair(form: str, layer_name: str) -> Pair:
    """Returns PEFT's module on a layer, with random factors, and our delta."""
    if layer_name in compared("peft", form):
        model, adapter, _ = peft_side(form)
    else:
        model = peft_model(form, [layer_name])
        adapter = read_folder(model, [layer_name])
    peer_module = model.base_model.model[slug(layer_name)]
    kind = PEFT[form].kind

    def half(x: Tensor) -> Tensor:
        weaker = copy.deepcopy(peer_module)
        weaker.set_scale("default", 0.5)  # `scale_layer` skips embeddings
        return weaker(x)

    def weight() -> tuple[Tensor, Tensor | None]:
        merged = copy.deepcopy(peer_module)
        merged.merge()
        return merged.base_layer.weight, getattr(merged.base_layer, "bias", None)

    def parameters() -> dict[str, Tensor]:
        factors = {}
        for key, parameter in peer_module.named_parameters():
            if not key.startswith("base_layer."):
                name = key.replace(".default", "").removesuffix(".weight")
                factor = _PEFT_NAMES.get(name) or codecs["peft"].key_layout.factor_keys[kind].factor(name)
                factors[factor] = parameter
        return factors

    delta = adapter.modules[f"unet.{slug(layer_name)}"]
    return Pair(
        layer_of(layer_name).requires_grad_(False), delta, {}, peer_module, half, weight, parameters, peer_module
    )
