"""rsLoRA is LoRA with another alpha."""

import math

import pytest
import torch
from law_adapters import fresh_delta

from lora_engine.adapters import LoraDelta
from lora_engine.errors import SettingsError


def create(rank, alpha, **options):
    return fresh_delta(torch.nn.Conv2d(16, 16, 3), "rslora", rank, alpha, **options)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 1.0), (9, 2.5), (16, None)])
def test_the_scale_is_alpha_over_the_root_of_the_rank(rank, alpha):
    delta = create(rank, alpha)
    assert type(delta) is LoraDelta
    assert delta.scale == pytest.approx((rank if alpha is None else alpha) / math.sqrt(rank))


def test_a_core_is_optional_and_a_rank_too_large_is_refused():
    assert create(2, 1.0, tucker=True).mid is not None
    with pytest.raises(SettingsError, match="rank 17"):
        create(17, 1.0)
