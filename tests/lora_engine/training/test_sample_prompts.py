"""Sample prompts with options in the syntax of sd-scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.bases.base import load_base
from lora_engine.bases.samplers import SAMPLERS
from lora_engine.data.pixels import read_pixels
from lora_engine.errors import SettingsError
from lora_engine.inference.generate import draw_noise, generate
from lora_engine.training.samples import SampleWriter
from lora_engine.training.specs.sample_prompts import SampleRequest
from lora_engine.training.specs.samples import Samples
from tests.support.untrained import write_untrained_base


def samples(*prompts: str, **change: Any) -> Samples:
    return Samples.model_validate({"every": 1, "steps": 2, "prompts": list(prompts), **change})


def test_options_follow_the_text_in_any_order() -> None:
    # The example of sd-scripts' documentation.
    prompt = "1girl, upper body --n low quality, bad anatomy --w 768 --h 512 --d 1 --l 7.5 --s 28"
    expected = SampleRequest(0, "1girl, upper body", 1, 28, 7.5, "low quality, bad anatomy", 768, 512)
    assert samples(prompt).requests() == (expected,)
    assert samples(
        "1girl, upper body --s 28 --l 7.5 --d 1 --h 512 --w 768 --n low quality, bad anatomy"
    ).requests() == (expected,)


def test_a_prompt_without_options_is_drawn_with_every_seed() -> None:
    requests = samples("a well-known ring -- blue", "b --d 9", seeds=[1, 2], guidance=2.0).requests()
    assert [(request.number, request.text, request.seed) for request in requests] == [
        (0, "a well-known ring -- blue", 1),
        (0, "a well-known ring -- blue", 2),
        (1, "b", 9),
    ]
    assert {request.settings for request in requests} == {(2, 2.0, "", None, None, None)}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a --x 3", "unknown option '--x'; known are --w, --h, --n, --s, --l, --d, --ss"),
        ("a --ar 16:9", "unknown option '--ar'"),
        ("a --w 65", "--w is '65'; allowed: a multiple of 8"),
        ("a --w 8000", "--w is '8000'"),
        ("a --h", "--h is ''"),
        ("a --s 0", "--s is '0'; allowed: 1 to 1000"),
        ("a --l nan", "--l is 'nan'"),
        ("a --l 1e9", "--l is '1e9'"),
        ("a --d -1", "--d is '-1'"),
        ("a --ss eulr", "--ss is 'eulr'; allowed: ddim, pndm, euler, euler_a"),
        ("a --s 3 --s 4", "sets '--s' twice"),
        ("--w 64", "options only"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompt: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        samples(prompt)
    assert problem in str(caught.value)


def test_each_sample_has_its_own_size_seed_and_negative_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    settings = samples("a ring --w 16 --h 24 --n red --d 5", "a ring", seeds=[1, 2])
    writer = SampleWriter(base, settings, tmp_path, "a" * 64)
    writer.draw(1)
    files = {path.name: read_pixels(path) for path in tmp_path.rglob("*.png")}
    height, width = base.default_size
    assert {name: tuple(pixels.shape[1:]) for name, pixels in files.items()} == {
        "00-5.png": (24, 16),
        "01-1.png": (height, width),
        "01-2.png": (height, width),
    }
    alone = generate(base, ["a ring"], seeds=[5], steps=2, guidance=3.0, negative="red", width=16, height=24)[0]
    torch.testing.assert_close(files["00-5.png"], alone.clamp(-1, 1), rtol=0, atol=1 / 127)
    assert not torch.equal(files["01-1.png"], files["01-2.png"])


def test_a_size_that_the_base_cannot_draw_is_refused_before_the_training(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    SampleWriter(base, samples("a --w 24 --h 24"), tmp_path, "a" * 64)
    monkeypatch.setattr(type(base), "_patch", 8)  # of a transformer
    with pytest.raises(SettingsError, match="cannot generate images of 24 x 24"):
        SampleWriter(base, samples("a --w 24 --h 24"), tmp_path, "a" * 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("base") / "small-sd", "small-sd")


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of numpy in diffusers' schedulers
@pytest.mark.parametrize(
    "name", [*SAMPLERS, "Euler a", "k_euler", "DPM++ 2M Karras", "EulerDiscreteScheduler", "UniPC", "DPM++ 2M SDE"]
)
def test_a_prompt_has_its_own_sampler_and_an_image_does_not_depend_on_the_others(small: Path, name: str) -> None:
    base = load_base(small)
    state = torch.get_rng_state()
    (request,) = samples(f"a --ss {name} --s 3 --d 4").requests()
    settings: dict[str, Any] = {"steps": 3, "width": 16, "height": 16, "sampler": request.sampler}
    pair = generate(base, ["a", "b"], seeds=[4, 5], **settings)
    alone = generate(base, ["a"], seeds=[4], **settings)
    assert torch.isfinite(pair).all()
    torch.testing.assert_close(pair[:1], alone, rtol=0, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    default = generate(base, ["a"], seeds=[4], **{**settings, "sampler": None})
    assert torch.allclose(default, alone, atol=1e-5) == (name == "dpmsolver++")


def test_the_images_of_a_sampler_are_those_of_diffusers_pipeline(small: Path) -> None:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    base = load_base(small)
    pipeline: Any = DiffusionPipeline.from_pretrained(str(small), safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise(base.latent_shape((16, 16)), 4)[None]
    theirs = pipeline(
        "a", height=16, width=16, num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="pt"
    )
    ours = generate(base, ["a"], seeds=[4], steps=3, width=16, height=16, sampler="euler")
    torch.testing.assert_close(ours / 2 + 0.5, theirs.images, rtol=0, atol=2e-5)


def test_a_flow_has_its_own_sampler_alone(tmp_path: Path) -> None:
    base = load_base(write_untrained_base(tmp_path / "flux", "small-flux"))
    base.scheduler(2, sampler="euler")
    with pytest.raises(SettingsError, match=r"the sampler is 'ddim', but the base .* is a flow"):
        base.scheduler(2, sampler="ddim")
