"""KID, CMMD and FID equal scikit-learn's kernels, scipy's matrix root and torchmetrics, and refuse small sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.evaluation.distributions import (
    frechet_distance,
    kernel_distance,
    mean_discrepancy,
)

TORCHMETRICS = {"kid": 0.903221, "fid": 1.626266}
"""Of torchmetrics 1.9.0 for the features of seeds 4 and 5, which a test computes again where it is installed."""


def features(seed: int, count: int, width: int = 8, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 1.2 + shift


def unbiased(within: np.ndarray, other: np.ndarray, mixed: np.ndarray) -> float:
    means = [(matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1)) for matrix in (within, other)]
    return float(sum(means) - 2 * mixed.mean())


@pytest.mark.parametrize(("m", "n"), [(2, 3), (40, 25), (150, 150)])
def test_the_kernel_distances_are_those_of_scikit_learns_kernels(m: int, n: int) -> None:
    from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

    real, generated = features(0, m).double().numpy(), features(1, n, shift=0.4).double().numpy()
    kid = unbiased(*(polynomial_kernel(a, b, 3) for a, b in ((real, real), (generated, generated), (real, generated))))
    assert kernel_distance(torch.tensor(real), torch.tensor(generated)) == pytest.approx(kid, abs=1e-10)
    cmmd = unbiased(*(rbf_kernel(a, b, 1 / 200) for a, b in ((real, real), (generated, generated), (real, generated))))
    assert mean_discrepancy(torch.tensor(real), torch.tensor(generated)) == pytest.approx(1_000 * cmmd, abs=1e-8)


def test_fid_is_that_of_scipys_matrix_root() -> None:
    from scipy.linalg import sqrtm

    real, generated = features(2, 1_000).double(), features(3, 1_200, shift=0.3).double() * 0.8
    first, second = np.cov(real.numpy().T), np.cov(generated.numpy().T)
    gap = (real.mean(0) - generated.mean(0)).square().sum()
    expected = float(gap) + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(real, generated) == pytest.approx(expected, abs=1e-6)


def test_the_recorded_values_of_torchmetrics_are_met() -> None:
    real, generated = features(4, 1_000), features(5, 1_000, shift=0.45)
    assert kernel_distance(real, generated) == pytest.approx(TORCHMETRICS["kid"], abs=1e-4)
    assert frechet_distance(real, generated) == pytest.approx(TORCHMETRICS["fid"], abs=1e-4)


def test_torchmetrics_gives_the_recorded_values() -> None:
    kid_module = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    fid_module = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Flat(torch.nn.Module):
        num_features = 8

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    batches = [features(seed, 1_000, shift=shift).view(-1, 8, 1, 1) for seed, shift in ((4, 0.0), (5, 0.45))]
    kid = kid_module.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=1_000, normalize=False)
    fid = fid_module.FrechetInceptionDistance(feature=Flat(), normalize=False)
    fid.set_dtype(torch.float64)
    for metric in (kid, fid):
        for is_real, batch in zip((True, False), batches, strict=True):
            metric.update(batch.double() if metric is fid else batch, real=is_real)
    assert float(kid.compute()[0]) == pytest.approx(TORCHMETRICS["kid"], abs=1e-4)
    assert float(fid.compute()) == pytest.approx(TORCHMETRICS["fid"], abs=1e-4)


def test_equal_sets_have_no_distance_on_average_and_shifted_ones_have() -> None:
    width = 64
    gaps: dict[float, list[float]] = {0.0: [], 0.12: []}
    for trial in range(20):
        for shift, values in gaps.items():
            real, generated = features(2 * trial, 96, width), features(2 * trial + 1, 96, width, shift)
            values.append(mean_discrepancy(F.normalize(real, dim=1), F.normalize(generated, dim=1)))
    equal, shifted = (np.asarray(gaps[shift]) for shift in (0.0, 0.12))
    assert abs(equal.mean()) < 3 * equal.std() / math.sqrt(len(equal))
    assert (equal < 0).any(), "an unbiased estimate of 0 is negative half of the time"
    assert np.mean(shifted[:, None] > equal[None]) > 0.9


def test_small_sets_are_refused_or_marked() -> None:
    with pytest.raises(SettingsError, match=r"999 real and 999 .* at least 1000 .*use kid or cmmd"):
        frechet_distance(features(0, 999), features(1, 999))
    for distance in (kernel_distance, mean_discrepancy):
        with pytest.raises(SettingsError, match="at least 2"):
            distance(features(0, 1), features(1, 5))
    with pytest.raises(SettingsError, match=r"\[5, 8\] and \[5, 4\]"):
        kernel_distance(features(0, 5), features(1, 5, width=4))
