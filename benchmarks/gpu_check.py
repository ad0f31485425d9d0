"""Checks and times the Triton kernels on a GPU, in one command and less than eight minutes:

    python benchmarks/gpu_check.py [--out gpu-check.json] [--minutes 8]

Needs torch and Triton, not an installed msformer. In order: the machine and its ceilings (copy bandwidth, products of
8192 x 8192 matrices); every operator against float64, by the rule of the tests (accuracy.py); bits that repeat; a CUDA
graph of forward and backward; compute-sanitizer on a small case, where it is installed; times of attention,
MixFFN-skip and the block, forward + backward, beside eager PyTorch, `torch.compile` and its mode max-autotune; the
fitting of one image. What there is no time left for is named. With TRITON_INTERPRET=1 and --device cpu only the checks
run, in the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# not installed, the packages are found where they lie
sys.path[:0] = [str(ROOT), *([] if find_spec("msformer_kernels") else [str(ROOT / "kernels")])]

from benchmarks.accuracy import MonteCarloArithmetic, Results, Rule, uncertainty  # noqa: E402
from benchmarks.cases import Shape, attention_work, block_work, mix_ffn_work  # noqa: E402
from benchmarks.machine import describe_gpu  # noqa: E402
from benchmarks.rivals import plain_attention, plain_block, plain_mix_ffn  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
DRAWS = 3
TF32_EPS = 2.0**-10


@dataclass
class Check:
    """What was found, printed as it comes."""

    device: torch.device
    deadline: float
    machine: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(not row["ok"] for row in self.accuracy) or any(v.startswith("FAILED") for v in self.checks.values())

    def left(self, what: str, seconds: float = 0) -> bool:
        """Whether there is time; notes what is skipped otherwise."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.skipped.append(what)
        print(f"no time left for {what}", flush=True)
        return False


