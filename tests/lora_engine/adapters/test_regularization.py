"""Dropout of ranks and modules, and the limit of norms."""

from __future__ import annotations

import pytest
import torch
from lora_engine.adapters.attach import Attachment
from torch import nn

from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.adapters.regularization import check_low_rank, draw_skipped, limit_norms
from lora_engine.errors import SettingsError
from lora_engine.seeds import generator


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.conv = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in (self.to_q, self.to_k, self.to_v)], dim=-1)


def attached(kind: str = "lora", rank: int = 4) -> tuple[Net, Attachment]:
    net = Net()
    adapter = create_adapter({"unet": net}, "re:unet.(to_.|conv)", kind, rank, 2.0, generator=generator(1, "factors"))
    attachment = attach({"unet": net}, adapter, trainable=True)
    with torch.no_grad():
        for number, value in enumerate(attachment.parameters()):
            value.add_(0.1 * torch.randn(value.shape, generator=generator(number, "values")))
    return net, attachment


def x() -> torch.Tensor:
    return torch.randn(5, 6, generator=generator(3, "x"))


def test_a_skipped_module_is_the_base_bit_for_bit_and_has_no_gradient() -> None:
    net, attachment = attached()
    base = Net()
    whole, plain = net(x()), base(x())
    seen = set()
    for seed in range(20):
        with attachment.adapter_dropout(0.0, seed, modules=0.5):
            out = net(x())
        parts = [slice(0, 6), slice(6, 12), slice(12, 18)]
        skipped = tuple(torch.equal(out[:, part], plain[:, part]) for part in parts)
        for part, is_skipped in zip(parts, skipped, strict=True):
            if not is_skipped:
                torch.testing.assert_close(out[:, part], whole[:, part])
        seen.add(skipped)
        out.sum().backward() if not all(skipped) else None
        for name, is_skipped in zip(("to_q", "to_k", "to_v"), skipped, strict=True):
            factors = [value for key, value in attachment.named_parameters() if key.startswith(f"unet.{name}")]
            assert all((value.grad is None) == is_skipped for value in factors)
            for value in factors:
                value.grad = None
    assert len(seen) > 4
    assert torch.equal(net(x()), whole), "the context ends with the block"


def test_never_are_all_modules_skipped() -> None:
    names = ["a", "b", "c"]
    counts = [len(draw_skipped(names, 0.95, generator(seed, "draw"))) for seed in range(200)]
    assert max(counts) == 2
    assert min(counts) < 2
    assert draw_skipped(["alone"], 0.9, generator(0, "draw")) == set()


def test_rank_dropout_drops_whole_ranks_and_scales_the_others() -> None:
    net, attachment = attached()
    delta = attachment.adapter().modules["unet.to_q"]
    up, down = delta.factors()["up"], delta.factors()["down"]
    plain = net.to_q.base(x())
    kept = set()
    for seed in range(30):
        with attachment.adapter_dropout(0.0, seed, ranks=0.5):
            out = net.to_q(x()) - plain
            mask = net.to_q.rank_mask.clone()
        assert set(mask.tolist()) <= {0.0, 2.0}
        torch.testing.assert_close(out, x() @ (up * mask @ down * (2.0 / 4)).T, rtol=1e-4, atol=1e-5)
        kept.add(tuple(mask.tolist()))
    assert len(kept) > 8
    mean = torch.tensor(sorted(kept)).mean(dim=0)
    assert (mean > 0.5).all()


def test_equal_seeds_drop_the_same_and_the_global_generator_is_left_alone() -> None:
    net, attachment = attached()
    state = torch.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        with attachment.adapter_dropout(0.3, seed, ranks=0.3, modules=0.3):
            outputs.append(net(x()).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["lora", "rslora", "lora-fa"])
@pytest.mark.parametrize("limit", [1e-3, 0.2, 1e3])
def test_norms_are_limited_as_in_sd_scripts(kind: str, limit: float) -> None:
    _, attachment = attached(kind)
    before = attachment.adapter().modules
    attachment.limit_norms(limit)
    after = attachment.adapter().modules
    for name, delta in before.items():
        up, down = delta.factors()["up"], delta.factors()["down"]
        # sd-scripts' `apply_max_norm_regularization`: ratio = min(norm, limit) / norm, its root for each factor.
        norm = (up.flatten(1) @ down.flatten(1)).norm() * delta.scale
        ratio = (limit / norm).clamp(max=1.0)
        changed = after[name].factors()
        if kind == "lora-fa":
            torch.testing.assert_close(changed["up"], up * ratio)
            assert torch.equal(changed["down"], down)
        else:
            torch.testing.assert_close(changed["up"], up * ratio.sqrt())
            torch.testing.assert_close(changed["down"], down * ratio.sqrt())
        left = (changed["up"].flatten(1) @ changed["down"].flatten(1)).norm() * delta.scale
        assert left <= limit * (1 + 1e-4)
        if norm < limit:
            assert torch.equal(changed["up"], up)


def test_a_delta_of_zero_and_other_kinds_are_left_alone() -> None:
    net = Net()
    for kind in ("lora", "loha"):
        adapter = create_adapter({"unet": net}, "re:unet.to_.", kind, 2, generator=generator(1, "factors"))
        copies = {
            name: {key: value.clone() for key, value in delta.factors().items()}
            for name, delta in adapter.modules.items()
        }
        limit_norms(adapter.modules, 1e-6)
        for name, delta in adapter.modules.items():
            assert all(torch.equal(value, copies[name][key]) for key, value in delta.factors().items())


@pytest.mark.parametrize(("kind", "options"), [("loha", {}), ("dora", {}), ("lora", {"tucker": True})])
def test_kinds_without_a_plain_product_are_refused(kind: str, options: dict[str, bool]) -> None:
    def adapter(kind: str, **options: bool) -> Adapter:
        net = {"unet": Net()}
        return create_adapter(net, "re:unet.conv", kind, 2, options=options, generator=generator(1, "factors"))

    with pytest.raises(SettingsError, match=r"norm_limit needs deltas that are up @ down, but that of 'unet.conv'"):
        check_low_rank(adapter(kind, **options), "norm_limit")
    check_low_rank(adapter("lora"), "norm_limit")
