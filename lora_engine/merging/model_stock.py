"""Model Stock: the mean of the deltas, drawn towards the base by how far they disagree (Jang et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_engine.merging.combinations import Gram, interpolate


def model_stock(weights: Sequence[float], gram: Gram) -> list[float]:
    """The weighted mean times t = n cos / (1 + (n - 1) cos) (Jang et al. 2024, arXiv 2403.19522, equation 7).

    The cosine is the mean over all pairs; the paper assumes one angle for all. Deltas at right angles say nothing
    about a common centre, so that t is 0; below that it is held at 0. A delta of zero is at right angles to all.
    """
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
    drawn = max(0.0, count * cosine / (1 + (count - 1) * cosine)) if cosine > 0 else 0.0
    return [drawn * share for share in shares]
