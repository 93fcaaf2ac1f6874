"""LoRA-FA trains only `up`, and is exported as LoRA."""

import torch
from torch import nn

from lora_engine.adapters import DictTree, LoraDelta, attach, create_adapter
from lora_engine.formats import inspect, read_adapter, write_adapter


def test_training_changes_up_and_not_down(tmp_path):
    torch.manual_seed(0)
    tree = DictTree({"unet": nn.Sequential(nn.Linear(6, 5))}, "sd")
    adapter = create_adapter(tree, "*", "lora-fa", 2, generator=torch.Generator().manual_seed(0))
    with attach(tree, adapter, trainable=True) as attachment:
        assert [name for name, _ in attachment.named_parameters()] == ["unet.0.up"]
        optimizer = torch.optim.SGD(attachment.parameters(), 0.1)
        tree.get_module("unet.0")(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        after = attachment.adapter()
    trained, initial = after.modules["unet.0"], adapter.modules["unet.0"]
    assert torch.equal(trained.down, initial.down)
    assert torch.count_nonzero(trained.up)
    exported = after.to_export()
    assert type(exported.modules["unet.0"]) is LoraDelta
    assert torch.equal(
        exported.modules["unet.0"].delta_weight(torch.zeros(5, 6)), trained.delta_weight(torch.zeros(5, 6))
    )
    path = write_adapter(tmp_path / "a.safetensors", exported)[0]
    assert inspect(path)["kinds"] == {"lora": 1}
    assert read_adapter(path)[0] == exported
