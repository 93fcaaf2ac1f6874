"""How an error counts: by its size, and by the timestep at which it was made. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.specs.objective import L2, Debiased, Loss, MinSnr, SoftMinSnr, Weighting

# Below this ratio of signal to noise only schedules with no signal at the end go; debiasing would let it count without
# bounds there.
_LEAST_SNR = 1e-3
_MOST_SNR = 1e3
_SQUARE = L2()


@dataclass(frozen=True)
class Measure:
    """How an error counts: by its size, and by its timestep.

    Attributes:
        loss: By its size.
        weigh: From timesteps [n] to weights, float32 [n]; None weighs all alike.
    """

    loss: Loss = _SQUARE
    weigh: Callable[[Tensor], Tensor] | None = None

    def errors(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """How much each element counts, in the shape of `predicted`; keeps the graph.

        Args:
            predicted: float32 [n, ...].
            target: Of the same shape.
            timesteps: [n].
        """
        found = _LOSSES[self.loss.name](predicted, target, getattr(self.loss, "delta", 0.0))
        if self.weigh is None:
            return found
        weights = self.weigh(timesteps).to(found.device, found.dtype)
        return found * weights.view(-1, *[1] * (found.dim() - 1))


PLAIN = Measure()
"""The square of the error, at all timesteps alike."""


def snr_weights(weighting: Weighting, snr: Tensor, predicts_v: bool) -> Tensor:
    """What an error counts at a ratio of signal to noise: float32 [n], finite for every ratio, 0 included.

    With `s` for the ratio and `g` for gamma:

    | | noise | v |
    |---|---|---|
    | min_snr | min(s, g) / s | min(s, g) / (s + 1) |
    | soft_min_snr | g / (s + g) | g s / ((s + g) (s + 1)) |
    | debiased | 1 / sqrt(s), s kept within 1e-3 ... 1e3 | 1 / (s + 1) |

    Args:
        weighting: See `Objective`.
        snr: [n], from 0 on.
        predicts_v: Whether the network predicts v, and not noise.
    """
    snr = snr.to(torch.float32)
    if isinstance(weighting, MinSnr):
        # Written so that 0 gives 1 for noise: the limit, and not 0 / 0.
        capped = (weighting.gamma / snr).clamp(max=1.0)
        return snr.clamp(max=weighting.gamma) / (snr + 1) if predicts_v else capped
    if isinstance(weighting, SoftMinSnr):
        soft = weighting.gamma / (snr + weighting.gamma)
        return soft * (snr / (snr + 1)) if predicts_v else soft
    if isinstance(weighting, Debiased):
        return 1 / (snr + 1) if predicts_v else snr.clamp(_LEAST_SNR, _MOST_SNR).rsqrt()
    return torch.ones_like(snr)


def _huber(predicted: Tensor, target: Tensor, delta: float) -> Tensor:
    # Twice Huber's (1964) function, so that its bottom is the square and not half of it.
    doubled: Tensor = 2.0 * F.huber_loss(predicted, target, reduction="none", delta=delta)
    return doubled


_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": lambda predicted, target, _: F.mse_loss(predicted, target, reduction="none"),
    "l1": lambda predicted, target, _: F.l1_loss(predicted, target, reduction="none"),
    "huber": _huber,
    "smooth_l1": lambda predicted, target, delta: F.smooth_l1_loss(predicted, target, reduction="none", beta=delta),
}
