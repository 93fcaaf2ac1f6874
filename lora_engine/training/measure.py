"""Elementwise losses and timestep weights. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.specs.objective import L2, Debiased, Loss, MinSnr, SoftMinSnr, Weighting

# Only zero-terminal-SNR schedules go below this ratio; debiased weights would be unbounded there.
_MIN_SNR = 1e-3
_MAX_SNR = 1e3
_SQUARE = L2()


@dataclass(frozen=True)
class Measure:
    """An elementwise loss with timestep weights.

    Attributes:
        loss: Loss of an error by its size.
        weigh: Timesteps [n] -> weights, float32 [n]; None weighs all alike.
        deltas: Timesteps [n] -> deltas of the loss, float32 [n]; None takes `loss.delta` for all.
    """

    loss: Loss = _SQUARE
    weigh: Callable[[Tensor], Tensor] | None = None
    deltas: Callable[[Tensor], Tensor] | None = None

    def errors(self, predicted: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the weighted loss of each element, in the shape of `predicted`; keeps the graph.

        Args:
            predicted: float32 [n, ...].
            target: float32 in the same shape.
            timesteps: [n].
        """
        if self.deltas is None:
            errors = _LOSSES[self.loss.name](predicted, target, getattr(self.loss, "delta", 0.0))
        else:
            deltas = self.deltas(timesteps).to(predicted.device, predicted.dtype).view(-1, *[1] * (predicted.dim() - 1))
            errors = _huber_of_rows(predicted, target, deltas)
            errors = errors / (2.0 * deltas) if self.loss.name == "smooth_l1" else errors
        if self.weigh is None:
            return errors
        weights = self.weigh(timesteps).to(errors.device, errors.dtype)
        return errors * weights.view(-1, *[1] * (errors.dim() - 1))


PLAIN = Measure()
"""The squared error, at all timesteps alike."""


def snr_weights(weighting: Weighting, snr: Tensor, predicts_v: bool) -> Tensor:
    """Returns the weight at a signal-to-noise ratio: float32 [n], finite for every ratio, 0 included.

    With `s` for the ratio and `g` for gamma:

    | | noise | v |
    |---|---|---|
    | min_snr | min(s, g) / s | min(s, g) / (s + 1) |
    | soft_min_snr | g / (s + g) | g s / ((s + g) (s + 1)) |
    | debiased | 1 / sqrt(s), s clamped to 1e-3 ... 1e3 | 1 / (s + 1) |

    Args:
        weighting: See `Objective`.
        snr: [n], from 0 on.
        predicts_v: True if the network predicts v, False if it predicts noise.
    """
    snr = snr.to(torch.float32)
    if isinstance(weighting, MinSnr):
        # This form gives the limit 1 at 0 for noise, not 0 / 0.
        capped = (weighting.gamma / snr).clamp(max=1.0)
        return snr.clamp(max=weighting.gamma) / (snr + 1) if predicts_v else capped
    if isinstance(weighting, SoftMinSnr):
        soft = weighting.gamma / (snr + weighting.gamma)
        return soft * (snr / (snr + 1)) if predicts_v else soft
    if isinstance(weighting, Debiased):
        return 1 / (snr + 1) if predicts_v else snr.clamp(_MIN_SNR, _MAX_SNR).rsqrt()
    return torch.ones_like(snr)


def _huber(predicted: Tensor, target: Tensor, delta: float) -> Tensor:
    # Twice Huber's (1964) function, so that small errors give the square, not half of it.
    doubled: Tensor = 2.0 * F.huber_loss(predicted, target, reduction="none", delta=delta)
    return doubled


def _huber_of_rows(predicted: Tensor, target: Tensor, deltas: Tensor) -> Tensor:
    difference = (predicted - target).abs()
    return torch.where(difference < deltas, difference.square(), deltas * (2.0 * difference - deltas))


_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "l2": lambda predicted, target, _: F.mse_loss(predicted, target, reduction="none"),
    "l1": lambda predicted, target, _: F.l1_loss(predicted, target, reduction="none"),
    "huber": _huber,
    "smooth_l1": lambda predicted, target, delta: F.smooth_l1_loss(predicted, target, reduction="none", beta=delta),
}
