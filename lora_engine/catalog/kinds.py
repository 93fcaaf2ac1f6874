"""The adapter kinds by name, each with its options. `lora_engine.adapters.kinds` has their `Delta` classes.

In a pipeline file: `kind: lokr`, or with options `kind: {name: lokr, factor: 8}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.registries import Registry

MAX_TERMS = 100
"""Terms of a series that is read from a file or a spec; PEFT's default is 5."""


class KindSpec(BaseModel):
    """A kind and its options, which are passed to the kind's `create`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def options(self) -> dict[str, Any]:
        """Returns every field but the name."""
        return self.model_dump(exclude={"name"})


@dataclass(frozen=True)
class Kind:
    """An adapter kind, one entry of `KINDS`.

    Attributes:
        name: Name in specs, files and on the command line.
        title: Its form, in a few words, for tables.
        delta: `module:class` of its `Delta`.
        spec: Class of its options; None for a kind that exists only in files.
        keys: Its tensor names: key layout -> factor -> suffix; or the module that adds its factor keys to the layouts,
            for names that depend on more than the factor. Empty if its export form is another kind.
        revision: Number in the cache keys of steps that use it; raise it whenever the same inputs give another result.
            0 declares none: the keys then hold the version of its plug-in.
    """

    name: str
    title: str
    delta: str
    spec: type[KindSpec] | None = None
    keys: Mapping[str, Mapping[str, str]] | str = field(default_factory=dict)
    revision: int = 0


KINDS: Registry[Kind] = Registry("adapter kind", entry=Kind, source="lora_engine.catalog.kinds", group="loraline.kinds")
_KEYS = "lora_engine.formats.key_layouts"


class Lora(KindSpec):
    """LoRA; on convolutions LoCon, with `tucker` in Tucker form."""

    name: Literal["lora"] = "lora"
    tucker: bool = False


LORA = Kind("lora", "low-rank difference", "lora_engine.adapters.lora:LoraDelta", Lora, f"{_KEYS}.lora")


class RsLora(KindSpec):
    """rsLoRA: LoRA with scale alpha / sqrt(rank). Files hold it as LoRA with an equivalent alpha."""

    name: Literal["rslora"] = "rslora"
    tucker: bool = False


RSLORA = Kind("rslora", "LoRA with scale alpha / sqrt(rank)", "lora_engine.adapters.rslora:RsLoraDelta", RsLora)


class LoraFa(KindSpec):
    """LoRA-FA: `down` keeps its initial value, only `up` is trained. Files hold it as LoRA."""

    name: Literal["lora-fa"] = "lora-fa"


LORA_FA = Kind("lora-fa", "LoRA with a frozen down", "lora_engine.adapters.lora_fa:LoraFaDelta", LoraFa)


class Pissa(KindSpec):
    """PiSSA: initialized with the base's principal singular vectors. Files hold it as LoRA of twice the rank."""

    name: Literal["pissa"] = "pissa"


PISSA = Kind("pissa", "LoRA that starts from the base's principal part", "lora_engine.adapters.pissa:PissaDelta", Pissa)


class Loha(KindSpec):
    """LoHa: the Hadamard product of two low-rank matrices."""

    name: Literal["loha"] = "loha"
    tucker: bool = False


LOHA = Kind(
    "loha",
    "Hadamard product of two low-rank matrices",
    "lora_engine.adapters.loha:LohaDelta",
    Loha,
    f"{_KEYS}.loha",
)


class Lokr(KindSpec):
    """LoKr: a Kronecker product; `factor` -1 splits dimensions most evenly, `full` keeps both factors full."""

    name: Literal["lokr"] = "lokr"
    factor: int = Field(default=-1, ge=-1, le=65536)
    full: bool = False
    both: bool = False
    tucker: bool = False


LOKR = Kind("lokr", "Kronecker product", "lora_engine.adapters.lokr:LokrDelta", Lokr, f"{_KEYS}.lokr")


LOKR_ROWS = Kind(
    "lokr-rows",
    "rows of a Kronecker product, for a part of a fused layer",
    "lora_engine.adapters.lokr_rows:LokrRowsDelta",
    keys=f"{_KEYS}.lokr",
)


if TYPE_CHECKING:
    Direction = str
else:
    Direction = Literal[tuple(kind.name for kind in (LORA, LOHA, LOKR))]


