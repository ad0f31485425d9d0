"""A patched module is still what it was to everything else: its class, state, copies, pickles, optimizers, graphs."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import blocks, mix_ffns

X = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
SIZE = (6, 4)

ROOT = Path(__file__).resolve().parents[3]


class Model(nn.Module):
    """Two blocks with a layer around them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks.TupleBlock() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            (x,) = block(x, *SIZE)
        return self.head(x)


def operators(model: nn.Module, x: Tensor = X) -> int:
    """How many operators a call runs."""
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    name = "msformer::mix_ffn"  # under autocast it calls itself
    return sum(e.name == name and (e.cpu_parent is None or e.cpu_parent.name != name) for e in profile.events())


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def test_state_class_and_signature_stay(model: Model) -> None:
    state, parameters = model.state_dict(), dict(model.named_parameters())
    signature = inspect.signature(model.blocks[0].forward)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    kernels.patch(model)
    assert operators(model) == 2
    assert all(a is b for a, b in zip(parameters.values(), model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    assert model.load_state_dict(state, strict=True).missing_keys == []
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(isinstance(block, blocks.TupleBlock) for block in model.blocks)
    assert isinstance(model.blocks[0].mlp, mix_ffns.DenseMixFFN)
    assert type(model.blocks[0]).__name__ == "TupleBlock"
    assert inspect.signature(model.blocks[0].forward) == signature
    assert type(model.blocks[0]) is type(model.blocks[1])  # one class for what is alike


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "pickle 0", "torch.save"])
def test_copies_keep_the_patch_and_their_own_parameters(model: Model, how: str) -> None:
    report = kernels.patch(model)
    file = io.BytesIO()
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "torch.save":
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = pickle.loads(pickle.dumps(model, 0 if how == "pickle 0" else -1))
    assert torch.equal(model(X), copied(X))
    assert operators(copied) == 2
    with torch.no_grad():
        for p in copied.blocks[0].mlp.parameters():
            p.mul_(2)
    assert not torch.equal(model(X), copied(X))
    report.undo()
    assert operators(model) == 0
    assert operators(copied) == 2


def test_a_pickle_opens_in_another_process(model: Model, tmp_path: Path) -> None:
    kernels.patch(model.eval())
    torch.save((model, model(X)), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, expected = torch.load(sys.argv[1], weights_only=False); "
        "from tests.kernels.patching.test_instances import X, operators; "
        "assert torch.equal(model(X), expected); print(operators(model))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "2", found.stderr


def test_an_optimizer_made_before_goes_on(model: Model) -> None:
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for step in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()
        if step == 0:
            kernels.patch(model)
    assert operators(model) == 2
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_around_does_not_matter(model: Model, mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode():
        kernels.patch(model)
    assert operators(model) == 2


def test_hooks_on_the_module_run(model: Model) -> None:
    seen: list[str] = []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda m, given: seen.append("before"))
    kernels.patch(model)
    block.register_forward_hook(lambda m, given, output: seen.append("after"))
    block.attention.register_forward_hook(lambda m, given, output: seen.append("inside"))  # type: ignore[union-attr]
    seen.clear()
    assert operators(model) == 2
    assert seen == ["before", "inside", "after"]


def test_the_proof_calls_no_hook_and_draws_no_numbers(model: Model) -> None:
    seen: list[str] = []
    for module in model.modules():
        if not isinstance(module, (nn.LayerNorm, mix_ffns.DenseMixFFN)):
            module.register_forward_hook(lambda *_: seen.append("hook"))
    before = torch.get_rng_state()
    kernels.patch(model)
    assert seen == []
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_compile_sees_patch_and_undo(model: Model) -> None:
    torch.compiler.reset()
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes if "msformer" in str(node.target)])
        return graph

    compiled = torch.compile(model.eval(), fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = compiled(X)
        report = kernels.patch(model)
        torch.testing.assert_close(compiled(X), expected, atol=1e-5, rtol=1e-4)
        report.undo()
        assert torch.equal(compiled(X), expected)
        compiled(X)
    assert [len(graph) for graph in graphs[:2]] == [0, 2]
    assert sum(map(len, graphs)) == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_operators(model: Model, strict: bool) -> None:
    kernels.patch(model.eval())
    program = torch.export.export(model, (X,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "msformer" in str(node.target)]
    assert targets == ["msformer.mix_ffn.default"] * 2
    torch.testing.assert_close(program.module()(X), model(X))


def test_jit_trace_takes_the_original(model: Model) -> None:
    kernels.patch(model.eval())
    traced = torch.jit.trace(model, (X,))
    assert operators(traced) == 0
    torch.testing.assert_close(traced(X), model(X), atol=1e-5, rtol=1e-4)


def test_functional_call_and_autocast(model: Model) -> None:
    kernels.patch(model.eval())
    doubled = {name: p.detach() * 2 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, doubled, (X,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(found, model(X))
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(model) == 2
        assert model(X).dtype == torch.bfloat16


def test_another_dtype_after_the_patch(model: Model) -> None:
    kernels.patch(model.eval())
    expected = model(X)
    model.double()
    assert operators(model, X.double()) == 2
    torch.testing.assert_close(model(X.double()).float(), expected, atol=1e-5, rtol=1e-4)


def test_ddp_and_fsdp2_train_a_patched_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.kernels.patching.distributed", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == ["ddp", "fsdp", "undo", "refuse"], found.stdout + found.stderr
