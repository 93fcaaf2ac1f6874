"""The engines by name: lazy, with options of their own; the lockstep that draws several jobs."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from lora_engine.adapters import Adapter, create_adapter
from lora_engine.bases.base import load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import EngineError, SettingsError
from lora_engine.formats import write_adapter
from lora_engine.serving.engines import ENGINES, DynamicOptions, StaticOptions, make_engine
from lora_engine.serving.lockstep import Lockstep, PredictionInput
from tests.lora_engine.serving.conftest import job_of, pixels_of


def test_the_engines_and_their_options_are_named_without_torch() -> None:
    code = "from lora_engine.serving.engines import ENGINES; import sys; print(*ENGINES, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["static", "dynamic", "compiled", "False"]
    assert all(entry.title for entry in ENGINES.values())


@pytest.mark.parametrize("name", ["static", "dynamic"])  # test_compiled makes the other one by its name
def test_each_engine_is_made_by_its_name_and_draws(
    name: str, untrained_base: Callable[[str], Path], write_file: Callable[..., Path]
) -> None:
    base = str(untrained_base("small-sd"))
    file = write_file("a", targets=("unet.mid_block.*.attn1.to_q",))
    job = job_of("a ring <lora:a:0.8>", file)
    options = {"static": StaticOptions(adapters="<lora:a:0.8>"), "dynamic": DynamicOptions()}[name]
    engine = make_engine(name, base, options, files=[(file, "a@1")] if name == "static" else ())
    (drawn,) = engine.draw([job])
    (expected,) = make_engine("dynamic", base).draw([job])
    torch.testing.assert_close(pixels_of(drawn), pixels_of(expected), rtol=0, atol=2e-5)


def test_unknown_engines_and_options_of_others_are_refused(untrained_base: Callable[[str], Path]) -> None:
    base = str(untrained_base("small-sd"))
    with pytest.raises(SettingsError, match=r"unknown engine 'dinamic'.*dynamic"):
        make_engine("dinamic", base)
    with pytest.raises(SettingsError, match=r"options of type 'StaticOptions'.*DynamicOptions"):
        make_engine("dynamic", base, StaticOptions())
    with pytest.raises(SettingsError, match="takes adapters by request"):
        make_engine("dynamic", base, files=[(Path("a.safetensors"), "a@1")])
    with pytest.raises(ValidationError):
        DynamicOptions(max_images=0)


def _prediction(value: float) -> PredictionInput:
    return PredictionInput(torch.full((1, 1), value), torch.zeros(1), Conditioning({"states": torch.zeros(1, 2)}))


def test_jobs_of_a_lockstep_run_one_at_a_time_and_predict_together() -> None:
    running, most, batches = 0, 0, list[list[int]]()

    def answer(waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        batches.append(list(waiting))
        return {number: prediction.noisy + 1 for number, prediction in waiting.items()}

    lockstep: Lockstep[float] = Lockstep(answer)

    def job(number: int) -> float:
        nonlocal running, most
        value = float(number)
        for _ in range(number + 1):
            running += 1
            most = max(most, running)
            running -= 1
            value = float(lockstep.predict(number, _prediction(value)))
        return value

    assert lockstep.run([lambda number=number: job(number) for number in range(3)]) == [1.0, 3.0, 5.0]  # type: ignore[misc]
    assert batches == [[0, 1, 2], [1, 2], [2]]
    assert most == 1


def test_an_error_of_the_batch_ends_all_jobs_and_their_threads() -> None:
    def answer(waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        raise MemoryError(len(waiting))

    lockstep: Lockstep[Tensor] = Lockstep(answer)
    before = threading.active_count()
    with pytest.raises(MemoryError):
        lockstep.run([lambda: lockstep.predict(0, _prediction(1.0)), lambda: lockstep.predict(1, _prediction(1.0))])
    assert threading.active_count() == before


def test_an_error_of_one_prediction_is_that_of_its_job() -> None:
    def answer(waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        return {number: EngineError("broken") if number else torch.ones(1) for number in waiting}

    lockstep: Lockstep[Tensor] = Lockstep(answer)
    jobs = [lambda: lockstep.predict(0, _prediction(1.0)), lambda: lockstep.predict(1, _prediction(1.0))]
    first, second = lockstep.run(jobs)
    assert isinstance(first, Tensor)
    assert isinstance(second, EngineError)


def test_the_example_of_the_documentation_draws_two_adapters_in_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "serving-engines.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    base = load_base("tiny", device="cpu")
    for seed, name in enumerate(("red", "blue")):
        draw = torch.Generator().manual_seed(seed)
        adapter = create_adapter(base, "attention", generator=draw)
        modules = {
            module: delta.with_factors(
                {key: 0.05 * torch.randn(value.shape, generator=draw) for key, value in delta.factors().items()}
            )
            for module, delta in adapter.modules.items()
        }
        write_adapter(f"{name}.safetensors", Adapter(modules, adapter.base, adapter.fingerprint))
    exec(code, {})
    images = [Image.open(f"{name}.png") for name in ("red", "blue")]
    assert [image.size for image in images] == [(32, 32)] * 2
    assert images[0].tobytes() != images[1].tobytes()
    assert "Lora hashes" in images[0].text["parameters"]  # type: ignore[attr-defined]
