"""Models of other libraries with their inputs, at random weights: what `benchmarks.integrations` and the tests patch.

A model names the packages that it needs. An entry is a whole model, or a module of one, named with its channels and the
height and width of its image: its inputs ask for gradients. The forms at the end are of libraries that need much more
than PyTorch to be installed; they are small modules with the structure of the papers, which the tests own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, cast
from unittest import mock

import torch
from packaging.requirements import Requirement
from torch import nn

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class ForeignModel:
    """How to make a model, and the arguments of a call."""

    name: str
    packages: tuple[str, ...]
    """Requirements, as of a package; empty for forms that need none."""
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    large: bool = False
    """Whether a training step takes seconds."""

    def missing(self) -> str | None:
        """What is not installed, in words; None if everything is."""
        for requirement in map(Requirement, self.packages):
            try:
                found = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                return f"{requirement} is not installed"
            if not requirement.specifier.contains(found, prereleases=True):
                return f"{requirement} is needed, {found} is installed"
        return None

    def versions(self) -> dict[str, str]:
        """Of the packages, as installed."""
        return {name: metadata.version(name) for name in (Requirement(p).name for p in self.packages)}


def image(size: int, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: (torch.randn(1, channels, size, size),)


def features(size: int, channels: int, batch: int = 1) -> Callable[[], Inputs]:
    """An image inside a model, whose gradient a training step needs."""
    return lambda: (torch.randn(batch, channels, size, size, requires_grad=True),)


def image_and_step(size: int) -> Callable[[], Inputs]:
    """Of a diffusion model."""
    return lambda: (torch.randn(1, 3, size, size), torch.tensor([3]))


def segformer() -> nn.Module:
    import transformers

    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig())


def pvt_v2(linear_attention: bool = False) -> nn.Module:
    import transformers

    return transformers.PvtV2Model(transformers.PvtV2Config(linear_attention=linear_attention))


def glpn() -> nn.Module:
    import transformers

    return transformers.GLPNModel(transformers.GLPNConfig())


def of_timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return cast(nn.Module, timm.create_model(name))

    return make


def of_segmentation_models(architecture: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch

        return cast(nn.Module, getattr(segmentation_models_pytorch, architecture)(encoder, encoder_weights=None))

    return make


def diffusion_unet(dim: int = 64) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return cast(nn.Module, Unet(dim))


def diffusion_attention(channels: int) -> nn.Module:
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import LinearAttention

    return cast(nn.Module, LinearAttention(channels))


def imagen_unet() -> nn.Module:
    """Linear attention at all resolutions but the lowest."""
    from transformers import T5Config

    # the package looks up how wide the text encoder is while it is imported, on the hub
    with mock.patch.object(T5Config, "from_pretrained", return_value=T5Config(d_model=768)):
        from imagen_pytorch import Unet
    linear = (True, True, True, False)
    attention: dict[str, Any] = {"layer_attns": tuple(not x for x in linear), "use_linear_attn": linear}
    return cast(nn.Module, Unet(dim=64, cond_on_text=False, layer_cross_attns=False, **attention))


def video_unet() -> nn.Module:
    from video_diffusion_pytorch import Unet3D

    return cast(nn.Module, Unet3D(dim=32, dim_mults=(1, 2, 4)))


def sana() -> nn.Module:
    """Of fewer and narrower blocks than the published ones."""
    from diffusers import SanaTransformer2DModel

    heads = {"num_attention_heads": 8, "num_cross_attention_heads": 4, "cross_attention_head_dim": 64}
    sizes = {"num_layers": 4, "caption_channels": 64, "cross_attention_dim": 256}
    return cast(nn.Module, SanaTransformer2DModel(attention_head_dim=32, **heads, **sizes))


def sana_inputs() -> Inputs:
    return torch.randn(1, 32, 32, 32), torch.randn(1, 16, 64), torch.tensor([3])


def conv_mix_ffn() -> nn.Module:
    """OpenMMLab's MixFFN at the width of MiT-B0, with its stochastic depth."""
    from tests.kernels.patching.models.mix_ffns import ConvMixFFN

    return ConvMixFFN(32, 128, drop_path=0.1)


