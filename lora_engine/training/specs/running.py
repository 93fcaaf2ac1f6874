"""Where and how training computes; nothing here changes what is computed, but for the last bits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Running(BaseModel):
    """Devices, memory and speed; the defaults suit any machine.

    Attributes:
        device: Where training computes; `auto` takes CUDA, else MPS, else the CPU.
        processes: How many work side by side, each on a GPU of its own or all on the CPU; each takes its share of
            every batch, so `batch` must be a multiple.
        gradient_checkpointing: Keeps the network's activations at the borders of its blocks alone and computes the
            rest again in the backward pass: far less memory for about a third more time.
        channels_last: Puts the channels of the convolutions' weights last in memory, which some GPUs prefer.
        attention: `sdpa` is torch's own; `xformers` needs that package.
        compile: `regional` compiles the blocks that the network repeats (`torch.compile`): slow first steps, then
            faster ones; needs a working compiler.
        deterministic: On a GPU, takes only operations that give the same bits every time: slower, and refused where an
            operation has no such form. On a CPU that is always so.
        quantise: How the frozen network is held: `8bit` and `4bit` need far less memory for it and lose a little;
            the adapter is trained in full precision. They need the extra `quantised`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    processes: int = Field(default=1, ge=1, le=1024)
    gradient_checkpointing: bool = False
    channels_last: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    compile: Literal["none", "regional"] = "none"
    deterministic: bool = False
    quantise: Literal["none", "8bit", "4bit"] = "none"
