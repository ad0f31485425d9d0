"""How the output of a patched module lies in memory: as that of the original, for inputs of either layout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import attentions, blocks, decoders, images, mix_ffns, relu_attentions
from tests.kernels.patching.test_linear_attention import VideoAttention


class TokensAttention(attentions.EfficientAttention):
    """Its last layer takes tokens, so its image lies channels last, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.reprojection = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).flatten(2).unflatten(1, (self.head_count, -1)) for p in (self.queries, self.keys, self.values))
        attended = (k.softmax(-1) @ v.mT).mT @ q.softmax(-2)
        return images.tokens_to_image(self.reprojection(attended.flatten(1, 2).transpose(1, 2)), *x.shape[2:])


class CopyingBlock(blocks.ImageBlock):
    """segmentation_models_pytorch's copies its image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class ViewedMixFFN(mix_ffns.ImageMixFFN):
    """Its tokens are a view of an image, so the view of an image of them is allowed."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        return images.image_to_tokens(super().forward(images.tokens_to_image(x, height, width).contiguous()))


class DroppingAttention(attentions.LinearAttention):
    """Dropout draws in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out.append(nn.Dropout(0.3))


class TurnedMixFFN(mix_ffns.ImageMixFFN):
    """Its image lies column by column."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT.contiguous().mT


def patched(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    report = kernels.patch(found, min_gain=0)
    assert "" in [row.name for row in report.replaced], str(report)
    return found


def assert_same(ours: nn.Module, model: nn.Module, *given: object) -> None:
    outputs = []
    for each in (ours, model):
        torch.manual_seed(1)
        outputs.append(each(*given))
    strides = [[s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] for y in outputs]
    assert strides[0] == strides[1]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        attentions.EfficientAttention,
        TokensAttention,
        attentions.LinearAttention,
        DroppingAttention,
        relu_attentions.MultiScaleAttention,
        relu_attentions.SplitMultiScaleAttention,
        mix_ffns.ImageMixFFN,
        mix_ffns.GatedFFN,
        blocks.ImageBlock,
        CopyingBlock,
    ],
)
def test_images_lie_as_those_of_the_original(make: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model = make().train(training)
    ours = patched(model)
    for shape in ((2, 8, 6, 4), (1, 8, 6, 4), (2, 8, 2, 3)):
        x = torch.randn(shape)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            with torch.no_grad():
                assert_same(ours, model, given)


def test_videos_lie_as_those_of_the_original() -> None:
    torch.manual_seed(0)
    model, x = VideoAttention(), torch.randn(2, 8, 3, 6, 4)
    ours = patched(model)
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        assert_same(ours, model, given)


def test_features_lie_as_those_of_the_original() -> None:
    torch.manual_seed(0)
    model = decoders.AllMLPDecoder(dropout=0.3).train()
    ours = patched(model)
    for count in (1, 2):
        features = [torch.randn(count, c, s, s) for c, s in ((4, 12), (6, 6), (8, 3))]
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_same(ours, model, [x.contiguous(memory_format=layout) for x in features])


def test_tokens_that_are_views_of_an_image_stay_so() -> None:
    torch.manual_seed(0)
    model, x = ViewedMixFFN(), torch.randn(2, 24, 8)
    ours = patched(model)
    assert_same(ours, model, x, 6, 4)
    assert ours(x, 6, 4).mT.view(2, 8, 6, 4).is_contiguous()


def test_another_layout_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="its output lies in memory in another way for images$"):
        assert not kernels.patch(TurnedMixFFN()).replaced
