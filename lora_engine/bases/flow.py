"""Implements the noise schedule and the sampler of the flow-matching families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.latent import LatentModel
from lora_engine.bases.noise import FlowSchedule, flow_schedule_from
from lora_engine.bases.samplers import SAMPLERS, find_sampler
from lora_engine.bases.source import BaseSource
from lora_engine.building import BUILDING
from lora_engine.errors import BaseModelError, SettingsError

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


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
        """See `BaseModel`; Euler's method."""
        if sampler is not None and find_sampler(sampler) != SAMPLERS["euler"]:
            raise SettingsError(
                f"the sampler is {sampler!r}, but the base {self.name!r} is a flow, which is sampled by Euler's method",
                allowed="euler",
                remedy="leave the sampler out",
            )
        with BUILDING:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(self._scheduler_settings)
        if steps is not None:
            scheduler.set_timesteps(device=self.device, mu=self._mu(size), **self._spacing(steps))
        return scheduler

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
