"""Metrics of memorization, leakage, distributions and faces: of constructed evidence, and through an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from lora_engine.data.pixels import write_png
from lora_engine.errors import SettingsError
from lora_engine.evaluation.details import read_details
from lora_engine.evaluation.evidence import BASE, CANDIDATE, Evidence, ImageSet, Losses, RealImage
from lora_engine.evaluation.metrics import METRICS, Available
from lora_engine.evaluation.plan import EvaluationPlan, Request
from lora_engine.evaluation.prompt_lists import UNRELATED, UNRELATED_TINY, class_prompts, unrelated_prompts
from lora_engine.evaluation.run import evaluate
from lora_engine.evaluation.spec import EvaluateSettings

SIZE = 32


class ColorEmbedder:
    """Embeds images by their pixels at 4 x 4, and texts by the image that the test registers for them."""

    name = "colors"
    fingerprint = "colors"

    def __init__(self, texts: dict[str, Tensor] | None = None) -> None:
        self._texts = texts or {}

    def embed_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(pixels, 4).flatten(1), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.cat([self.embed_images(self._texts[text][None]) for text in texts])


def texture(seed: int) -> Tensor:
    """Returns a random image with structure at every scale, float32 [3, 32, 32]."""
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 3, cells, cells, generator=draw) * 2 - 1 for cells in (4, 8, 16)]
    return sum(F.interpolate(layer, (SIZE, SIZE), mode="bilinear") for layer in layers)[0].clamp(-1, 1)  # type: ignore


def stored(*images: Tensor) -> Tensor:
    return torch.stack([((image + 1) * 127.5).round().to(torch.uint8) for image in images])


def image_set(prompt: str, base: Sequence[Tensor], candidate: Sequence[Tensor], **change: Any) -> ImageSet:
    request = Request(prompt, prompt.replace("zorb", "star"), tuple(range(len(base))), (SIZE, SIZE), prompt)
    return ImageSet(request, {BASE: stored(*base), CANDIDATE: stored(*candidate)}, **change)


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., Evidence]:
    """Returns evidence of six prompts: of every model, unrelated images unless the test plants others."""
    trained = tuple(
        RealImage(f"{index:064x}", f"{index}.png", tmp_path / f"{index}.png", f"group {index}") for index in range(6)
    )
    for index, image in enumerate(trained):
        write_png(image.path, texture(index))
    prompts = [f"zorb {index}" for index in range(6)]

    def make(
        with_trigger: Callable[[int, int], Tensor] = lambda prompt, seed: texture(2_000 + 10 * prompt + seed),
        without: Callable[[int, int], Tensor] = lambda prompt, seed: texture(3_000 + 10 * prompt + seed),
        losses: tuple[float, float] = (0.4, 0.4),
    ) -> Evidence:
        def sets(kind: int, candidate: Callable[[int, int], Tensor], word: str = "zorb") -> tuple[ImageSet, ...]:
            return tuple(
                image_set(
                    prompt.replace("zorb", word),
                    [texture(kind + 10 * index + seed) for seed in range(2)],
                    [candidate(index, seed) for seed in range(2)],
                )
                for index, prompt in enumerate(prompts)
            )

        reference = tuple(
            replace(item, reference=texture(100 + index))
            for index, item in enumerate(sets(1_000, lambda prompt, seed: texture(4_000 + 10 * prompt + seed)))
        )
        grid = {BASE: np.full((6, 10), 0.4), CANDIDATE: np.full((6, 10), losses[0])}
        training = {BASE: np.full((6, 10), 0.4), CANDIDATE: np.full((6, 10), losses[1])}
        groups = tuple(map(str, range(6)))
        return Evidence(
            (BASE, CANDIDATE),
            {
                "reference": reference,
                "with_trigger": sets(5_000, with_trigger),
                "without_trigger": sets(3_000, without, "star"),
                "of_class": sets(3_000, without, "star"),
                "unrelated": sets(3_000, without, "moon"),
            },
            Losses(grid, tuple(range(10)), groups),
            Losses(training, tuple(range(10)), groups),
            trained_on=trained,
            embedder=ColorEmbedder({f"star {index}": texture(7_000 + index) for index in range(6)}),  # type: ignore
        )

    return make


def difference(name: str, evidence: Evidence) -> float:
    measured = METRICS[name].measure(evidence)
    assert set(measured.values) == set(evidence.roles)
    return float((measured.values[CANDIDATE] - measured.values[BASE]).mean())


def test_planted_copies_are_near_training_images_and_counted(world: Callable[..., Evidence]) -> None:
    planted = world(lambda prompt, seed: texture(prompt) if seed else texture(2_000 + prompt))
    assert difference("copies", planted) == pytest.approx(0.5)
    assert difference("nearest_training", planted) > 0.2
    assert difference("copies", world()) == 0.0
    assert abs(difference("nearest_training", world())) < 0.1


def test_memorized_losses_widen_the_gap_and_learned_ones_do_not(world: Callable[..., Evidence]) -> None:
    memorized, learned = world(losses=(0.3, 0.1)), world(losses=(0.3, 0.3))
    assert difference("loss_gap", memorized) == pytest.approx(0.2)
    assert difference("loss_gap", learned) == pytest.approx(0.0)
    # The loss of held-out images fell by 0.1, that of training images by 0.3.
    assert difference("memorized_share", memorized) == pytest.approx(2 / 3)
    assert difference("memorized_share", learned) == pytest.approx(0.0)
    assert difference("memorized_share", world(losses=(0.5, 0.399))) == 0.0, "nothing was learned"
    for name in ("loss_gap", "memorized_share"):
        assert METRICS[name].measure(memorized).values[BASE].tolist() == [0.0] * 6


def test_one_image_for_all_prompts_has_no_sensitivity_and_no_diversity(world: Callable[..., Evidence]) -> None:
    right = world(lambda prompt, seed: texture(7_000 + prompt))
    same = world(lambda prompt, seed: texture(9_999))
    shuffled = world(lambda prompt, seed: texture(7_000 + (prompt + 1) % 6))
    sensitivity = {
        name: float(METRICS["prompt_sensitivity"].measure(evidence).values[CANDIDATE].mean())
        for name, evidence in (("right", right), ("same", same), ("shuffled", shuffled))
    }
    assert sensitivity["right"] > 0.5
    assert sensitivity["same"] == pytest.approx(0.0, abs=1e-6)
    assert sensitivity["shuffled"] < 0.0
    assert difference("diversity", same) < -0.2
    assert abs(difference("diversity", world())) < 0.3


def test_a_leaked_trigger_is_seen_without_it_and_has_no_effect_of_its_own(world: Callable[..., Evidence]) -> None:
    subject = lambda prompt, seed: texture(prompt)  # noqa: E731
    leaked, clean = world(subject, subject), world(subject)
    unchanged = world(subject, lambda prompt, seed: texture(3_000 + 10 * prompt + seed))
    assert difference("leak", leaked) > 0.1
    assert difference("leak", clean) == difference("leak", unchanged) == 0.0
    assert difference("trigger_effect", clean) > 0.05
    assert difference("trigger_effect", leaked) < difference("trigger_effect", clean) - 0.05


@pytest.mark.parametrize("name", ["drift", "class_drift", "unrelated_drift"])
def test_a_drifted_base_is_seen_on_every_set_of_prompts(name: str, world: Callable[..., Evidence]) -> None:
    drifted = world(without=lambda prompt, seed: texture(8_000 + 10 * prompt + seed))
    assert difference(name, drifted) > 0.3
    assert difference(name, world()) == pytest.approx(0.0, abs=1e-6)


def test_the_distribution_metrics_are_those_of_their_functions(world: Callable[..., Evidence]) -> None:
    from lora_engine.evaluation.distributions import kernel_distance, mean_discrepancy

    evidence = world()
    embedder = evidence.require_embedder()
    real = torch.cat([evidence.embed(images, "reference", embedder) for images in evidence.reference])
    drawn = torch.cat([evidence.embed(images, CANDIDATE, embedder) for images in evidence.reference])
    for name, function in (("kid", kernel_distance), ("cmmd", mean_discrepancy)):
        measured = METRICS[name].measure(evidence)
        assert measured.values[CANDIDATE].tolist() == [function(real, drawn)]
        assert len(measured.groups) == 1
    with pytest.raises(SettingsError, match="at least 1000"):
        METRICS["fid"].measure(evidence)


def test_likeness_by_dino_is_1_for_the_real_images_themselves(world: Callable[..., Evidence]) -> None:
    evidence = world()
    exact = tuple(
        replace(item, images={**item.images, CANDIDATE: stored(item.reference, item.reference)})
        for item in evidence.reference
        if item.reference is not None
    )
    evidence = replace(evidence, sets={**evidence.sets, "reference": exact}, image_embedder=ColorEmbedder())  # type: ignore
    values = METRICS["dino_i_paired"].measure(evidence).values
    assert values[CANDIDATE] == pytest.approx(np.ones(6), abs=1e-3)
    assert values[BASE].mean() < 0.5


def available(count: int, seeds: int = 1, **change: Any) -> Available:
    requests = tuple(Request(f"{n}", f"{n}", tuple(range(seeds)), (SIZE, SIZE), str(n)) for n in range(count))
    plan = EvaluationPlan(change.pop("measured_on", "heldout"), requests, requests, requests, **change)
    return Available(plan, embedder=True, image_embedder=False)


def test_what_cannot_be_measured_has_a_reason_before_anything_is_drawn() -> None:
    reasons = {
        "kid": (available(95, 4), "95 real and 380 generated images"),
        "cmmd": (available(200, measured_on="training"), "no image was held out"),
        "fid": (available(999), "1000 are needed"),
        "prompt_sensitivity": (available(1), "one prompt only"),
        "diversity": (available(4), "seeds: 1"),
        "copies": (available(4), "training images are unknown"),
        "memorized_share": (available(4, measured_on="training"), "no image was held out"),
        "leak": (available(4), "no trigger"),
        "class_drift": (available(4), "no class word"),
        "identity": (available(4), "face_embedder"),
        "dino_i_paired": (available(4), "no embedder of images"),
    }
    for name, (known, reason) in reasons.items():
        assert reason in METRICS[name].unmet(known), name
    assert METRICS["kid"].unmet(available(96)) == METRICS["fid"].unmet(available(1_000)) == ""


def test_identity_needs_a_training_image_with_one_face(tmp_path: Path) -> None:
    write_png(tmp_path / "noise.png", texture(1))
    image = RealImage("0" * 64, "noise.png", tmp_path / "noise.png", "g")
    known = replace(available(2, trained_on=(image,)), face_embedder=True)
    assert METRICS["identity"].unmet(known) == "no training image shows exactly one face"


def test_faces_in_photographs_are_counted_and_compared(tmp_path: Path, world: Callable[..., Evidence]) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    person, coffee = (
        torch.from_numpy(np.ascontiguousarray(image[:400, :400])).permute(2, 0, 1) / 127.5 - 1.0
        for image in (data.astronaut(), data.coffee())
    )
    write_png(tmp_path / "person.png", person)
    image = RealImage("0" * 64, "person.png", tmp_path / "person.png", "g")
    assert METRICS["identity"].unmet(replace(available(2, trained_on=(image,)), face_embedder=True)) == ""
    drawn = tuple(image_set(f"zorb {k}", [coffee], [person.flip(-1) if k else person]) for k in range(2))
    evidence = replace(
        world(),
        sets={"with_trigger": drawn, "reference": (), "without_trigger": ()},
        trained_on=(image,),
        face_embedder=ColorEmbedder(),  # type: ignore[arg-type]
    )
    assert {role: values.tolist() for role, values in METRICS["faces_found"].measure(evidence).values.items()} == {
        BASE: [0.0, 0.0],
        CANDIDATE: [1.0, 1.0],
    }
    similar = METRICS["identity"].measure(evidence).values
    assert similar[BASE].tolist() == [0.0, 0.0]
    assert similar[CANDIDATE][0] == pytest.approx(1.0, abs=1e-3)
    assert 0.3 < similar[CANDIDATE][1] < similar[CANDIDATE][0]


def test_the_lists_of_prompts_leave_out_trigger_and_class() -> None:
    assert len(class_prompts("ring")) >= 6
    assert class_prompts("owl")[0] == "an owl"
    assert class_prompts(None) == ()
    tiny = unrelated_prompts("tiny", ("zorb", "ring"))
    assert len(tiny) == len(UNRELATED_TINY) - 1
    assert not any("ring" in prompt.split() for prompt in tiny)
    assert unrelated_prompts("org/base", (None, None)) == UNRELATED
    assert "a cat asleep on a sofa" not in unrelated_prompts("org/base", (None, "cat"))


def test_an_evaluation_measures_optional_metrics_only_if_named(
    base: Path, adapters: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, clip_folder: Path
) -> None:
    def report(**change: Any) -> dict[str, Any]:
        settings = EvaluateSettings(**{"steps": 1, "seeds": 1, "embedder": str(clip_folder), **change})
        return evaluate(settings, str(base), adapters["strong"], make_dataset(heldout=1), tmp_path / "out")

    plain = report()
    assert not {"class_drift", "unrelated_drift", "kid"} & {*plain["metrics"], *plain["unmeasured"]}
    extra = report(extra=["class_drift", "kid"], gates={"unrelated_drift": {"max": 1.9}})
    assert extra["metrics"]["class_drift"]["n"] == len(class_prompts("star"))
    assert extra["metrics"]["unrelated_drift"]["n"] == len(UNRELATED)
    assert extra["metrics"]["class_drift"]["adapter"] > 0.0
    assert "96 are needed" in extra["unmeasured"]["kid"]
    assert extra["gates"][0]["passed"] is True
    with pytest.raises(ValidationError, match="'clip_t' is not an optional metric"):
        EvaluateSettings(extra=("clip_t",))
    with pytest.raises(SettingsError, match="96 are needed"):
        report(gates={"kid": {"max": 1.0}})


def test_a_strength_of_0_equals_the_base_bit_for_bit_and_others_do_not(
    base: Path, adapters: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, clip_folder: Path
) -> None:
    settings = EvaluateSettings(steps=1, seeds=1, embedder=str(clip_folder), strengths=(1.0, 0.0, 0.5))
    evaluate(settings, str(base), adapters["strong"], make_dataset(), tmp_path / "out")
    details = read_details(tmp_path / "out")
    assert details.sweep is not None
    assert details.sweep.zero_is_base is True
    assert [entry.strength for entry in details.sweep.strengths] == [0.0, 0.5, 1.0]
    contents = [[(tmp_path / "out" / name).read_bytes() for name in s.images] for s in details.sweep.strengths]
    assert contents[0] != contents[1] != contents[2]
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    shown = [sample["adapter"] for sample in report["samples"] if sample["prompt"] == details.sweep.prompts[0]]
    assert contents[2][0] == (tmp_path / "out" / shown[0]).read_bytes(), "strength 1 is the adapter"
    for strength in (float("nan"), 11.0):
        with pytest.raises(ValidationError):
            EvaluateSettings(strengths=(strength,))


def test_the_details_have_bands_weights_neighbors_and_a_note_if_the_base_cannot_draw_such_images(
    base: Path, adapters: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, clip_folder: Path
) -> None:
    settings = EvaluateSettings(steps=1, seeds=1, embedder=str(clip_folder))
    report = evaluate(settings, str(base), adapters["strong"], make_dataset(), tmp_path / "out")
    details = read_details(tmp_path / "out")
    assert len(details.bands) == 5
    mean = sum(band.losses[CANDIDATE] for band in details.bands) / 5
    assert mean == pytest.approx(report["metrics"]["validation_loss"]["adapter"], abs=1e-5)
    gap = sum(
        sign * (band.losses[role] - band.training[role]) / 5
        for band in details.bands
        for role, sign in ((CANDIDATE, 1), (BASE, -1))
    )
    assert gap == pytest.approx(report["metrics"]["loss_gap"]["adapter"], abs=1e-5)
    assert details.modules
    assert all(module.effective_rank for module in details.modules.values())
    assert details.neighbors
    assert all((tmp_path / "out" / entry.training).is_file() for entry in details.neighbors)
    # The autoencoder of this base is untrained.
    assert details.reconstruction is not None
    assert details.reconstruction < 20
    assert "cannot draw such images" in details.notes[0]
