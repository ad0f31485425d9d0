"""The layers, each as something that can be run, timed, and asked for its results.

All rivals of a case get the same weights and inputs, and so does the exact form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from benchmarks import published
from benchmarks.cases import Case
from benchmarks.rivals import compiled, mode, running, storage_dtype
from benchmarks.shapes import Shape

SEED = 0


class Candidate(Protocol):
    """One rival in one case."""

    mode: str

    def run(self) -> None:
        """What is timed."""

    def results(self) -> dict[str, Tensor]:
        """Of the first run; names of parameters' gradients begin with ``grad.``"""

    def clear(self) -> None:
        """Lets go of what the last run left: outputs and gradients."""


class AttentionLayer(nn.Module):
    """LayerNorm, efficient attention and residual, of tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim)
        self.attn = kernels.EfficientAttention(shape.dim, num_heads=shape.heads)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        output, context = self.attn(x, norm=self.norm1, residual=True)
        return output, context[:, -1]


class FeedForwardLayer(nn.Module):
    """LayerNorm, MixFFN or MixFFN-skip, and residual, of tokens."""

    def __init__(self, shape: Shape, skip: bool) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(shape.dim)
        self.mlp = (kernels.MixFFNSkip if skip else kernels.MixFFN)(shape.dim, shape.hidden)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.mlp(x, height, width, norm=self.norm2, residual=True)


class Block(nn.Module):
    """The transformer block; returns the context of the last head, as the published one does."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim)
        self.attn = kernels.EfficientAttention(shape.dim, num_heads=shape.heads)
        self.norm2 = nn.LayerNorm(shape.dim)
        self.mlp = kernels.MixFFNSkip(shape.dim, shape.hidden)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        x, context = self.attn(x, norm=self.norm1, residual=True)
        return self.mlp(x, height, width, norm=self.norm2, residual=True), context[:, -1]


OURS: dict[str, Callable[[Shape], nn.Module]] = {
    "attention": AttentionLayer,
    "mix_ffn": lambda shape: FeedForwardLayer(shape, skip=False),
    "mix_ffn_skip": lambda shape: FeedForwardLayer(shape, skip=True),
    "block": Block,
}
PUBLISHED: dict[str, Callable[[Shape], nn.Module]] = {
    "attention": published.PublishedAttentionLayer,
    "mix_ffn": lambda shape: published.PublishedFeedForwardLayer(shape, skip=False),
    "mix_ffn_skip": lambda shape: published.PublishedFeedForwardLayer(shape, skip=True),
    "block": published.PublishedBlock,
}


def seeded_module(case: Case) -> nn.Module:
    """Ours, float32, with seeded weights that bfloat16 can hold if the case is in it. No vector is all 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        module = OURS[case.operation](case.shape)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                parameter.copy_(_representable(parameter, case.dtype))
    return module


def seeded_tokens(case: Case, seed: int) -> Tensor:
    """Normal ``[B, N, C]``, float32."""
    shape = case.shape
    generator = torch.Generator().manual_seed(seed)
    return _representable(
        torch.randn(shape.batch, shape.height * shape.width, shape.dim, generator=generator), case.dtype
    )


def _representable(x: Tensor, dtype: str) -> Tensor:
    return x.bfloat16().float() if dtype == "bfloat16" else x


class Layer:
    """Forward, or forward and backward, of a layer."""

    def __init__(self, case: Case, rival: str) -> None:
        self.case, self.rival, self.mode = case, rival, mode(rival, case.dtype, whole_model=False)
        self.channels_first = rival == "published" and case.operation in ("attention", "block")
        dtype = storage_dtype(rival, case.dtype)
        module = seeded_module(case)
        if rival == "published":
            ours, module = module, PUBLISHED[case.operation](case.shape)
            module.load_state_dict(ours.state_dict())
        self.module = module.to(dtype).requires_grad_(case.training)
        self.input = self._own_layout(seeded_tokens(case, SEED + 1)).to(dtype).requires_grad_(case.training)
        self.gradient = self._own_layout(seeded_tokens(case, SEED + 2)).to(dtype)
        self.forward = compiled(rival, self.module)
        self.outputs: tuple[Tensor, ...] = ()

    def run(self) -> None:
        self.clear()
        with torch.set_grad_enabled(self.case.training):
            with running(self.rival, self.case.dtype):
                found = self.forward(self.input, self.case.shape.height, self.case.shape.width)
            self.outputs = found if isinstance(found, tuple) else (found,)
            if self.case.training:
                self.outputs[0].backward(self.gradient)

    def clear(self) -> None:
        self.outputs = ()
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def results(self) -> dict[str, Tensor]:
        found = {"output": self._tokens(self.outputs[0].detach())}
        if len(self.outputs) > 1:
            found["context"] = self.outputs[1].detach()
        if self.case.training:
            assert self.input.grad is not None
            found["input gradient"] = self._tokens(self.input.grad)
            found |= parameter_gradients(self.module)
        return found

    def _own_layout(self, tokens: Tensor) -> Tensor:
        if not self.channels_first:
            return tokens
        return tokens.transpose(1, 2).unflatten(2, (self.case.shape.height, self.case.shape.width)).contiguous()

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) if self.channels_first else x


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Raises RuntimeError for a parameter without one."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"{name} got no gradient")
        found[f"grad.{name}"] = parameter.grad
    return found
