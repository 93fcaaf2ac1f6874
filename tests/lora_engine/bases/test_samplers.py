"""Samplers and schedule types by their names in A1111, sd-scripts and diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.samplers import _NO_SCHEDULES, _UNSUPPORTED, SAMPLERS, SCHEDULE_TYPES, find_sampler, titles_of
from lora_engine.errors import SettingsError
from lora_engine.inference.generate import draw_noise, generate
from lora_engine.seeds import derive_seed
from tests.support.untrained import write_untrained_base

A1111 = [
    *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler"),
    *("LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC"),
    "LCM",
]
A1111_SCHEDULES = [
    *("Automatic", "Uniform", "Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal"),
    *("Align Your Steps", "Simple", "Normal", "DDIM", "Beta"),
]
# In the schedulers of diffusers, numpy wraps tensors in a form that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
SIZE = (16, 16)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("tiny", device="cpu")


@pytest.fixture(scope="module")
def flows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("flows")
    shapes = ("small-sd3", "small-flux")
    return {shape: load_base(str(write_untrained_base(folder / shape, shape)), device="cpu") for shape in shapes}


def draw(base: BaseModel, sampler: str | None, steps: int = 3, **settings: Any) -> Tensor:
    return generate(base, ["a ring"], seeds=[1], steps=steps, sampler=sampler, height=16, width=16, **settings)


def is_refused(name: str) -> bool:
    try:
        find_sampler(name)
    except SettingsError as error:
        return "Fix: " in str(error)
    return False


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_draws_finite_images(base: BaseModel, name: str) -> None:
    plain = draw(base, name, guidance=1.0)
    assert torch.isfinite(plain).all()
    assert plain.std() > 0.01


@pytest.mark.parametrize(
    "name", [name if name == "dpmsolver++" else pytest.param(name, marks=pytest.mark.nightly) for name in SAMPLERS]
)
def test_each_sampler_draws_finite_images_with_each_of_its_schedule_types(base: BaseModel, name: str) -> None:
    different = {str(options): schedule for schedule, options in SCHEDULE_TYPES.items() if options}
    for schedule in different.values():
        if not is_refused(f"{name} {schedule}"):
            assert torch.isfinite(draw(base, f"{name} {schedule}", guidance=1.0)).all(), schedule


def test_the_table_names_every_sampler_of_diffusers_or_says_why_not() -> None:
    classes = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    used = {sampler.scheduler for sampler in SAMPLERS.values()} | {sampler.flow for sampler in SAMPLERS.values()}
    refused = {name for name in classes if name.lower() in _UNSUPPORTED}
    assert classes == (used - {""}) | refused
    assert not used & refused
    for name in classes:
        assert is_refused(name) == (name in refused)


def test_every_sampler_and_schedule_type_of_a1111_is_found_or_refused_with_the_nearest() -> None:
    assert [name for name in A1111 if is_refused(name)] == [
        *("DPM++ 2S a", "DPM fast", "DPM adaptive", "Restart", "DDIM CFG++")
    ]
    assert [name for name in A1111_SCHEDULES if is_refused(f"Euler {name}")] == ["KL Optimal", "Align Your Steps"]
    for name in A1111:
        if not is_refused(name):
            sampler = find_sampler(name)
            assert titles_of(sampler.scheduler, sampler.options)[0] == name
    nearest = [name for _, name in _UNSUPPORTED.values()] + [f"Euler {name}" for name in _NO_SCHEDULES.values()]
    assert not any(is_refused(name.removesuffix(" with --mask")) for name in nearest)


def test_what_the_table_says_of_a_class_is_so_in_diffusers() -> None:
    for sampler in SAMPLERS.values():
        options = inspect.signature(getattr(diffusers, sampler.scheduler).__init__).parameters
        assert sampler.takes_sigmas == ("use_karras_sigmas" in options), sampler
        assert sampler.takes_spacing == ("timestep_spacing" in options), sampler
        assert set(sampler.options) <= set(options)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("DPM++ 2M Karras", "dpmsolver++_karras"),
        ("DPM++ 2M Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE Automatic", "k_dpmpp_2m_sde exponential"),
        ("Euler Automatic", "Euler"),
        ("Euler Simple", "euler_sgm_uniform"),
        ("EulerDiscreteScheduler", "k_euler"),
        ("UniPCMultistepScheduler beta", "unipc_beta"),
    ],
)
def test_names_of_one_sampler_find_the_same(name: str, same: str) -> None:
    assert find_sampler(name) == find_sampler(same)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("eular", "Did you mean 'euler'|'euler'"),
        ("Euler a Karras", "no schedule type 'karras' in diffusers. Allowed: automatic, sgm_uniform, simple"),
        ("Euler KL Optimal", "diffusers lacks.*use Karras"),
        ("DPM adaptive", "chooses its steps.*use DPM\\+\\+ 2M"),
        ("SCMScheduler", "for other models"),
    ],
)
def test_what_diffusers_lacks_is_refused(name: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        find_sampler(name)


def test_a_number_of_steps_that_a_sampler_cannot_run_is_refused(base: BaseModel) -> None:
    with pytest.raises(SettingsError, match="LCM cannot run 60 steps"):
        base.scheduler(60, sampler="LCM")


@pytest.mark.parametrize(
    "name", ["Euler", "Euler Karras", "Euler Exponential", "Euler Beta", "DPM++ 2M", "UniPC", "DEIS"]
)
def test_samplers_of_flows_agree_after_many_steps(flows: dict[str, BaseModel], name: str) -> None:
    for base in flows.values():
        expected = draw(base, None, steps=30, guidance=2.0)
        actual = draw(base, name, steps=30, guidance=2.0)
        assert (actual - expected).abs().max() < 0.1
        assert torch.equal(actual, expected) == (name == "Euler")


def test_lcm_and_heun_draw_with_flows_and_what_a_flow_lacks_is_refused(flows: dict[str, BaseModel]) -> None:
    static, dynamic = flows["small-sd3"], flows["small-flux"]
    for base in flows.values():
        assert torch.isfinite(draw(base, "LCM")).all()
    assert torch.isfinite(draw(static, "Heun")).all()
    for base, name in ((dynamic, "Heun"), (static, "DDIM"), (static, "DPM++ 2M Karras"), (static, "Euler Simple")):
        with pytest.raises(SettingsError, match="is a flow"):
            draw(base, name)


@pytest.mark.parametrize("name", ["DPM++ SDE", "DPM++ 3M SDE", "DPM2 a", "LCM", "DPM++ 2M Exponential", "Heun Beta"])
def test_an_image_equals_that_of_diffusers_pipeline_with_the_same_scheduler(tmp_path: Path, name: str) -> None:
    from diffusers import DiffusionPipeline

    folder = write_untrained_base(tmp_path / "base", "small-sd")
    base = load_base(str(folder), device="cpu")
    pipeline: Any = DiffusionPipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = base.scheduler(sampler=name)
    latents = draw_noise(base.latent_shape(SIZE), 1)[None]
    expected = pipeline(
        ["a ring"],
        height=16,
        width=16,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=latents,
        generator=[torch.Generator().manual_seed(derive_seed(1, "steps"))],
        output_type="pt",
    ).images
    torch.testing.assert_close(draw(base, name, steps=4) / 2 + 0.5, expected, rtol=0, atol=2e-5)
