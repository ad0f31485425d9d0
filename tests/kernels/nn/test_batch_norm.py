"""`TokenBatchNorm` beside `torch.nn.BatchNorm2d`, and what tools do that look for BatchNorm."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import msformer_kernels as kernels
from tests.kernels.nn.tools import WEIGHTS

OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.3}]


def pair(**options: object) -> tuple[kernels.TokenBatchNorm, nn.BatchNorm2d]:
    """Layers with the same parameters."""
    torch.manual_seed(0)
    ours, theirs = kernels.TokenBatchNorm(5, **options), nn.BatchNorm2d(5, **options)  # type: ignore[arg-type]
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def of_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.transpose(1, 2)[..., None]).flatten(2).transpose(1, 2)


def check(ours: nn.Module, theirs: nn.Module) -> None:
    """Two calls, and what they leave in the buffers. The tokens of an image are as many as the channels."""
    for _ in range(2):
        x = 3 * torch.randn(2, 5, 5) + 1
        torch.testing.assert_close(ours(x), of_tokens(theirs, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_batch_norm_of_an_image(options: dict[str, object], name: str) -> None:
    ours, theirs = pair(**options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    with kernels.use_backend(name):
        check(ours, theirs)
        check(ours.eval(), theirs.eval())
        check(copy.deepcopy(ours).train(), copy.deepcopy(theirs).train())
        check(pickle.loads(pickle.dumps(ours)).train(), theirs.train())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_conversion_to_synchronized_batch_norm(nested: bool, options: dict[str, object]) -> None:
    ours, theirs = pair(**options)
    model = nn.Sequential(ours) if nested else ours
    names = list(model.state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group="these")
    assert list(converted.state_dict()) == names
    layer = converted[0] if nested else converted
    assert "synchronized" in str(layer.explain())
    check(layer.train(), theirs.train())
    check(layer.eval(), theirs.eval())
    layer.train()
    with (
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.get_world_size", side_effect=lambda group: {"these": 2}[group]),
        mock.patch("torch.nn.modules.batchnorm.sync_batch_norm.apply", side_effect=lambda x, *_: x) as synchronized,
        mock.patch("torch._C._get_privateuse1_backend_name", return_value="cpu"),  # the devices that it serves
    ):
        layer(torch.randn(2, 7, 5))
    rows, weight, bias, mean, *_, eps, factor, group, processes = synchronized.call_args.args
    assert rows.shape == (14, 5)
    assert weight is ours.weight
    assert bias is ours.bias
    assert mean is (ours.running_mean if ours.track_running_stats else None)
    assert (eps, group, processes) == (ours.eps, "these", 2)
    assert (
        factor == pytest.approx(ours.momentum if ours.momentum is not None else 1 / 3) or not ours.track_running_stats
    )


def test_a_frozen_batch_norm_stays_frozen() -> None:
    """As code does that looks for BatchNorm."""
    ours, theirs = pair()
    for model in (ours, theirs):
        for module in model.train().modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    check(ours, theirs)
    assert not ours.num_batches_tracked


def test_running_statistics_are_computed_anew() -> None:
    """Of a model with averaged weights."""
    batches = [torch.randn(2, 5, 5) * i + i for i in range(1, 4)]
    ours, theirs = pair()
    check(ours, theirs)
    update_bn(batches, ours)
    update_bn([x.transpose(1, 2)[..., None] for x in batches], theirs)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert ours.momentum == 0.1
    assert ours.num_batches_tracked == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["parametrized", "parametrized_bias", "old_weight_norm", "pruned"])
def test_parameters_that_tools_make(tool: str) -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        torch.manual_seed(0)
        WEIGHTS[tool](nn.Sequential(layer), "0")
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(parameter.data)
    check(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tool", ["parametrized", "parametrized_bias", "old_weight_norm", "old_spectral_norm", "pruned"]
)
def test_parameters_of_a_linear_layer_that_tools_make(tool: str) -> None:
    torch.manual_seed(0)
    layer, x = kernels.TokenLinear(5, 3), torch.randn(2, 7, 5)
    before = layer(x)
    WEIGHTS[tool](nn.Sequential(layer), "0")
    found = layer(x)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, x @ layer.weight.T + layer.bias)


def test_another_module_in_place_of_the_statistics_is_refused() -> None:
    layer = kernels.TokenBatchNorm(5)
    layer.statistics = nn.Identity()
    with pytest.raises(TypeError, match="statistics: expected what it was, or a SyncBatchNorm, got Identity"):
        layer(torch.randn(2, 7, 5))


def test_it_prints() -> None:
    assert repr(kernels.TokenBatchNorm(5)).count("Statistics") == 1
