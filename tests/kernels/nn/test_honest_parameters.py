"""Layers call what has another function, another layout or another dtype than the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import msformer_kernels as kernels
from tests.kernels.nn.test_honest import check, layer_and_tokens
from tests.kernels.nn.tools import DIM, HEIGHT, WIDTH, outputs


@pytest.mark.parametrize(("name", "path"), [("mix_ffn", "dwconv.dwconv"), ("attention", "values")])
def test_a_convolution_with_another_function(name: str, path: str) -> None:
    """As tools for seamless images give it one; also in a graph that was compiled before."""
    torch.compiler.reset()
    layer, x = layer_and_tokens(name)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    before = outputs(compiled, x)[0]
    convolution: Any = layer.get_submodule(path)
    own = convolution._conv_forward
    convolution._conv_forward = lambda *arguments: 2 * own(*arguments)
    check(layer, x)
    assert not torch.allclose(outputs(compiled, x)[0], before, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_called(layout: torch.layout) -> None:
    layer, x = layer_and_tokens("mix_ffn")
    for fc1, call in ((layer.fc1, layer), (head := kernels.TokenLinear(DIM, 3), head)):
        expected = call(x, HEIGHT, WIDTH) if call is layer else call(x)
        fc1.weight = nn.Parameter(fc1.weight.detach().to_sparse(layout=layout))
        torch.testing.assert_close(call(x, HEIGHT, WIDTH) if call is layer else call(x), expected)
        assert f"layout {layout}" in str(call.explain())


def test_norms_that_stay_in_float32() -> None:
    """In a model of bfloat16, and fused again under autocast, which takes both."""
    layer, x = layer_and_tokens("block")
    expected = layer(x, HEIGHT, WIDTH)[0]
    layer.bfloat16()
    for norm in (layer.norm1, layer.norm2, layer.mlp.norm1):
        norm.float()
    found = layer(x.bfloat16(), HEIGHT, WIDTH)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert layer.explain().parts["mlp"].reasons["norm"] == "is torch.float32, its input torch.bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.explain().fused
        torch.testing.assert_close(layer(x, HEIGHT, WIDTH)[0], expected, rtol=0.1, atol=0.1)