class Dora(KindSpec):
    """DoRA: an `inner` kind as direction, and a magnitude per row (`output`) or column (`input`) of the weight."""

    name: Literal["dora"] = "dora"
    axis: Literal["output", "input"] = "output"
    inner: Direction = "lora"


DORA = Kind(
    "dora",
    "direction by another kind, and trained magnitudes",
    "lora_engine.adapters.dora:DoraDelta",
    Dora,
    f"{_KEYS}.dora",
)


class Glora(KindSpec):
    """GLoRA: LoRA, and a low-rank change of the weight's inputs."""

    name: Literal["glora"] = "glora"


GLORA = Kind(
    "glora",
    "LoRA, and a low-rank change of the weight's inputs",
    "lora_engine.adapters.glora:GloraDelta",
    Glora,
    f"{_KEYS}.glora",
)


class Ia3(KindSpec):
    """(IA)3 as in LyCORIS: a gain per output (or input) channel; the bias is unchanged."""

    name: Literal["ia3"] = "ia3"
    axis: Literal["output", "input"] = "output"


IA3 = Kind("ia3", "gain per channel, as in LyCORIS", "lora_engine.adapters.ia3:Ia3Delta", Ia3, f"{_KEYS}.ia3")


class PeftIa3(KindSpec):
    """(IA)3 as in PEFT: with axis output, the bias is scaled too."""

    name: Literal["peft-ia3"] = "peft-ia3"
    axis: Literal["output", "input"] = "output"


PEFT_IA3 = Kind(
    "peft-ia3", "gain per channel, as in PEFT", "lora_engine.adapters.ia3:PeftIa3Delta", PeftIa3, f"{_KEYS}.ia3"
)


class Oft(KindSpec):
    """OFT as in LyCORIS (diag-oft): rotates output blocks; rank is the block size, alpha the constraint."""

    name: Literal["oft"] = "oft"
    rescale: bool = False


OFT = Kind("oft", "rotation of output blocks, as in LyCORIS", "lora_engine.adapters.oft:OftDelta", Oft, f"{_KEYS}.oft")


OFT_PARTS = Kind(
    "oft-parts",
    "rotations of the parts of a fused layer, as in kohya's sd-scripts",
    "lora_engine.adapters.oft_parts:OftPartsDelta",
    keys=f"{_KEYS}.oft",
)


class Boft(KindSpec):
    """BOFT as in LyCORIS: butterflies of block rotations of the outputs."""

    name: Literal["boft"] = "boft"
    rescale: bool = False


BOFT = Kind(
    "boft", "butterflies of rotations, as in LyCORIS", "lora_engine.adapters.boft:BoftDelta", Boft, f"{_KEYS}.oft"
)


class PeftOft(KindSpec):
    """OFT as in PEFT (version 2): rotates input blocks; `terms` 0 is exact, `share` uses one block for all."""

    name: Literal["peft-oft"] = "peft-oft"
    terms: int = Field(default=5, ge=0, le=MAX_TERMS)
    share: bool = False


PEFT_OFT = Kind(
    "peft-oft",
    "rotation of input blocks, as in PEFT",
    "lora_engine.adapters.peft_oft:PeftOftDelta",
    PeftOft,
    f"{_KEYS}.oft",
)


class PeftBoft(KindSpec):
    """BOFT as in PEFT."""

    name: Literal["peft-boft"] = "peft-boft"
    butterflies: int = Field(default=1, ge=1, le=32)


PEFT_BOFT = Kind(
    "peft-boft",
    "butterflies of rotations, as in PEFT",
    "lora_engine.adapters.peft_boft:PeftBoftDelta",
    PeftBoft,
    f"{_KEYS}.oft",
)


class Full(KindSpec):
    """A full-rank difference of the weight, and with `train_bias` of the bias; the only kind for norms."""

    name: Literal["full"] = "full"
    train_bias: bool = False


FULL = Kind(
    "full", "full-rank difference of weight and bias", "lora_engine.adapters.full:FullDelta", Full, f"{_KEYS}.full"
)
REPLACEMENT = Kind(
    "replacement",
    "fixed weight instead of the base's, in control adapters",
    "lora_engine.adapters.replacement:ReplacementDelta",
    keys={"LyCORIS": {"value": "set_weight"}},
)
