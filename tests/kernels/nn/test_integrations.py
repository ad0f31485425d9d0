"""Fine-tuning adapters of peft and offloading of accelerate: the packages themselves, where they are installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = kernels.EfficientTransformerBlock(8, num_heads=2)
        self.head = kernels.TokenLinear(8, 3)
        self.norm = kernels.TokenBatchNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.block(x, 3, 4)[0]))


def model_and_output() -> tuple[Model, Tensor, Tensor]:
    model = Model().eval()
    x = torch.randn(2, 12, 8)
    return model, x, model(x).detach()


ADAPTERS = [
    *(
        ("LoraConfig", target, {"r": 4})
        for target in ("fc1", "fc2", "queries", "keys", "values", "reprojection", "head")
    ),
    ("LoraConfig", "dwconv.dwconv", {"r": 32}),
    ("LoraConfig", "fc1", {"r": 4, "use_dora": True}),
    ("LoraConfig", "values", {"r": 4, "use_dora": True}),
    ("LoraConfig", "fc1", {"r": 4, "bias": "all", "modules_to_save": ["norm1", "head"]}),
    ("IA3Config", "fc1", {"feedforward_modules": ["fc1"]}),
    ("LNTuningConfig", "norm1", {}),
    ("LNTuningConfig", "norm2", {}),
    ("LoHaConfig", "fc2", {"r": 4}),
    ("LoKrConfig", "values", {"r": 4}),
    ("OFTConfig", "fc1", {"oft_block_size": 4, "r": 0}),
    ("VeraConfig", "fc1", {"r": 4}),
]


@pytest.mark.parametrize(("config", "target", "options"), ADAPTERS, ids=lambda v: v if isinstance(v, str) else "")
def test_adapters(config: str, target: str, options: dict[str, Any]) -> None:
    """They do nothing at first, have an effect and gradients once they are trained, and can be merged."""
    peft = pytest.importorskip("peft")
    base, x, expected = model_and_output()
    model = peft.get_peft_model(base, getattr(peft, config)(target_modules=[target], **options)).eval()
    torch.testing.assert_close(model(x), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.5 * torch.randn_like(parameter))
    output = model(x)
    if target != "keys":  # few tokens and heads: a small effect
        assert not torch.allclose(output, expected, atol=1e-3)
    output.square().sum().backward()
    assert all(p.grad is not None for p in trained)
    if target == "dwconv.dwconv":
        return  # peft does not merge depthwise convolutions
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), output, rtol=1e-3, atol=1e-4)
    assert merged.block.explain().fused


@pytest.mark.parametrize("kind", ["cpu", "cpu_with_buffers", "disk", "parts_on_disk"])
def test_offloading(kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    base, x, expected = model_and_output()
    model = copy.deepcopy(base)
    here = torch.device("cpu")
    if kind == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=here)
    elif kind == "parts_on_disk":
        places = {"block": "disk", "head": "cpu", "norm": "cpu"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=here, offload_buffers=kind == "cpu_with_buffers")
    assert model.block.mlp.fc1.weight.is_meta
    torch.testing.assert_close(model(x), expected)
    assert model.block.mlp.explain().reasons["fc1"] == "has another forward"
    assert model.block.mlp.fc1.weight.is_meta
