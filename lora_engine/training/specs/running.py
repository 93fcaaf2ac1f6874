"""Settings of device, memory and speed. They change results in the last bits at most."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
        quantise: Storage of the frozen network: `8bit` and `4bit` save much memory and lose a little precision. The
            adapter is trained in full precision. They need the extra `quantised`.
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
