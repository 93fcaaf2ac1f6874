"""Names of samplers and schedule types in sd-scripts, A1111's web UI and diffusers. Torch-free.

The names of the three differ; `find_sampler` takes any of them. Schedule types are mapped to options of diffusers as in
the table of its documentation (api/schedulers/overview).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from lora_engine.errors import SettingsError, did_you_mean


@dataclass(frozen=True)
class Sampler:
    """A sampler of diffusion models.

    Attributes:
        scheduler: Class in diffusers.
        options: Its options beside the base's settings.
        draws_noise: True if its steps add noise.
        title: Name in A1111's web UI, or in diffusers if A1111 lacks it.
        automatic: Schedule type that A1111 takes for `Automatic`; empty leaves the base's timesteps.
        takes_sigmas: True if the class has the schedule types Karras, Exponential and Beta.
        takes_spacing: True if it has those that space the timesteps.
        flow: Class in diffusers that does the same for flow matching; empty if there is none.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    draws_noise: bool = False
    title: str = ""
    automatic: str = ""
    takes_sigmas: bool = True
    takes_spacing: bool = True
    flow: str = ""


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_MULTI, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_PLAIN: Mapping[str, Any] = {"takes_sigmas": False}
_NOISY: Mapping[str, Any] = {"draws_noise": True}
SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", title="DDIM", **_PLAIN),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, title="PLMS", **_PLAIN),
    "euler": Sampler("EulerDiscreteScheduler", title="Euler", flow="FlowMatchEulerDiscreteScheduler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", title="Euler a", **_PLAIN, **_NOISY),
    "heun": Sampler("HeunDiscreteScheduler", title="Heun", flow="FlowMatchHeunDiscreteScheduler"),
    "lms": Sampler("LMSDiscreteScheduler", title="LMS"),
    "dpm2": Sampler("KDPM2DiscreteScheduler", title="DPM2", automatic="karras"),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", title="DPM2 a", automatic="karras", **_NOISY),
    "dpmsolver++": Sampler(_MULTI, title="DPM++ 2M", automatic="karras", flow=_MULTI),
    "dpmsolver++_sde": Sampler(_MULTI, _SDE, title="DPM++ 2M SDE", automatic="exponential", **_NOISY),
    "dpmsolver++_sde_heun": Sampler(
        _MULTI, {**_SDE, "solver_type": "heun"}, title="DPM++ 2M SDE Heun", automatic="exponential", **_NOISY
    ),
    "dpmsolver++_3m_sde": Sampler(
        _MULTI, {**_SDE, "solver_order": 3}, title="DPM++ 3M SDE", automatic="exponential", **_NOISY
    ),
    "dpmsingle": Sampler(_SINGLE, title="DPM++ 2S", automatic="karras", takes_spacing=False),
    "dpmsingle_sde": Sampler(_SINGLE, _SDE, title="DPM++ SDE", automatic="karras", takes_spacing=False, **_NOISY),
    "unipc": Sampler("UniPCMultistepScheduler", title="UniPC", flow="UniPCMultistepScheduler"),
    "lcm": Sampler("LCMScheduler", title="LCM", flow="FlowMatchLCMScheduler", **_PLAIN, **_NOISY),
    "deis": Sampler("DEISMultistepScheduler", title="DEIS", flow="DEISMultistepScheduler"),
    "ddpm": Sampler("DDPMScheduler", title="DDPM", **_PLAIN, **_NOISY),
    "tcd": Sampler("TCDScheduler", title="TCD", **_PLAIN, **_NOISY),
    "sa_solver": Sampler("SASolverScheduler", title="SA-Solver", **_NOISY),
    "ddim_parallel": Sampler("DDIMParallelScheduler", title="DDIM Parallel", **_PLAIN),
    "ddpm_parallel": Sampler("DDPMParallelScheduler", title="DDPM Parallel", **_PLAIN, **_NOISY),
}
"""Names as in sd-scripts, where it has the sampler."""
SCHEDULE_TYPES: Mapping[str, Mapping[str, Any]] = {
    "automatic": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "polyexponential": {"use_exponential_sigmas": True},  # the same for A1111's rho of 1
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "uniform": {"timestep_spacing": "linspace"},
    "normal": {"timestep_spacing": "linspace"},
    "ddim": {"timestep_spacing": "leading"},
}
"""Schedule types of A1111 and the options of diffusers' classes."""
_TITLES = {
    "use_karras_sigmas": "Karras",
    "use_exponential_sigmas": "Exponential",
    "use_beta_sigmas": "Beta",
    "trailing": "SGM Uniform",
    "linspace": "Uniform",
    "leading": "DDIM",
}
_OTHER_MODELS = "a sampler of diffusers for other models than image diffusion and flows"
_UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "dpm_fast": ("diffusers has no such sampler", "DPM++ 2M"),
    "dpm_adaptive": ("diffusers has no sampler that chooses its steps", "DPM++ 2M"),
    "dpm_ad": ("diffusers has no sampler that chooses its steps", "DPM++ 2M"),
    "dpm++_2s_a": ("diffusers has no ancestral form of DPM++ 2S", "DPM++ 2S"),
    "restart": ("diffusers has no such sampler", "Heun"),
    "ddim_cfg++": ("diffusers has no such sampler", "DDIM"),
    "dpmsolversdescheduler": ("it needs the package torchsde, which Loraline does not use", "DPM++ SDE"),
    "ddiminversescheduler": ("it turns images into noise", "DDIM"),
    "dpmsolvermultistepinversescheduler": ("it turns images into noise", "DPM++ 2M"),
    "repaintscheduler": ("it is for unconditional models", "DDIM with --mask"),
    "edmeulerscheduler": ("it is for networks with EDM's preconditioning", "Euler"),
    "edmdpmsolvermultistepscheduler": ("it is for networks with EDM's preconditioning", "DPM++ 2M"),
    "cosinedpmsolvermultistepscheduler": ("it is for audio models", "DPM++ 2M SDE"),
    "ipndmscheduler": ("it has a noise schedule of its own", "PLMS"),
    "ltxeulerancestralrfscheduler": ("it is for LTX-Video", "Euler"),
    "flowmapeulerdiscretescheduler": ("it is for flow-map models", "Euler"),
    **{
        f"{name}scheduler": (_OTHER_MODELS, "Euler")
        for name in (
            *("amused", "blockrefinement", "cmstochasticiterative", "cogvideoxddim", "cogvideoxdpm", "discreteddim"),
            *("consistencydecoder", "ddpmwuerstchen", "entropybound", "heliosdmd", "helios", "karrasve", "minimaxh3"),
            *("piflow", "rfd4proteina", "scm", "scoresdeve", "scoresdevp", "unclip", "vqdiffusion"),
        )
    },
}
"""Names of A1111 and classes of diffusers that cannot be used -> why, and the nearest that can."""
_NO_SCHEDULES = {
    "kl_optimal": "Karras",
    "align_your_steps": "Karras",
    "align_your_steps_gits": "Karras",
    "align_your_steps_11": "Karras",
    "align_your_steps_32": "Karras",
    "turbo": "SGM Uniform",
}
"""Schedule types of A1111 and Forge that diffusers' samplers lack, and the nearest."""
_OTHERS: Mapping[str, str] = {
    **{"_".join(sampler.title.lower().split()): name for name, sampler in SAMPLERS.items()},
    **{sampler.flow.lower(): name for name, sampler in SAMPLERS.items() if sampler.flow.startswith("FlowMatch")},
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpm_2_a": "dpm2_a",
    # The first sampler of a class has its name.
    **{sampler.scheduler.lower(): name for name, sampler in reversed(list(SAMPLERS.items()))},
}


