"""The specification itself, against the formulas written out for one token and one channel at a time."""

from __future__ import annotations

import math

import pytest
import torch

import msformer_kernels as kernels


def test_efficient_attention_by_hand() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1).double()
    context, expected = [], []
    for j in range(2):
        weights = [math.exp(k[n, j]) for n in range(4)]
        context.append(sum(w * v[n, 0].item() for n, w in enumerate(weights)) / sum(weights))
    for i in range(3):
        weights = [math.exp(q[i, j]) for j in range(2)]
        expected.append(sum(w * c for w, c in zip(weights, context, strict=True)) / sum(weights))
    output, found = kernels.efficient_attention(q[None, None], k[None, None], v[None, None], backend="reference")
    assert found.flatten().tolist() == pytest.approx(context)
    assert output.flatten().tolist() == pytest.approx(expected)


def test_scaling_normalization_is_linear_attention_over_n() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    output, _ = kernels.efficient_attention(q, k, v, normalization="scaling", backend="reference")
    torch.testing.assert_close(output, q @ k.transpose(-1, -2) @ v / 6)


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_masking_equals_removing(normalization: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 4)
    keep = torch.tensor([[True, False, True, True, False, True, False]])
    masked = kernels.efficient_attention(q, k, v, mask=keep, normalization=normalization, backend="reference")
    removed = kernels.efficient_attention(
        q, k[:, :, keep[0]], v[:, :, keep[0]], normalization=normalization, backend="reference"
    )
    torch.testing.assert_close(masked, removed)


def test_mix_ffn_by_hand() -> None:
    """One channel, 2 x 2 image, identity linears: a 3x3 convolution with zero padding, the skip, and GELU."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    taps = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)
    found = kernels.mix_ffn(x, 2, 2, one, None, taps, None, one, None, skip=True, residual=True, backend="reference")
    # top left: centre tap 5, right 6, below 8, below right 9
    z = 1 * 5 + 2 * 6 + 3 * 8 + 4 * 9 + 1
    assert found[0, 0, 0].item() == pytest.approx(1 + z * 0.5 * (1 + math.erf(z / math.sqrt(2))))


def test_heads_are_contiguous_slices() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4)
    weights = [torch.randn(4, 4) for _ in range(4)]
    arguments = [t for w in weights for t in (w, None)]
    two, context = kernels.efficient_self_attention(x, *arguments, num_heads=2, backend="reference")
    one = sum(
        kernels.efficient_self_attention(
            x,
            *(t for w in (*(w[h : h + 2] for w in weights[:3]), weights[3][:, h : h + 2]) for t in (w, None)),
            backend="reference",
        )[0]
        for h in (0, 2)
    )
    torch.testing.assert_close(two, one)
    assert context.shape == (1, 2, 2, 2)
