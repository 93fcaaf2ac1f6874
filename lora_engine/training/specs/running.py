"""Settings of device, memory and speed. They change results in the last bits at most."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.settings import AddedLater

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Running(BaseModel):
    """Devices, memory and speed; the defaults work on any machine.

    Attributes:
        device: Device of the training; `auto` takes CUDA, else MPS, else the CPU.
        processes: Number of data-parallel processes, each on its own GPU or all on the CPU. Each takes its share of
            every batch, so `batch` must be a multiple.
        gradient_checkpointing: Stores activations at block borders only and recomputes the rest in the backward pass:
            far less memory for about a third more time.
        channels_last: Stores the convolutions' weights channels-last, which some GPUs prefer.
        attention: `sdpa` is torch's own; `xformers` needs that package.
        compile: `regional` compiles the network's repeated blocks (`torch.compile`): slow first steps, then faster
            ones. Needs a working compiler.
        deterministic: On a GPU, uses only deterministic operations: slower, and an error where an operation has no
            deterministic form. A CPU is always deterministic.
        quantise: Storage of the linear layers in the frozen network: `fp8`, `8bit` and `4bit` save much memory and
            lose a little precision. The adapter is trained in full precision. `8bit` and `4bit` need the extra
            `quantised`.
        offload: Share of these layers, from the last, whose weights stay in the CPU's memory and are copied to the
            GPU block by block, each while the one before it computes: less memory, more time. Two blocks are on the
            GPU. The numbers are the same up to rounding. With quantise `none` and `fp8`.
        shard: Splits the frozen network among the processes (FSDP): each keeps a share of its weights and gathers those
            of a block while it computes. For bases that do not fit one GPU. Not with quantise, offload and compile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    processes: int = Field(default=1, ge=1, le=1024)
    gradient_checkpointing: bool = False
    channels_last: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    compile: Literal["none", "regional"] = "none"
    deterministic: bool = False
    quantise: Literal["none", "8bit", "4bit", "fp8"] = "none"
    offload: Annotated[float, AddedLater()] = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)

    shard: Annotated[bool, AddedLater()] = False

    @model_validator(mode="after")
    def _shards_are_of_plain_weights(self) -> Running:
        if self.shard and self.processes == 1:
            raise ValueError("shard splits the network among processes; set processes to the number of GPUs")
        for name, unset in (("quantise", "none"), ("offload", 0.0), ("compile", "none")):
            if self.shard and getattr(self, name) != unset:
                raise ValueError(f"shard does not go with {name}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _offloaded_weights_have_a_form(self) -> Running:
        if self.offload and self.quantise not in ("none", "fp8"):
            raise ValueError(f"offload goes with quantise none and fp8, not with {self.quantise!r}; choose one of them")
        return self