def find_sampler(name: str) -> Sampler:
    """Returns a sampler by its name in sd-scripts (`euler_a`), A1111 (`Euler a`) or diffusers (its class).

    Args:
        name: The name; a schedule type of A1111 may follow, as in `DPM++ 2M Karras` and `euler_sgm_uniform`.

    Raises:
        SettingsError: It is unknown, or diffusers has no such sampler or not with that schedule type; the message has
            the nearest one.
    """
    plain = _normalized(name)
    if (found := _named(plain)) is not None:
        return found
    for schedule in sorted((*SCHEDULE_TYPES, *_NO_SCHEDULES), key=len, reverse=True):
        rest = plain.removesuffix(f"_{schedule}")
        if rest != plain and (found := _named(rest)) is not None:
            return _scheduled(found, schedule, name)
    raise SettingsError(
        f"unknown sampler {name[:60]!r}",
        allowed=f"{', '.join(SAMPLERS)}, each with a schedule type: {', '.join(SCHEDULE_TYPES)}",
        remedy=did_you_mean(plain, list(SAMPLERS), "choose one of them"),
    )


def join_schedule(sampler: str | None, schedule: str | None) -> str | None:
    """Returns one name for `find_sampler` of a sampler (None is DPM++ 2M, or Euler for flows) and a schedule type.

    Raises:
        SettingsError: A schedule type without a sampler.
    """
    if schedule is None:
        return sampler
    if sampler is None:
        raise SettingsError(f"the schedule type is {schedule[:40]!r} without a sampler", remedy="name the sampler, too")
    return f"{sampler} {schedule}"


