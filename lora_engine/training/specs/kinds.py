"""The adapter kinds as a person chooses them, each with the options of its own. Torch-free; `adapters` does the work.

In a pipeline file: `kind: lokr`, or with options `kind: {name: lokr, factor: 8}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class KindSpec(BaseModel):
    """A kind and its options; the options go to the kind's `create` as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return self.model_dump(exclude={"name"})


class Lora(KindSpec):
    """LoRA; on convolutions LoCon, with `tucker` in Tucker form."""

    name: Literal["lora"] = "lora"
    tucker: bool = False


class RsLora(KindSpec):
    """rsLoRA: LoRA whose scale is alpha / sqrt(rank). In files it is LoRA with the alpha that says the same."""

    name: Literal["rslora"] = "rslora"
    tucker: bool = False


class LoraFa(KindSpec):
    """LoRA-FA: `down` stays as it began, only `up` is trained. In files it is LoRA."""

    name: Literal["lora-fa"] = "lora-fa"


class Pissa(KindSpec):
    """PiSSA: begins with the base's principal singular vectors. In files it is LoRA of twice the rank."""

    name: Literal["pissa"] = "pissa"


class Dora(KindSpec):
    """DoRA: an `inner` kind in direction, and a magnitude for each row (`output`) or column (`input`) of the weight."""

    name: Literal["dora"] = "dora"
    axis: Literal["output", "input"] = "output"
    inner: Literal["lora", "loha", "lokr"] = "lora"


class Loha(KindSpec):
    """LoHa: the Hadamard product of two low-rank matrices."""

    name: Literal["loha"] = "loha"
    tucker: bool = False


class Lokr(KindSpec):
    """LoKr: a Kronecker product; `factor` -1 splits the dimensions most evenly, `full` leaves both factors whole."""

    name: Literal["lokr"] = "lokr"
    factor: int = Field(default=-1, ge=-1)
    full: bool = False
    both: bool = False
    tucker: bool = False


class Ia3(KindSpec):
    """(IA)3 as LyCORIS has it: a gain for each output (or input) channel; the bias stays."""

    name: Literal["ia3"] = "ia3"
    axis: Literal["output", "input"] = "output"


class PeftIa3(KindSpec):
    """(IA)3 as PEFT has it: on outputs the bias is scaled too."""

    name: Literal["peft-ia3"] = "peft-ia3"
    axis: Literal["output", "input"] = "output"


class Oft(KindSpec):
    """OFT as LyCORIS has it (diag-oft): output blocks are rotated; rank is the block size, alpha the constraint."""

    name: Literal["oft"] = "oft"
    rescale: bool = False


class Boft(KindSpec):
    """BOFT as LyCORIS has it: butterflies of block rotations of the outputs."""

    name: Literal["boft"] = "boft"
    rescale: bool = False


class PeftOft(KindSpec):
    """OFT as PEFT has it (version 2): input blocks are rotated; 0 `terms` is exact, `share` one block for all."""

    name: Literal["peft-oft"] = "peft-oft"
    terms: int = Field(default=5, ge=0)
    share: bool = False


class PeftBoft(KindSpec):
    """BOFT as PEFT has it."""

    name: Literal["peft-boft"] = "peft-boft"
    butterflies: int = Field(default=1, ge=1)


class Full(KindSpec):
    """The whole difference of the weight, and with `train_bias` of the bias; the only kind for norms."""

    name: Literal["full"] = "full"
    train_bias: bool = False


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Kind = Annotated[
    Lora | RsLora | LoraFa | Pissa | Dora | Loha | Lokr | Ia3 | PeftIa3 | Oft | Boft | PeftOft | PeftBoft | Full,
    Field(discriminator="name"),
    BeforeValidator(_named),
]
"""A kind by its name alone, or by its name and options."""
