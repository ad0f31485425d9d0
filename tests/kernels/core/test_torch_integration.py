"""The operators as citizens of PyTorch: opcheck, compile, export, autocast, checkpointing, DDP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import msformer_kernels as kernels
from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.native import arguments
from tests.kernels.cases import (
    Case,
    attention_case,
    batch_norm_case,
    cast,
    linear_case,
    mix_ffn_case,
    require,
    run,
    self_attention_case,
)
from tests.processes import run_in_processes

CASES = {
    "efficient_attention": [
        attention_case("attention", batch=2, heads=2, mask="random"),
        attention_case("attention_with_memory", heads=2, layout="transposed", memory=3),
    ],
    "efficient_self_attention": [
        self_attention_case("self_attention", heads=2, key_channels=4, value_channels=10),
        self_attention_case("self_attention_bare", norm=False, biases=False, mask="random"),
    ],
    "mix_ffn": [
        mix_ffn_case("mix_ffn"),
        mix_ffn_case("mix_ffn_bare", norm=False, hidden_norm=False, biases=False),
    ],
    "linear": [linear_case("linear"), linear_case("linear_bare", bias=False)],
    "batch_norm": [batch_norm_case("batch_norm"), batch_norm_case("batch_norm_plain", affine=False)],
}
WITH_OPERATOR = [pytest.param(name, case, id=case.name) for name, cases in CASES.items() for case in cases]


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    """Tests compile the same functions, and only so many versions of one are kept."""
    torch._dynamo.reset()


@pytest.fixture
def in_use(backend: str) -> Iterator[str]:
    """Every call of the test takes this backend."""
    with kernels.use_backend(backend):
        yield backend


def block_and_tokens(dim: int = 8) -> tuple[kernels.EfficientTransformerBlock, Tensor]:
    torch.manual_seed(0)
    return kernels.EfficientTransformerBlock(dim, num_heads=2), torch.randn(2, 12, dim, requires_grad=True)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


Op = tuple[torch._ops.OpOverload, tuple[object, ...]]


def ops_of(case: Case, dtype: torch.dtype, backend: str) -> list[Op]:
    """The ops that forward and backward call, with exactly the arguments that the api hands to them."""
    recorded: list[Op] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "msformer":
                recorded.append((func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
            return func(*args, **(kwargs or {}))

    with Record():
        run(case, cast(case.draw(), dtype), backend)
    assert [op.name().count("backward") for op, _ in recorded] == [0, 1]
    return recorded


SCHEMA_AND_SHAPES = ("test_schema", "test_faketensor")
REGISTRATION = (*SCHEMA_AND_SHAPES, "test_autograd_registration")


def check_ops(forward: Op, backward: Op, tests: tuple[str, ...] = (*REGISTRATION, "test_aot_dispatch_dynamic")) -> None:
    for a in forward[1]:
        if isinstance(a, Tensor) and a.is_floating_point():
            a.requires_grad_()
    torch.library.opcheck(*forward, test_utils=tests)
    torch.library.opcheck(*backward, test_utils=SCHEMA_AND_SHAPES)


@pytest.mark.parametrize(("operator", "case"), WITH_OPERATOR)
def test_opcheck(operator: str, case: Case, backend: str) -> None:
    require(backend, operator)
    check_ops(*ops_of(case, torch.float32, backend))


@pytest.mark.parametrize(("operator", "cases"), list(CASES.items()), ids=list(CASES))
def test_opcheck_in_bfloat16(operator: str, cases: list[Case], backend: str) -> None:
    require(backend, operator)
    check_ops(*ops_of(cases[0], torch.bfloat16, backend), REGISTRATION)


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_opcheck_of_ops_that_run_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a graph that names no backend, on a machine that has none. What only another backend's backward reads is
    NaN, which the test of AOT dispatch takes for a difference."""
    require("native")
    forward, backward = ((op, (*arguments[:-1], None)) for op, arguments in ops_of(case, torch.float32, "native"))
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    check_ops(forward, backward, REGISTRATION)


