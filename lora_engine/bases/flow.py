"""Implements the noise schedule and the sampler of the flow-matching families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.latent import LatentModel
from lora_engine.bases.noise import FlowSchedule, flow_schedule_from
from lora_engine.bases.samplers import SAMPLERS, Sampler, find_sampler, steps_refused
from lora_engine.bases.source import BaseSource
from lora_engine.building import BUILDING
from lora_engine.errors import BaseModelError, SettingsError

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_STATIC = "FlowMatchHeunDiscreteScheduler"
"""A sampler that cannot shift the sigmas by the image's size."""


class FlowModel(LatentModel):
    """A flow-matching transformer, whose timesteps are sigmas; see `BaseModel` and `FlowSchedule`."""

    denoiser_name = "transformer"
    noise: FlowSchedule

    def encode_negative(self, texts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """See `BaseModel`."""
        return self.encode_text(texts, size)

    def scheduler(
        self, steps: int | None = None, size: tuple[int, int] | None = None, sampler: str | None = None
    ) -> Any:
        """See `BaseModel`; Euler's method unless another sampler is named."""
        chosen = self._find_sampler(sampler)
        options = dict(chosen.options)
        if not chosen.flow.startswith("FlowMatch"):  # of diffusion, with an option for flows
            shift = self.noise.shift
            options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift.factor}
        with BUILDING:
            scheduler = getattr(diffusers, chosen.flow).from_config(self._scheduler_settings, **options)
        if steps is not None:
            spacing = self._spacing(steps) if chosen.flow == _SCHEDULER else {"num_inference_steps": steps}
            mu = {} if (value := self._mu(size)) is None else {"mu": value}
            with steps_refused(chosen.title, steps):
                scheduler.set_timesteps(device=self.device, **mu, **spacing)
        return scheduler

    def _find_sampler(self, name: str | None) -> Sampler:
        if name is None:
            return SAMPLERS["euler"]
        chosen, is_dynamic = find_sampler(name), self.noise.shift.dynamic
        usable = [each for each in SAMPLERS.values() if each.flow and (each.flow != _STATIC or not is_dynamic)]
        if chosen.title not in [each.title for each in usable]:
            raise SettingsError(
                f"the sampler is {name!r}, but the base {self.name!r} is a flow",
                allowed=", ".join(each.title for each in usable),
                remedy="leave the sampler out, which is Euler",
            )
        # The sigmas of the other classes end in NaN or ignore the schedule type (diffusers 0.42).
        changed = chosen.options.keys() - SAMPLERS["euler"].options.keys()
        if "timestep_spacing" in changed or (changed and chosen.flow != _SCHEDULER):
            raise SettingsError(
                f"the sampler {name!r} has a schedule type that flows lack, and the base {self.name!r} is a flow",
                allowed="Euler with Karras, Exponential or Beta",
                remedy="leave the schedule type out",
            )
        return chosen

    def _spacing(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def _mu(self, size: tuple[int, int] | None) -> float | None:
        if not self.noise.shift.dynamic:
            return None
        _, height, width = self.latent_shape(size or self.default_size)
        return self.noise.shift.mu((height, width))

    def _load_schedule(self, source: BaseSource) -> dict[str, Any]:
        settings = self._settings_of_scheduler(source)
        if settings.get("_class_name") != _SCHEDULER:
            raise BaseModelError(
                f"unsupported scheduler {settings.get('_class_name')!r}",
                where=str(source.folder / "scheduler"),
                allowed=f"{_SCHEDULER}, which trains the bases of this family",
                remedy="replace it by the scheduler configuration of the published base",
            )
        self.noise = flow_schedule_from(settings, self._patch)
        return settings
