"""One fitting step of MS-Former, and a whole image: each rival as something that can be run and timed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import DEPTH, IMAGE_STEPS, Case
from benchmarks.published import PublishedMSFormer
from benchmarks.rivals import backend_of, compiled, is_exact, mode, running
from benchmarks.workloads import SEED, Candidate, Layer, parameter_gradients
from msformer import segmentation
from msformer.data import prepare_image, resize_image
from msformer.losses import total_loss
from msformer.model import MSFormer
from msformer.presets import LossWeights
from msformer.synthetic import synthetic_lesion


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


class Step:
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


class Image:
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


class FirstLoss:
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
