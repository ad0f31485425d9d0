"""Tensors of more than 2^31 elements, for real: python -m tests.kernels.native.large

The input is one image, expanded to a batch of more than 2^31 values; output and gradients are full tensors of bfloat16,
4.3 GB each (11 GB of memory in all, a minute an operator). Each image of the result must have the bits of the one
alone, up to the order of sums, and gradients of parameters must be the sums.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import msformer_kernels as kernels

HEIGHT, WIDTH, CHANNELS = 64, 128, 8
BATCH = 2**31 // (HEIGHT * WIDTH * CHANNELS) + 3
EPS = torch.finfo(torch.bfloat16).eps
ALLOWED = {"batch_norm": 0.02, "efficient_attention": EPS, "efficient_self_attention": EPS}
"""Of the largest value: BatchNorm is over all images, and the tokens of an image alone are summed in more parts."""
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, v: kernels.linear(x, w, v, backend="native"),
    "batch_norm": lambda x, w, v: kernels.batch_norm(x, v, v, backend="native")[0],
    "efficient_attention": lambda x, w, v: _attention(x),
    "efficient_self_attention": lambda x, w, v: kernels.efficient_self_attention(
        x, w, v, w, v, w, v, w, v, num_heads=2, norm_weight=v, residual=True, backend="native"
    )[0],
    "mix_ffn": lambda x, w, v: kernels.mix_ffn(
        x, HEIGHT, WIDTH, w, v, w[:, :1, None, None].expand(-1, 1, 3, 3), v, w, v, skip=True, backend="native"
    ),
}


def _attention(x: Tensor) -> Tensor:
    heads = x.unflatten(2, (2, -1)).transpose(1, 2)
    return kernels.efficient_attention(heads, heads, heads, backend="native")[0].transpose(1, 2)


def compare(name: str) -> list[str]:
    """What differs between the images of a large batch and one alone."""
    torch.manual_seed(0)
    image, given = (torch.randn(1, HEIGHT * WIDTH, CHANNELS).bfloat16() for _ in range(2))
    w, v = torch.randn(CHANNELS, CHANNELS).bfloat16(), torch.randn(CHANNELS).bfloat16()

    def results(batch: int) -> tuple[Tensor, ...]:
        x = image.expand(batch, -1, -1).requires_grad_()
        weights = [w.clone().requires_grad_(), v.clone().requires_grad_()]
        output = OPERATORS[name](x, *weights)
        incoming = given.expand(batch, -1, -1)
        incoming = incoming if output.dim() == 3 else incoming.unflatten(2, (2, -1))
        return (output.detach(), *torch.autograd.grad(output, [x, *weights], incoming, allow_unused=True))

    one = results(1 if name != "batch_norm" else 2)
    many = results(BATCH)
    assert many[0].numel() > 2**31
    faults = []
    for what, few, all_ in zip(("output", "grad_x"), one, many, strict=False):
        for i in (0, 1, BATCH // 2, BATCH - 2, BATCH - 1):
            largest = (all_[i].float() - few[0].float()).abs().max().item()
            if largest > ALLOWED.get(name, 0.0) * few.abs().max().item():
                faults.append(f"{what} of image {i} differs by {largest:.3g}")
    for what, few, all_ in zip(("w", "v"), one[2:], many[2:], strict=True):
        if few is None:
            continue
        expected = few.double() * (BATCH / (1 if name != "batch_norm" else 2))
        largest = ((all_.double() - expected).abs().max() / expected.abs().max()).item()
        if not largest < 0.02:
            faults.append(f"gradient of {what} differs by {largest:.3g} of the largest")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(OPERATORS))
    options = parser.parse_args()
    wrong = 0
    for name in [options.only] if options.only else list(OPERATORS):
        start = time.monotonic()
        faults = compare(name)
        wrong += bool(faults)
        said = "; ".join(faults) or "right"
        print(f"{name}: [{BATCH}, {HEIGHT * WIDTH}, {CHANNELS}] {said}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
