"""Estimates of memory are lower bounds that refuse impossible sizes; tiles, previews and values that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import DataError, SettingsError
from lora_engine.families.latent_colors import SD_COLORS
from lora_engine.inference.draw import Drawer
from lora_engine.inference.draw_settings import DrawSettings
from lora_engine.inference.memory import check_memory, estimate_memory
from lora_engine.inference.previews import preview_latents
from lora_engine.inference.prompts.prompt import parse_prompt
from tests.support.untrained import write_untrained_base


@pytest.fixture(scope="module", params=["tiny", "small-sdxl", "small-sd3", "small-flux"])
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    if request.param == "tiny":
        return load_base("tiny", device="cpu")
    folder = tmp_path_factory.mktemp("memory") / request.param
    return load_base(str(write_untrained_base(folder, request.param)), device="cpu")


def largest_at_once(module: torch.nn.Module, run: Any) -> int:
    """Returns the bytes of the largest input and output of one layer."""
    sizes: list[int] = []

    def note(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in (*inputs, output) if isinstance(value, torch.Tensor)]
        sizes.append(sum(value.nbytes for value in tensors))

    handles = [part.register_forward_hook(note) for part in module.modules() if not list(part.children())]
    run()
    for handle in handles:
        handle.remove()
    return max(sizes)


@torch.no_grad()
def test_the_estimate_is_not_above_what_is_used(any_base: BaseModel) -> None:
    estimate = estimate_memory(any_base, (32, 32), rows=1, images=1, tiled=False)
    model: Any = any_base
    latents = torch.randn(1, *any_base.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0))
    used = largest_at_once(model.vae.decoder, lambda: any_base.decode_latents(latents))
    images = 2 * 3 * 32 * 32 * 4
    assert 0 < estimate.decoder - images <= used
    parameters = [value for part in (*any_base.modules.values(), model.vae) for value in part.parameters()]
    assert sum(value.nbytes for value in parameters) <= estimate.weights < 1.1 * sum(v.nbytes for v in parameters)
    larger = estimate_memory(any_base, (64, 64), rows=1, images=1, tiled=False)
    assert larger.denoiser == 4 * estimate.denoiser
    assert larger.decoder == 4 * estimate.decoder
    assert estimate_memory(any_base, (64, 64), rows=2, images=1, tiled=False).denoiser == 2 * larger.denoiser
    assert estimate_memory(any_base, (64, 64), rows=1, images=4, tiled=True).decoder < 4 * larger.decoder


def test_a_size_beyond_memory_is_refused_and_one_within_is_not(any_base: BaseModel) -> None:
    estimate = estimate_memory(any_base, (64, 64), rows=2, images=2, tiled=False)
    with pytest.raises(SettingsError, match=r"64 x 64 pixels, 2 at once, need at least .* MiB of weights"):
        check_memory(any_base, (64, 64), estimate.activations - 1, rows=2, images=2, tiled=False)
    within = check_memory(any_base, (64, 64), estimate.activations, rows=2, images=2, tiled=False)
    assert within == estimate


def test_a_drawer_refuses_sizes_beyond_the_memory_that_it_measures() -> None:
    free = [0]
    drawer = Drawer("tiny", measure_free=lambda device: (free[0], free[0]))
    with pytest.raises(SettingsError, match="and cpu has 0 MiB left"):
        draw(drawer)
    free[0] = 1 << 30
    assert torch.isfinite(draw(drawer, steps=1)).all()


def draw(drawer: Drawer, **settings: Any) -> torch.Tensor:
    prompt, negative = parse_prompt("a ring"), parse_prompt("", is_negative=True)
    return drawer.draw(prompt, DrawSettings(**{"seeds": [1, 2], "steps": 3, **settings}), negative=negative)[0]


def test_tiles_change_nothing_within_one_tile_and_little_beyond() -> None:
    plain, tiled = Drawer("tiny"), Drawer("tiny", tile_vae=True)
    torch.testing.assert_close(draw(plain), draw(tiled), rtol=0, atol=1e-5)
    large = [draw(drawer, size=(64, 64)) for drawer in (plain, tiled)]
    assert not torch.equal(*large)
    assert (large[0] - large[1]).abs().mean() < 0.1


def test_batches_of_any_size_give_the_same_images() -> None:
    drawer = Drawer("tiny")
    expected = draw(drawer, seeds=[1, 2, 3])
    for batch in (1, 2):
        torch.testing.assert_close(draw(drawer, seeds=[1, 2, 3], batch=batch), expected, rtol=0, atol=5e-5)


def test_values_that_are_not_finite_stop_the_drawing_at_their_step() -> None:
    drawer = Drawer("tiny")
    images: list[int] = []
    negative = parse_prompt("", is_negative=True)
    with pytest.raises(DataError, match="step 2 of 3 gives NaN or Inf"):
        drawer.draw(
            parse_prompt("a ring"),
            DrawSettings([1], steps=3, guidance=1e38),
            negative=negative,
            on_images=lambda first, pixels: images.append(first),
        )
    assert images == []


def test_steps_are_counted_over_all_images_and_both_drawings() -> None:
    seen: list[tuple[int, int]] = []
    settings = DrawSettings([1, 2, 3], steps=2, enlarge=1.5, enlarged_strength=1.0, batch=2)
    Drawer("tiny").draw(
        parse_prompt("a ring"),
        settings,
        negative=parse_prompt("", is_negative=True),
        progress=lambda done, total, values: seen.append((done, total)),
    )
    assert seen == [(done, 12) for done in (2, 4, 5, 6, 7, 8, 9, 10, 11, 12)]


def test_a_preview_of_another_autoencoder_is_decoded(any_base: BaseModel) -> None:
    latents = torch.randn(2, *any_base.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = any_base.decode_latents(latents).clamp(-1, 1)
    torch.testing.assert_close(preview_latents(any_base, latents), expected)


def test_a_preview_of_a_published_autoencoder_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = load_base(str(write_untrained_base(tmp_path / "base", "small-sd")), device="cpu")
    monkeypatch.setattr("lora_engine.inference.previews._PUBLISHED", tuple(base.vae.config.block_out_channels))
    latents = torch.zeros(1, 4, 4, 6)
    latents[0, 3] = 1.0
    latents[0, 0, 0, 0] = float("nan")
    pixels = preview_latents(base, latents)
    assert pixels.shape == (1, 3, 4, 6)
    torch.testing.assert_close(pixels[0, :, 1, 1], torch.tensor(SD_COLORS[3]))
    assert torch.equal(pixels[0, :, 0, 0], torch.zeros(3))


@pytest.mark.parametrize("offload", [0.5, 1.5, -1.0])
def test_weights_stay_in_memory_only_beside_a_gpu(offload: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_engine.inference.draw.default_device", lambda: "cpu")
    with pytest.raises(SettingsError, match="offload is"):
        Drawer("tiny", offload=offload)
