"""Model Stock: the mean of the deltas, moved towards the base the more they disagree (Jang et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lora_engine.merging.methods.method import Combination, Gram
from lora_engine.merging.methods.sums import interpolate
from lora_engine.merging.spec import MergeOptions


class ModelStock(MergeOptions):
    """Model Stock (Jang et al. 2024): the mean, moved towards the base the more the adapters disagree."""

    method: Literal["model-stock"] = "model-stock"


def model_stock(weights: Sequence[float], gram: Gram) -> list[float]:
    """Returns the weighted mean times t = n cos / (1 + (n - 1) cos) (Jang et al. 2024, arXiv 2403.19522, equation 7).

    The cosine is the mean over all pairs; the paper assumes one angle for all. Orthogonal deltas have no common center,
    so t is 0. A negative t is clamped to 0. A delta of zero counts as orthogonal to all.
    """
    import torch

    shares = interpolate(weights, gram)
    count = len(weights)
    if count == 1:
        return shares
    inner = gram()
    lengths = inner.diagonal().sqrt()
    norms = lengths[:, None] * lengths[None, :]
    cosines = torch.where(norms > 0, inner / torch.where(norms > 0, norms, torch.ones_like(norms)), 0.0)
    above = torch.triu(torch.ones_like(cosines), diagonal=1).bool()
    cosine = min(1.0, float(cosines[above].mean()))
    ratio = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
    return [ratio * share for share in shares]


MODEL_STOCK = Combination(
    spec=ModelStock,
    title="mean, moved towards the base the more the adapters disagree",
    coefficients=model_stock,
    sees_deltas=True,
    normalizes=True,
)
