"""Settings of the adapter kinds, each with its own options. Torch-free; `adapters` implements them.

In a pipeline file: `kind: lokr`, or with options `kind: {name: lokr, factor: 8}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class KindSpec(BaseModel):
    """A kind and its options, which are passed to the kind's `create`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def options(self) -> dict[str, Any]:
        """Returns every field but the name."""
        return self.model_dump(exclude={"name"})


class Lora(KindSpec):
    """LoRA; on convolutions LoCon, with `tucker` in Tucker form."""

    name: Literal["lora"] = "lora"
    tucker: bool = False


class RsLora(KindSpec):
    """rsLoRA: LoRA with scale alpha / sqrt(rank). Files hold it as LoRA with an equivalent alpha."""

    name: Literal["rslora"] = "rslora"
    tucker: bool = False


class LoraFa(KindSpec):
    """LoRA-FA: `down` keeps its initial value, only `up` is trained. Files hold it as LoRA."""

    name: Literal["lora-fa"] = "lora-fa"


class Pissa(KindSpec):
    """PiSSA: initialized with the base's principal singular vectors. Files hold it as LoRA of twice the rank."""

    name: Literal["pissa"] = "pissa"


class Dora(KindSpec):
    """DoRA: an `inner` kind as direction, and a magnitude per row (`output`) or column (`input`) of the weight."""

    name: Literal["dora"] = "dora"
    axis: Literal["output", "input"] = "output"
    inner: Literal["lora", "loha", "lokr"] = "lora"


class Loha(KindSpec):
    """LoHa: the Hadamard product of two low-rank matrices."""

    name: Literal["loha"] = "loha"
    tucker: bool = False


class Lokr(KindSpec):
    """LoKr: a Kronecker product; `factor` -1 splits dimensions most evenly, `full` keeps both factors full."""

    name: Literal["lokr"] = "lokr"
    factor: int = Field(default=-1, ge=-1)
    full: bool = False
    both: bool = False
    tucker: bool = False


class Ia3(KindSpec):
    """(IA)3 as in LyCORIS: a gain per output (or input) channel; the bias is unchanged."""

    name: Literal["ia3"] = "ia3"
    axis: Literal["output", "input"] = "output"


class PeftIa3(KindSpec):
    """(IA)3 as in PEFT: with axis output, the bias is scaled too."""

    name: Literal["peft-ia3"] = "peft-ia3"
    axis: Literal["output", "input"] = "output"


class Oft(KindSpec):
    """OFT as in LyCORIS (diag-oft): rotates output blocks; rank is the block size, alpha the constraint."""

    name: Literal["oft"] = "oft"
    rescale: bool = False


class Boft(KindSpec):
    """BOFT as in LyCORIS: butterflies of block rotations of the outputs."""

    name: Literal["boft"] = "boft"
    rescale: bool = False


class PeftOft(KindSpec):
    """OFT as in PEFT (version 2): rotates input blocks; `terms` 0 is exact, `share` uses one block for all."""

    name: Literal["peft-oft"] = "peft-oft"
    terms: int = Field(default=5, ge=0)
    share: bool = False


class PeftBoft(KindSpec):
    """BOFT as in PEFT."""

    name: Literal["peft-boft"] = "peft-boft"
    butterflies: int = Field(default=1, ge=1)


class Full(KindSpec):
    """A full-rank difference of the weight, and with `train_bias` of the bias; the only kind for norms."""

    name: Literal["full"] = "full"
    train_bias: bool = False


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Kind = Annotated[
    Lora | RsLora | LoraFa | Pissa | Dora | Loha | Lokr | Ia3 | PeftIa3 | Oft | Boft | PeftOft | PeftBoft | Full,
    Field(discriminator="name"),
    BeforeValidator(_from_name),
]
"""A kind: its name, or its name and options."""
