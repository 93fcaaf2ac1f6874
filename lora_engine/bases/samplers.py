"""Names of samplers in sd-scripts, A1111's web UI and diffusers. Torch-free.

The names of the three differ; `find_sampler` takes any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_engine.errors import SettingsError, did_you_mean


@dataclass(frozen=True)
class Sampler:
    """A sampler of diffusion models.

    Attributes:
        scheduler: Class in diffusers.
        options: Its options beside the base's settings.
        draws_noise: True if its steps add noise.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    draws_noise: bool = False


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": Sampler("EulerDiscreteScheduler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", draws_noise=True),
    "heun": Sampler("HeunDiscreteScheduler"),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler"),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler"),
    "dpmsolver++_karras": Sampler("DPMSolverMultistepScheduler", _KARRAS),
    "dpmsolver++_sde": Sampler("DPMSolverMultistepScheduler", _SDE, draws_noise=True),
    "dpmsolver++_sde_karras": Sampler("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}, draws_noise=True),
    "unipc": Sampler("UniPCMultistepScheduler"),
}
"""Names as in sd-scripts, where it has the sampler."""
_OTHERS: Mapping[str, str] = {
    "plms": "pndm",
    "dpm++_2m": "dpmsolver++",
    "dpm++_2m_karras": "dpmsolver++_karras",
    "dpm++_2m_sde": "dpmsolver++_sde",
    "dpm++_2m_sde_karras": "dpmsolver++_sde_karras",
    "dpm++_2s": "dpmsingle",
    # The first sampler of a class has its name.
    **{sampler.scheduler.lower(): name for name, sampler in reversed(list(SAMPLERS.items()))},
}


def find_sampler(name: str) -> Sampler:
    """Returns a sampler by its name in sd-scripts (`euler_a`), A1111 (`Euler a`) or diffusers (its class).

    Raises:
        SettingsError: It is unknown.
    """
    plain = "_".join(name.strip().lower().split()).removeprefix("k_")
    plain = _OTHERS.get(plain, plain)
    if plain not in SAMPLERS:
        raise SettingsError(
            f"unknown sampler {name[:60]!r}",
            allowed=", ".join(SAMPLERS),
            remedy=did_you_mean(plain, list(SAMPLERS), "choose one of them"),
        )
    return SAMPLERS[plain]