def conv_mix_ffn_inputs() -> Inputs:
    """Tokens, their height and width, and what is added."""
    tokens, identity = (torch.randn(1, 128 * 128, 32, requires_grad=True) for _ in range(2))
    return tokens, (128, 128), identity


def miss_former_block() -> nn.Module:
    from tests.kernels.patching.models.blocks import MissFormerBlock

    return MissFormerBlock(64, 256)


def dae_former_block() -> nn.Module:
    from tests.kernels.patching.models.blocks import EfficientBlock

    return EfficientBlock(64, 256)


def tokens(height: int, width: int, channels: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(1, height * width, channels, requires_grad=True), height, width)


def _of_transformers(version: str, packages: tuple[str, ...]) -> list[ForeignModel]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "segformer-b0": segformer,
        "pvt-v2-b0": pvt_v2,
        "pvt-v2-b0-li": partial(pvt_v2, linear_attention=True),
        "glpn": glpn,
    }
    return [ForeignModel(f"transformers-{version}/{name}", packages, makers[name], image(512)) for name in makers]


SEGMENTATION_MODELS = ("segmentation-models-pytorch>=0.5",)
DIFFUSION = ("denoising-diffusion-pytorch>=2.2",)
ATTENTIONS = ((64, 128), (64, 64), (128, 64), (64, 32), (64, 32, 4), (128, 32), (64, 16), (256, 16), (512, 16))
"""Of linear attention in a UNet: channels, height and width, and the number of images where it is not one."""
LARGE = ("b3", "b4", "b5")
ALL = [
    *_of_transformers("5", ("transformers>=5",)),
    *_of_transformers("4", ("transformers>=4.57,<5",)),
    *(
        ForeignModel(f"timm/pvt_v2_{size}", ("timm>=1",), of_timm(f"pvt_v2_{size}"), image(512), size in LARGE)
        for size in ("b0", "b1", "b2", "b2_li", *LARGE)
    ),
    *(
        ForeignModel(f"timm/{name}", ("timm>=1",), of_timm(name), image(224))
        for name in ("efficientvit_b1", "mobilenetv2_100")
    ),
    ForeignModel("smp/unet-mit_b0", SEGMENTATION_MODELS, of_segmentation_models("Unet", "mit_b0"), image(512)),
    ForeignModel(
        "smp/segformer-mit_b2", SEGMENTATION_MODELS, of_segmentation_models("Segformer", "mit_b2"), image(512)
    ),
    ForeignModel("denoising-diffusion/unet", DIFFUSION, diffusion_unet, image_and_step(128)),
    *(
        ForeignModel(
            "-".join(["denoising-diffusion/attention", *map(str, (channels, size, *batch))]),
            DIFFUSION,
            partial(diffusion_attention, channels),
            features(size, channels, *batch),
        )
        for channels, size, *batch in ATTENTIONS
    ),
    ForeignModel("imagen/unet", ("imagen-pytorch>=2", "transformers"), imagen_unet, image_and_step(128)),
    ForeignModel(
        "video-diffusion/unet3d",
        ("video-diffusion-pytorch>=0.7",),
        video_unet,
        lambda: (torch.randn(1, 3, 4, 64, 64), torch.tensor([3])),
    ),
    ForeignModel("diffusers/sana", ("diffusers>=0.35",), sana, sana_inputs),
    ForeignModel("form/openmmlab-mixffn", (), conv_mix_ffn, conv_mix_ffn_inputs),
    ForeignModel("form/missformer-block", (), miss_former_block, tokens(56, 56, 64)),
    ForeignModel("form/dae-former-block", (), dae_former_block, tokens(56, 56, 64)),
]
MODELS = {model.name: model for model in ALL}