def titles_of(scheduler: str, options: Mapping[str, Any]) -> tuple[str, str | None]:
    """Returns sampler and schedule type as A1111 names them, from a class of diffusers and its options.

    A class that is not in the table keeps its name; no option of a schedule type gives None.
    """
    schedule = next((_TITLES[key] for key in _TITLES if options.get(key) is True), None)
    schedule = schedule or _TITLES.get(str(options.get("timestep_spacing")))
    candidates = [each for each in SAMPLERS.values() if scheduler in (each.scheduler, each.flow)]
    exact = [each for each in candidates if each.options.items() <= options.items()]
    title = max(exact, key=lambda each: len(each.options)).title if exact else None
    return title or (candidates[0].title if candidates else scheduler), schedule


def sampler_name_of(scheduler: str, options: Mapping[str, Any]) -> str | None:
    """Returns the name for `find_sampler` of a class of diffusers with options; None if no sampler has the class."""
    matches = {
        name: len(each.options)
        for name, each in SAMPLERS.items()
        if scheduler in (each.scheduler, each.flow) and each.options.items() <= options.items()
    }
    if not matches:
        return None
    name = max(matches, key=lambda each: matches[each])
    schedules = [kind for kind, changes in SCHEDULE_TYPES.items() if changes and changes.items() <= options.items()]
    return "_".join([name, *schedules[:1]])


@contextmanager
def steps_refused(title: str, steps: int) -> Iterator[None]:
    """Raises `SettingsError` for a number of steps that a class of diffusers refuses, such as 60 of LCM."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise SettingsError(f"{title} cannot run {steps} steps ({error})", remedy="choose another number") from error


def _normalized(name: str) -> str:
    return "_".join(name.strip().lower().replace("-", "_").split()).removeprefix("k_").replace("dpmpp", "dpm++")


def _named(plain: str) -> Sampler | None:
    if plain in _UNSUPPORTED:
        reason, nearest = _UNSUPPORTED[plain]
        raise SettingsError(
            f"the sampler {plain!r} cannot be used: {reason}", allowed=", ".join(SAMPLERS), remedy=f"use {nearest}"
        )
    return SAMPLERS.get(_OTHERS.get(plain, plain))


def _scheduled(sampler: Sampler, schedule: str, name: str) -> Sampler:
    if schedule in _NO_SCHEDULES:
        raise SettingsError(
            f"the sampler {name[:60]!r} has a schedule type that diffusers lacks",
            allowed=", ".join(SCHEDULE_TYPES),
            remedy=f"use {_NO_SCHEDULES[schedule]}",
        )
    options = SCHEDULE_TYPES[sampler.automatic if schedule == "automatic" and sampler.automatic else schedule]
    if not _accepts(sampler, options):
        raise SettingsError(
            f"{sampler.title} has no schedule type {schedule!r} in diffusers",
            allowed=", ".join(kind for kind, changes in SCHEDULE_TYPES.items() if _accepts(sampler, changes)),
            remedy="choose another sampler or schedule type",
        )
    return replace(sampler, options={**sampler.options, **options})


def _accepts(sampler: Sampler, options: Mapping[str, Any]) -> bool:
    return not options or (sampler.takes_spacing if "timestep_spacing" in options else sampler.takes_sigmas)