def set_tf32(dtype: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"


@dataclass(frozen=True)
class Case:
    """One operator on tokens of one size."""

    operator: str
    batch: int
    height: int
    width: int
    dim: int
    heads: int = 1
    masked: bool = False

    def __str__(self) -> str:
        heads, mask = f" h{self.heads}" if self.heads > 1 else "", " masked" if self.masked else ""
        return f"{self.operator} {self.batch}x{self.height}x{self.width}x{self.dim}{heads}{mask}"

    def layer(self) -> nn.Module:
        import msformer_kernels as kernels

        torch.manual_seed(0)
        if self.operator == "attention":
            return kernels.EfficientAttention(self.dim, num_heads=self.heads)
        if self.operator in ("mix_ffn", "mix_ffn_plain"):
            return (kernels.MixFFNSkip if self.operator == "mix_ffn" else kernels.MixFFN)(self.dim, 4 * self.dim)
        if self.operator == "batch_norm":
            return kernels.TokenBatchNorm(self.dim)
        return kernels.EfficientTransformerBlock(self.dim, num_heads=self.heads)

    def run(self, layer: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        import msformer_kernels as kernels

        if self.operator == "attention":
            return tuple(layer(x, norm=nn.LayerNorm(self.dim).to(x), mask=mask, residual=True))
        if self.operator == "plain":
            query = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            return kernels.efficient_attention(query, query * 2, query + 1, mask=mask)
        if self.operator == "batch_norm":
            return (layer(x),)
        result = layer(x, self.height, self.width)
        return result if isinstance(result, tuple) else (result,)


SMALL_CASES = [
    Case("block", 1, 5, 7, 20),
    Case("attention", 2, 4, 9, 36, 2, masked=True),
    Case("plain", 1, 3, 11, 16, 2),
]
CASES = [
    Case("attention", 1, 65, 67, 100),
    Case("attention", 2, 33, 31, 64, 2, masked=True),
    Case("attention", 1, 32, 32, 160, 5),
    Case("attention", 1, 16, 16, 256, 8),
    Case("attention", 1, 16, 16, 256),
    Case("plain", 2, 40, 41, 128, 2, masked=True),
    Case("plain", 1, 129, 129, 100),
    Case("mix_ffn", 1, 65, 67, 100),
    Case("mix_ffn", 2, 17, 1, 32),
    Case("mix_ffn", 1, 14, 14, 512),
    Case("mix_ffn_plain", 1, 64, 64, 64),
    Case("batch_norm", 2, 65, 67, 100),
    Case("block", 1, 129, 129, 100),
    Case("block", 1, 64, 64, 32),
]


def outputs_and_gradients(
    case: Case, dtype: torch.dtype, x: Tensor, backend: str, seed: int, arithmetic: MonteCarloArithmetic | None = None
) -> Results:
    """By name, in `dtype`; `arithmetic` makes rounding errors in x and the parameters."""
    import msformer_kernels as kernels

    layer = case.layer().to(x.device, dtype)
    leaf = x.to(dtype)
    if arithmetic is not None:
        leaf = arithmetic.perturbed(leaf)
        for parameter in layer.parameters():
            parameter.data = arithmetic.perturbed(parameter.data)
    leaf = leaf.detach().requires_grad_()
    mask = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) % 3 != 0 if case.masked else None
    with kernels.use_backend(backend):
        outputs = case.run(layer, leaf, mask)
        generator = torch.Generator().manual_seed(seed)
        # rounded to the dtype of the input, so that they are the same numbers for every dtype
        grads = [torch.randn(o.shape, generator=generator).to(x.dtype).to(o.device, o.dtype) for o in outputs]
        names, inputs = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else ((), ())
        found = torch.autograd.grad(outputs, [leaf, *inputs], grads, allow_unused=True)
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return result | {f"grad {n}": g for n, g in zip(("x", *names), found, strict=True) if g is not None}


def check_accuracy(check: Check, cases: list[Case], dtypes: list[str]) -> None:
    for dtype in dtypes:
        set_tf32(dtype)
        for case in cases:
            if check.left(f"accuracy of {case}, {dtype}"):
                row = compare(case, dtype, check.device)
                check.accuracy.append(row)
                verdict = "ok" if row["ok"] else "FAILED"
                text = f"{row['ratio']:.2f} x eager's error ({row['worst']}) {'; '.join(row['faults'])}"
                print(f"{verdict:<7}{case!s:<36} {dtype:<9} {text}", flush=True)


def compare(case: Case, dtype: str, device: torch.device) -> dict[str, Any]:
    """The error rule over some draws, and whether the bits repeat."""
    kind, rule, repeats = DTYPES[dtype], Rule(), True
    eps = TF32_EPS if dtype == "tf32" else torch.finfo(kind).eps
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(case.batch, case.height * case.width, case.dim, generator=generator).to(device, kind)
        ours = outputs_and_gradients(case, kind, x, "triton", seed)
        eager = outputs_and_gradients(case, kind, x, "reference", seed)
        exact = outputs_and_gradients(case, torch.float64, x, "reference", seed)
        again = outputs_and_gradients(case, kind, x, "triton", seed)
        repeats = repeats and all(torch.equal(ours[name], again[name]) for name in exact)
        perturbed = partial(outputs_and_gradients, case, torch.float64, x, "reference", seed)
        rule.add({n: ours[n] for n in exact}, eager, exact, uncertainty(perturbed, exact, eps))
    ratio, worst = rule.worst
    faults = rule.faults() + ([] if repeats else ["another run gives other bits"])
    found = {"ok": not faults, "ratio": ratio, "worst": worst, "repeats": repeats, "faults": faults}
    return {"case": str(case), "dtype": dtype} | found


def check_graph(device: torch.device) -> str:
    """A captured forward and backward gives the bits of the calls, also for new input."""
    import msformer_kernels as kernels

    torch.manual_seed(0)
    block = kernels.EfficientTransformerBlock(100).to(device)
    x = torch.randn(1, 33 * 33, 100, device=device, requires_grad=True)

    def step() -> list[Tensor]:
        output, context = block(x, 33, 33)
        loss = output.square().mean() + context.square().mean()
        return list(torch.autograd.grad(loss, [x, *block.parameters()]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            if not torch.equal(found, expected):
                return "FAILED: a replayed graph and calls differ"
    return "ok"


def run_sanitizer() -> str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not run: compute-sanitizer is not installed"
    out = Path(tempfile.mkdtemp()) / "small.json"
    small = [sys.executable, __file__, "--small", "--out", str(out)]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *small]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return "not finished within 150 s"
    return "ok" if done.returncode == 0 else f"FAILED: {(done.stdout + done.stderr)[-600:]}"


def median_ms(run: Callable[[], Any], rep: int = 200) -> float:
    """Median of many runs by device events, the second-level cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=rep, return_mode="median"))


def measure_ceilings(check: Check) -> None:
    source = torch.randn(1 << 28, device=check.device)
    target = torch.empty_like(source)
    check.ceilings["copy GB/s"] = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6
    for dtype, kind in DTYPES.items():
        set_tf32(dtype)
        a, b = (torch.randn(8192, 8192, device=check.device).to(kind) for _ in range(2))
        check.ceilings[f"{dtype} TFLOP/s"] = 2 * 8192**3 / median_ms(partial(torch.matmul, a, b)) / 1e9
    print(", ".join(f"{name} {value:.0f}" for name, value in check.ceilings.items()), flush=True)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` captured in a CUDA graph, which takes the host out of the time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rivals(
    operator: str, size: int, dim: int, heads: int, dtype: str, device: torch.device
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes forward + backward of each rival, on the same weights and input."""
    import msformer_kernels as kernels

    torch.manual_seed(0)
    block = kernels.EfficientTransformerBlock(dim, num_heads=heads).to(device, DTYPES[dtype])
    x = torch.randn(1, size * size, dim, device=device, dtype=DTYPES[dtype], requires_grad=True)
    grad = torch.randn_like(x)
    ours: dict[str, Callable[[Tensor], Tensor]] = {
        "attention": lambda x: block.attn(x, norm=block.norm1, residual=True)[0],
        "mix_ffn": lambda x: block.mlp(x, size, size, norm=block.norm2, residual=True),
        "block": lambda x: block(x, size, size)[0],
    }
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "attention": lambda x: plain_attention(block.attn, block.norm1, x),
        "mix_ffn": lambda x: plain_mix_ffn(block.mlp, block.norm2, x, size, size),  # type: ignore[arg-type]
        "block": lambda x: plain_block(block, x, size, size),
    }
    used: dict[str, list[nn.Module]] = {
        "attention": [block.attn, block.norm1],
        "mix_ffn": [block.mlp, block.norm2],
        "block": [block],
    }
    parameters = [p for module in used[operator] for p in module.parameters()]

    def training(forward: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(x), [x, *parameters], grad, allow_unused=True)

    def tuned() -> Callable[[], Any]:
        forward = torch.compile(plain[operator], mode="max-autotune")

        def run() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return torch.autograd.grad(forward(x), [x, *parameters], grad, allow_unused=True)

        return run

    return {
        "triton": lambda: training(ours[operator]),
        "triton, graph": lambda: graphed(training(ours[operator])),
        "eager": lambda: training(plain[operator]),
        "compile": lambda: training(torch.compile(plain[operator])),
        "max-autotune": tuned,
    }


WORK = {"attention": attention_work, "mix_ffn": mix_ffn_work, "block": block_work}
COMPILE_SECONDS = {"compile": 30, "max-autotune": 75}
"""What `torch.compile` may take for forward and backward; it is left out when there is less time."""


def time_row(check: Check, operator: str, size: int, dim: int, heads: int, dtype: str) -> None:
    set_tf32(dtype)
    torch._dynamo.reset()
    row: dict[str, Any] = {"operator": operator, "tokens": f"{size}x{size}", "dim": dim, "heads": heads, "dtype": dtype}
    for name, make in rivals(operator, size, dim, heads, dtype, check.device).items():
        what = f"{name} of {operator} {size} {dim} {dtype}"
        if name in COMPILE_SECONDS and not check.left(what, COMPILE_SECONDS[name]):
            continue
        try:
            row[name] = median_ms(make())
        except Exception as error:  # compilers raise whatever they like
            row[name] = None
            check.skipped.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    if row["triton"] is None:
        check.checks[f"times of {operator} {size} {dim} {dtype}"] = f"FAILED: {check.skipped[-1]}"
        return
    work = WORK[operator](Shape(1, size, size, dim, heads), True, DTYPES[dtype].itemsize)
    floor = work.seconds(check.ceilings[f"{dtype} TFLOP/s"] * 1e12, check.ceilings["copy GB/s"] * 1e9)
    graph = row["triton, graph"] or row["triton"]
    row["roofline share"] = 1e3 * floor / min(row["triton"], graph)
    check.times.append(row)
    ratios = {n: row[n] / row["triton"] for n in ("eager", "compile", "max-autotune") if row.get(n)}
    text = ", ".join(f"{r:.2f} x {n}" for n, r in ratios.items())
    name = f"{operator:<10} {size}x{size} C={dim} h{heads} {dtype:<9}"
    share = f"{100 * row['roofline share']:.0f}% of the roofline"
    print(f"{name} {row['triton']:.3f} ms ({graph:.3f} as a graph, {share}): {text}", flush=True)


def time_host(check: Check) -> None:
    """Host time of a call: many calls on few tokens, without waiting for the device."""
    import msformer_kernels as kernels

    for operator in ("attention", "mix_ffn"):
        block = kernels.EfficientTransformerBlock(32).to(check.device, torch.bfloat16)
        x = torch.randn(1, 16, 32, device=check.device, dtype=torch.bfloat16)

        def run(operator: str = operator, block: Any = block, x: Tensor = x) -> None:
            block.attn(x, norm=block.norm1) if operator == "attention" else block.mlp(x, 4, 4, norm=block.norm2)

        with torch.no_grad():
            for _ in range(20):
                run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                run()
            microseconds = (time.perf_counter() - start) / 200 * 1e6
        torch.cuda.synchronize()
        check.checks[f"host time of a forward call, {operator}"] = f"{microseconds:.0f} us"


def time_fit(check: Check) -> None:
    """Fifty steps on one image of 257 x 257, and on 16 of them, one and four at a time."""
    from msformer.fitting import Rule, fit, label_map
    from msformer.model import MSFormer
    from msformer.presets import LossWeights
    from msformer.streams import own_stream

    rule = Rule(LossWeights(), 0.1, 0.9, max_steps=50, min_labels=1)
    image = torch.rand(1, 3, 257, 257, generator=torch.Generator().manual_seed(0)).to(check.device)
    torch.manual_seed(0)
    weights = [MSFormer().state_dict() for _ in range(16)]

    def fitted(state: dict[str, Tensor]) -> tuple[float, int, bytes]:
        """Seconds, steps and the label map, as `msformer.segment` makes it."""
        start = time.perf_counter()
        with own_stream(check.device):
            model = MSFormer()
            model.load_state_dict(state)
            steps = len(fit(model.to(check.device), image, rule, lambda *_: None).losses)
            labels = label_map(model, image).tobytes()
        return time.perf_counter() - start, steps, labels

    for dtype in ("float32", "tf32"):
        set_tf32(dtype)
        for _ in range(2):
            seconds, steps, _ = fitted(weights[0])
        check.checks[f"fitting 257x257, {dtype}"] = f"{steps} steps in {seconds:.3f} s"
    maps = []
    for at_once in (1, 4):
        with ThreadPoolExecutor(at_once) as pool:
            start = time.perf_counter()
            maps.append([labels for _, _, labels in pool.map(fitted, weights)])
            seconds = (time.perf_counter() - start) / len(weights)
        check.checks[f"fitting 16 images, tf32, {at_once} at a time"] = f"{seconds:.3f} s an image"
    same = "ok" if maps[0] == maps[1] else "FAILED: the maps differ from those fitted alone"
    check.checks["images fitted at the same time"] = same


ROWS = [
    *(("block", 257, 100, 1, d) for d in ("bfloat16", "tf32")),
    *(("attention", 257, 100, 1, d) for d in ("bfloat16", "tf32")),
    *(("mix_ffn", 257, 100, 1, d) for d in ("bfloat16", "tf32")),
    *(
        ("block", size, dim, heads, "bfloat16")
        for size, dim, heads in ((128, 32, 1), (64, 64, 2), (32, 160, 5), (16, 256, 8))
    ),
    ("block", 257, 100, 1, "float32"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="only the checks, on few tokens")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here (TRITON_INTERPRET=1 and --device cpu run the checks in the interpreter)")
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check = Check(device, time.monotonic() + 60 * options.minutes - 20)
    check.machine = describe_gpu(device)
    print(", ".join(f"{k} {v}" for k, v in check.machine.items()), flush=True)
    if options.small or device.type == "cpu":
        check_accuracy(check, SMALL_CASES, ["bfloat16", "tf32"])
    else:
        run_on_gpu(check, options.out)
    write(check, options.out)
    summarise(check, options.out)
    return 1 if check.failed else 0


def run_on_gpu(check: Check, out: Path) -> None:
    def graph() -> None:
        check.checks["CUDA graph"] = check_graph(check.device)

    def sanitizer() -> None:
        check.checks["compute-sanitizer"] = run_sanitizer()

    stages: list[tuple[str, float, Callable[[], None]]] = [
        ("ceilings", 0, lambda: measure_ceilings(check)),
        ("accuracy", 0, lambda: check_accuracy(check, CASES, ["bfloat16", "float16", "tf32", "float32"])),
        ("CUDA graph", 0, graph),
        ("host time", 0, lambda: time_host(check)),
        ("fit", 0, lambda: time_fit(check)),
        *((f"times of {row}", 20, partial(time_row, check, *row)) for row in ROWS),
        ("compute-sanitizer", 150, sanitizer),
    ]
    for name, seconds, stage in stages:
        if not check.left(name, seconds):
            continue
        try:
            stage()
        except Exception as error:  # the next stages say more
            traceback.print_exc()
            check.checks[name] = f"FAILED: {type(error).__name__}: {error}"
        write(check, out)  # what there is, should the next stage end the process


def write(check: Check, out: Path) -> None:
    names = ("machine", "ceilings", "accuracy", "checks", "times", "skipped")
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps({name: getattr(check, name) for name in names}, indent=1))
    temporary.rename(out)


def summarise(check: Check, out: Path) -> None:
    for name, found in check.checks.items():
        print(f"{name}: {found}")
    print(f"wrote {out}; {'FAILED' if check.failed else 'all checks passed'}")


if __name__ == "__main__":
    sys.exit(main())
