"""Each rival in each case as something that can be run, timed, and asked for its results: the layers, one fitting step
of MS-Former, and a whole image.

All rivals of a case get the same weights and inputs, and so does the exact form.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from msformer import segmentation
from msformer.io.prepare import prepare_image, resize_image
from msformer.losses import total_loss
from msformer.model import MSFormer
from msformer.presets import LossWeights
from msformer.synthetic import synthetic_lesion

from . import published
from .cases import DEPTH, IMAGE_STEPS, Case, Shape
from .machine import peak_memory
from .published import PublishedMSFormer
from .rivals import backend_of, compiled, is_exact, mode, running, storage_dtype

SEED = 0


class Candidate(ABC):
    """One rival in one case."""

    mode: str

    @abstractmethod
    def run(self) -> None:
        """What is timed."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """Of the first run; names of parameters' gradients begin with ``grad.``"""

    @abstractmethod
    def clear(self) -> None:
        """Lets go of what the last run left: outputs and gradients."""

    def sample(self, calls: int) -> float:
        """Seconds a call."""
        gc.disable()
        try:
            started = time.perf_counter()
            for _ in range(calls):
                self.run()
            return (time.perf_counter() - started) / calls
        finally:
            gc.enable()
            self.clear()

    def peak(self) -> int | None:
        """Bytes that a call adds; None where that is not known."""
        self.clear()
        gc.collect()
        try:
            return peak_memory(self.run)
        except (RuntimeError, MemoryError):
            return None
        finally:
            self.clear()


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


class Layer(Candidate):
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


def make_candidate(case: Case, rival: str) -> Candidate:
    """What runs `rival`, or the exact form, in a case."""
    if case.operation == "image":
        return FirstLoss(case, rival) if is_exact(rival) else Image(case, rival)
    return Step(case, rival) if case.operation == "step" else Layer(case, rival)


def seeded_model(case: Case, rival: str) -> MSFormer | PublishedMSFormer:
    """In float32, or float64 for the exact form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        ours = MSFormer(embed_dim=case.shape.dim, depth=DEPTH)
    if rival == "published":
        published = PublishedMSFormer(case.shape, DEPTH)
        published.load_state_dict(ours.state_dict())
        return published
    return ours.double() if is_exact(rival) else ours


class Step(Candidate):
    """Forward, losses, backward and optimiser; weights and momentum go on from run to run."""

    def __init__(self, case: Case, rival: str) -> None:
        self.case, self.rival, self.mode = case, rival, mode(rival, case.dtype, whole_model=True)
        model = self.model = seeded_model(case, rival)
        dtype = torch.float64 if is_exact(rival) else torch.float32
        generator = torch.Generator().manual_seed(SEED + 1)
        shape = case.shape
        self.image = torch.rand(shape.batch, 3, shape.height, shape.width, generator=generator).to(dtype)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

        def loss_of(image: Tensor) -> Tensor:
            output = model(image)
            return total_loss(output, output.logits.argmax(1), LossWeights())

        self.loss_of = compiled(rival, loss_of)
        self.loss: Tensor | None = None

    def run(self) -> None:
        self.loss = None
        with running(self.rival, self.case.dtype, whole_model=True):
            loss = self.loss_of(self.image)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def clear(self) -> None:
        self.loss = None
        self.optimizer.zero_grad()

    def results(self) -> dict[str, Tensor]:
        assert self.loss is not None
        return {"loss": self.loss} | parameter_gradients(self.model)


def _picture(case: Case) -> Any:
    return synthetic_lesion(SEED, max(64, case.shape.height), max(64, case.shape.width)).image


class Image(Candidate):
    """`msformer.segment` with a fixed number of steps; the model that it fits is the rival's.

    Compiled once, the model gets new weights for each image, as somebody would do it who has many images.
    """

    def __init__(self, case: Case, rival: str) -> None:
        self.case, self.rival, self.mode = case, rival, mode(rival, case.dtype, whole_model=True)
        self.picture = _picture(case)
        self.kept: Any = None
        if rival in ("published", "compile"):
            self.kept = compiled(rival, seeded_model(case, rival))
        self.result: segmentation.Segmentation | None = None

    def run(self) -> None:
        shape = self.case.shape
        with mock.patch.object(segmentation, "MSFormer", self._make_model):
            self.result = segmentation.segment(
                self.picture,
                preset="published",
                size=(shape.height, shape.width),
                max_steps=IMAGE_STEPS,
                min_labels=1,
                seed=SEED,
                embed_dim=shape.dim,
                depth=DEPTH,
                num_heads=shape.heads,
                device="cpu",
                backend=backend_of(self.rival),
            )

    def _make_model(self, *arguments: Any) -> Any:
        """What `segment` calls for its model: ours with seeded weights, or the kept one with the same weights."""
        ours = MSFormer(*arguments)
        if self.kept is None:
            return ours
        getattr(self.kept, "_orig_mod", self.kept).load_state_dict(ours.state_dict())
        self.kept.zero_grad()
        return self.kept

    def clear(self) -> None:
        self.result = None
        if self.kept is not None:
            self.kept.zero_grad()

    def results(self) -> dict[str, Tensor]:
        """The first loss alone: from then on rounding decides which label a pixel gets."""
        assert self.result is not None
        return {"loss": torch.tensor(self.result.losses[0])}


class FirstLoss(Candidate):
    """The first loss of `Image`, in float64."""

    def __init__(self, case: Case, rival: str) -> None:
        self.case, self.rival, self.mode = case, rival, "float64"
        self.loss: Tensor | None = None

    def run(self) -> None:
        shape = self.case.shape
        model = seeded_model(self.case, self.rival).train()
        image = resize_image(prepare_image(_picture(self.case)), (shape.height, shape.width))[None].double()
        with torch.no_grad(), running(self.rival, "float32"):
            output = model(image)
            self.loss = total_loss(output, output.logits.argmax(1), LossWeights())

    def clear(self) -> None:
        self.loss = None

    def results(self) -> dict[str, Tensor]:
        assert self.loss is not None
        return {"loss": self.loss}