def test_compile_fullgraph(backend: str) -> None:
    """Of shapes that are not known before; of known ones in the next test."""
    block, x = block_and_tokens()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((3, 4), (2, 6)):
        with kernels.use_backend(backend):
            expected, expected_context = block(x, height, width)
            found, context = compiled(x, height, width)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(context, expected_context)
        a = gradients(block, expected.square().sum() + expected_context.sum())
        b = gradients(block, found.square().sum() + context.sum())
        for name in a:
            torch.testing.assert_close(b[name], a[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("in_use")
def test_compile_with_inductor() -> None:
    block, x = block_and_tokens()
    expected, _ = block(x, 3, 4)
    found, _ = torch.compile(block, fullgraph=True)(x, 3, 4)
    torch.testing.assert_close(found, expected)
    wanted = gradients(block, expected.sum())
    for name, value in gradients(block, found.sum()).items():
        torch.testing.assert_close(value, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_code_follows_the_backend(backend: str) -> None:
    """A change of backend recompiles: the op appears in the graph or does not."""
    require(backend, "efficient_attention")
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(module.code)
        return module.forward

    q = torch.randn(1, 1, 4, 3)
    compiled = torch.compile(lambda q: kernels.efficient_attention(q, q, q), fullgraph=True, backend=record)
    for name in (backend, "reference", backend):
        with kernels.use_backend(name):
            compiled(q)
    assert ["msformer.efficient_attention" in code for code in graphs] == [True, False]


def test_a_graph_names_no_backend_unless_the_user_chose_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says, and what the machine has, is asked whenever the graph runs."""
    require(backend, "efficient_attention")
    recorded: list[torch.fx.GraphModule] = []

    def record(module: torch.fx.GraphModule, inputs: object) -> object:
        recorded.append(module)
        return module.forward

    q = torch.randn(1, 1, 4, 3)
    compiled = torch.compile(lambda q: kernels.efficient_attention(q, q, q), fullgraph=True, backend=record)
    expected = kernels.efficient_attention(q, q, q, backend="reference")
    for name in ("reference", backend, "reference"):
        monkeypatch.setenv("MSFORMER_BACKEND", name)
        torch.testing.assert_close(compiled(q), expected)
    assert len(recorded) == 1, "one graph for all of them"
    (node,) = [n for n in recorded[0].graph.nodes if "msformer" in str(n.target)]
    assert node.args[-1] is None
    with kernels.use_backend(backend):
        compiled(q)
    (node,) = [n for n in recorded[1].graph.nodes if "msformer" in str(n.target)]
    assert node.args[-1] == backend


@pytest.mark.parametrize("strict", [False, True])
def test_an_operator_that_no_machine_serves_is_plain_pytorch_in_a_graph(strict: bool) -> None:
    """As `linear` on a GPU. The device `meta` has no kernels at all."""
    with torch.device("meta"):
        layer, x = kernels.TokenLinear(4, 3), torch.randn(2, 5, 4)
    program = torch.export.export(layer, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default"]


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_the_backend_of_the_machine_it_runs_on(
    strict: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(name)
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    block, x = block_and_tokens()
    program = torch.export.export(block, (x.detach(), 3, 4), strict=strict)
    ops = [node for node in program.graph.nodes if "msformer" in str(node.target)]
    assert [str(node.target).split(".")[1] for node in ops] == ["efficient_self_attention", "mix_ffn"]
    assert all("native" not in str(node.args) for node in ops)
    monkeypatch.setenv("MSFORMER_BACKEND", name)
    torch.testing.assert_close(program.module()(x.detach(), 3, 4), block(x.detach(), 3, 4))


def test_a_compiled_block_trains_on_the_reference_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = block_and_tokens()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    expected = gradients(block, block(x, 3, 4)[0].square().sum())
    for name, value in gradients(block, compiled(x, 3, 4)[0].square().sum()).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layer", ["norm", "linear", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_graph_on_the_reference_keeps_wide_what_eager_does(
    dtype: torch.dtype, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow activations and float32 parameters, under autocast; BatchNorm takes them without it as well."""
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    torch.manual_seed(0)
    model, *size = {
        "norm": (kernels.TokenBatchNorm(8),),
        "linear": (kernels.TokenLinear(8, 5),),
        "block": (kernels.EfficientTransformerBlock(8, num_heads=2), 3, 4),
    }[layer]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for autocast in (True, False)[: 2 if layer == "norm" else 1]:
        found = []
        for form in (model, compiled):
            torch.manual_seed(1)
            x = torch.randn(2, 12, 8).to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype, enabled=autocast):
                output = form(x, *size)
            output = output[0] if layer == "block" else output
            # that of the key bias is zero, and eager's rounding
            parameters = [p for name, p in model.named_parameters() if not name.endswith("keys.bias")]
            found.append([output, *torch.autograd.grad(output.float().square().sum(), [x, *parameters])])
        for expected, value in zip(*found, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["native", "cuda", "triton", "reference"])
def test_autocast(name: str) -> None:
    require(name)
    block, x = block_and_tokens(16)
    exact, exact_context = block.double()(x.double(), 3, 4)
    block.float()
    with kernels.use_backend(name), torch.autocast("cpu", torch.bfloat16):
        found, context = block(x, 3, 4)
        attended, _ = block.attn(x)
        mixed = block.mlp(x, 3, 4)
        q = torch.randn(1, 1, 4, 3)
        output, small_context = kernels.efficient_attention(q, q.double().float(), q)
    assert found.dtype == torch.float32, "a residual sum with float32 stays float32"
    assert attended.dtype == mixed.dtype == output.dtype == torch.bfloat16
    assert context.dtype == small_context.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(context.double(), exact_context, rtol=0.05, atol=0.05)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("name", ["native", "reference"])
def test_autocast_leaves_float64_alone(name: str) -> None:
    """As for PyTorch's own operators; the published definition is checked in float64."""
    require(name)
    block, x = block_and_tokens()
    block, x = block.double(), x.double()
    q = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    with kernels.use_backend(name):
        expected = [block.attn(x)[0], block.mlp(x, 3, 4), kernels.efficient_attention(q, q, q)[0]]
        with torch.autocast("cpu", torch.bfloat16):
            found = [block.attn(x)[0], block.mlp(x, 3, 4), kernels.efficient_attention(q, q, q)[0]]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize("name", ["mix_ffn", "efficient_self_attention"])
@pytest.mark.parametrize(
    ("dtype", "of_parameters"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
def test_gradients_of_parameters_have_their_dtype_under_autocast(
    name: str, dtype: torch.dtype, of_parameters: torch.dtype, backend: str
) -> None:
    """Which need not be that of the activations, nor float32."""
    operator, case = OPERATORS[name], CASES[name][0]
    inputs = {
        n: None if x is None else x.to(of_parameters if n in operator.parameters else dtype).requires_grad_()
        for n, x in case.draw().items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, inputs, backend)
    rounding = {n: x.dtype for n, x in found.items()}
    expected = run(case, cast(inputs, torch.float64), "reference", rounding)
    for n in operator.parameters:
        if inputs.get(n) is None:
            continue
        gradient, truth = found[f"grad_{n}"], expected[f"grad_{n}"]
        assert gradient.dtype == of_parameters
        assert (gradient - truth).norm() <= 0.05 * truth.norm() + 1e-3, n


def test_products_with_float32_activations_are_of_bfloat16_under_autocast() -> None:
    """On the CPU, as PyTorch's own; the gradients of weights show it."""
    require("native")
    block, x = block_and_tokens()
    with kernels.use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        output, _ = block(x, 3, 4)
    gradient = gradients(block, output.square().sum())["mlp.fc1.weight"]
    assert torch.equal(gradient, gradient.bfloat16().float())
    assert not torch.equal(output, block(x, 3, 4)[0])


@pytest.mark.parametrize("name", ["mix_ffn", "efficient_self_attention"])
def test_float64_activations_beside_bfloat16_weights_under_autocast(name: str) -> None:
    """Weights of few tokens go to the kernels as they are beside float32 alone."""
    require("native")
    operator, case = OPERATORS[name], CASES[name][0]
    inputs = {
        n: None if x is None else x.to(torch.bfloat16 if n in operator.parameters else torch.float64)
        for n, x in case.draw().items()
    }
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = case.call(inputs, "native")[0]
    with torch.no_grad():
        expected = case.call(cast(inputs, torch.float64), "reference")[0]
    torch.testing.assert_close(found, expected)


def test_autocast_with_mixed_inputs() -> None:
    """bfloat16 activations of an earlier layer, float32 parameters."""
    block, x = block_and_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = block(x.bfloat16(), 3, 4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), block(x, 3, 4)[0], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("in_use")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    block, x = block_and_tokens()
    expected = gradients(block, block(x, 3, 4)[0].square().sum())
    output, _ = checkpoint(block, x, 3, 4, use_reentrant=use_reentrant)
    block.zero_grad()
    output.square().sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(("form", "wide"), [("MANY_TOKENS", 0), ("FEW_TOKENS", 2)])
def test_of_few_tokens_alone_the_hidden_tensor_and_the_projected_tokens_are_saved_once(
    form: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("native")
    monkeypatch.setattr(arguments, "FORM", getattr(arguments, form))
    block, x = block_and_tokens()
    saved: list[tuple[int, ...]] = []
    with (
        kernels.use_backend("native"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t),
    ):
        block(x, 3, 4)
    activations = [shape for shape in saved if shape[:2] == (2, 12)]
    assert activations
    assert sum(shape[2] > 8 for shape in activations) == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_of_few_tokens_may_come_back_anywhere_in_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a hook that keeps saved tensors in one buffer."""
    require("native")
    monkeypatch.setattr(arguments, "FORM", arguments.FEW_TOKENS)
    block, x = block_and_tokens()
    block, x = block.to(dtype), x.to(dtype)
    expected = gradients(block, block(x, 3, 4)[0].square().sum())

    def moved(saved: Tensor) -> Tensor:
        return torch.cat([saved.new_zeros(1), saved.reshape(-1)])[1:].view(saved.shape)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
        output = block(x, 3, 4)[0].square().sum()
    found = gradients(block, output)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def _train_one_step(rank: int, world_size: int, backends: list[str], store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    for backend in backends:
        block, _ = block_and_tokens()
        model = nn.parallel.DistributedDataParallel(block)
        torch.manual_seed(100 + rank)
        with kernels.use_backend(backend):
            model(torch.randn(2, 12, 8), 3, 4)[0].square().mean().backward()
        torch.save({n: p.grad for n, p in block.named_parameters()}, f"{results}/{backend}-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the process while the interpreter shuts down


def test_ddp_averages_the_gradients_of_two_processes(tmp_path: Path) -> None:
    require("native")
    backends = [name for name in ("native", "cuda", "triton") if name in kernels.available_backends()]
    run_in_processes(_train_one_step, 2, backends, str(tmp_path / "store"), str(tmp_path))
    block, _ = block_and_tokens()
    expected = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        with kernels.use_backend("reference"):
            expected.append(gradients(block, block(torch.randn(2, 12, 8), 3, 4)[0].square().mean()))
    for backend in backends:
        first, second = (torch.load(tmp_path / f"{backend}-{rank}.pt") for rank in range(2))
        for parameter, gradient in first.items():
            assert torch.equal(gradient, second[parameter]), (backend, parameter)
            mean = (expected[0][parameter] + expected[1][parameter]) / 2
            torch.testing.assert_close(gradient, mean, msg=lambda m, b=backend, p=parameter: f"{b}, {p}: {m}")


def test_many_python_threads_at_once(float64_backend: str) -> None:
    """The kernels release the GIL; calls from several threads do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    case = self_attention_case("bare", norm=False, residual=False, biases=False)
    tensors = cast(case.draw(), torch.float32)
    expected = run(case, tensors, float64_backend)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(case, tensors, float64_backend), range(40)):
            assert all(torch.equal(found[name], expected[name]) for name in expected)
