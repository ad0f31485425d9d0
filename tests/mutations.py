"""Do the accuracy tests notice a kernel that is wrong by little? Breaks the sources on purpose, one line at a time:

    python -m tests.mutations [--out table.md] [--only delta]

Needs `pip install -e ".[test,dev]"`. Each mutation is made in a copy of the sources, the extension is built there (the
CPU kernels for the best variant of this machine, the CUDA kernels for their emulation), and the accuracy tests of the
operator run on it. They must fail. Takes about 20 minutes on two cores; not part of `pytest`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "kernels/msformer_kernels/ops"
BUILD = """
import sys, sysconfig
from pathlib import Path
sys.path.insert(0, "csrc")
import extensions, variants
module, variant = sys.argv[1:]
variants.VARIANTS[:] = [v for v in variants.VARIANTS if v.name == variant]
build = {"_native": extensions.build_native, "_cuda_emulated": extensions.build_emulation}[module]
output = Path("kernels/msformer_kernels", module + sysconfig.get_config_var("EXT_SUFFIX"))
build(output.resolve(), Path("build", module).resolve())
"""
TO_BFLOAT16 = (
    "[](T x) { float f = static_cast<float>(x); std::uint32_t b; std::memcpy(&b, &f, 4);"
    " b = (b + 0x8000u) & 0xffff0000u; std::memcpy(&f, &b, 4); return static_cast<T>(f); }"
)


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    old: str
    new: str
    tests: str
    """The file of tests that must notice it."""
    expression: str = "native and (bf16 or not f16)"
    variant: str | None = None
    """Of the CPU kernels; the best one of this machine without it."""

    @property
    def module(self) -> str | None:
        """The extension that is to be built again; None for Python."""
        return {"cpu": "_native", "cuda": "_cuda_emulated"}.get(self.file.split("/")[1])


SELF, PLAIN, FFN = "efficient_self_attention", "efficient_attention", "mix_ffn"
FOLDED = "csrc/cpu/self_attention/folded_backward.cpp"
TRITON = "triton and f32"
CUDA = "csrc/cuda"
ENGINE = "csrc/cpu/engine"
TILES = ("native and f32", "emulated_tiles")  # which tests, and which variant
MUTATIONS = [
    Mutation(
        "nothing (the tests pass)", "csrc/cpu/base/sums.h", "Vector<T> sums[4] = {};", "Vector<T> sums[4] = {};", SELF
    ),
    Mutation(
        "a term of dX dropped: S dA",
        FOLDED,
        "multiply_add(this->engine, tokens, keys, width, s.keys, key_width,\n"
        "                 m.grad_key_tokens_right + batch * rows_right_size, s.grad_x, width);",
        "",
        SELF,
    ),
    Mutation(
        "partial sums combined in bfloat16",
        "csrc/cpu/base/sums.h",
        "static_cast<T>(sums[i]);",
        f"({TO_BFLOAT16})(static_cast<T>(sums[i]));",
        SELF,
    ),
    Mutation(
        "one token of a block of 50 left out of the context",
        "csrc/cpu/attention/softmax.h",
        "multiply_transposed_add(engine, keys, tokens, leading,",
        "multiply_transposed_add(engine, keys, tokens - (tokens > 40), leading,",
        SELF,
    ),
    Mutation(
        "delta of the wrong head",
        FOLDED,
        "T& delta = m.delta[batch * key_width + row + i];",
        "T& delta = m.delta[batch * key_width + (row + i + head_keys) % keys];",
        SELF,
    ),
    Mutation(
        "exp with two of seven coefficients less",
        "csrc/cpu/base/vectors.h",
        "r * 1.9875691500e-4f + 1.3981999507e-3f",
        "r * 0.0f",
        PLAIN,
    ),
    Mutation(
        "the gradient of the returned context not added",
        "csrc/cpu/attention/attention.cpp",
        "own && row < last",
        "false && row < last",
        PLAIN,
    ),
    Mutation(
        "one row of the image left out of the bias and weight gradients",
        "csrc/cpu/mix_ffn/strips_backward.cpp",
        "row >= p.row_begin && row < p.row_end",
        "row > p.row_begin && row < p.row_end",
        FFN,
    ),
    Mutation(
        "GELU by its tanh form",
        "csrc/cpu/mix_ffn/mix_ffn.h",
        " normal_distribution(x, cdf, pdf);",
        " { const Vector<T> e = vexp((x * (x * x * T(0.0356774081) + T(0.7978845608))) * T(-2)); cdf = one / (e + one);"
        " Vector<T> unused; normal_distribution(x, unused, pdf); }",
        FFN,
    ),
    Mutation(
        "GELU for bfloat16 products: the tail off by 7 % a unit of x",
        "csrc/cpu/base/vectors.h",
        "l * y - 1.15111066f;",
        "l * y - 1.05111066f;",
        FFN,
        "native and bf16",
        "emulated_tiles",
    ),
    Mutation(
        "LayerNorm without eps",
        "csrc/cpu/base/norm.h",
        "horizontal_sum<T>(squares) / static_cast<T>(channels);",
        "horizontal_sum<T>(squares) / static_cast<T>(channels) - eps;",
        FFN,
    ),
    Mutation(
        "taps of a 5x5 or 7x7 convolution not turned round in the backward",
        "csrc/cpu/mix_ffn/depthwise.h",
        "taps + (FLIP ? SIZE * SIZE - 1 - k : k) * leading",
        "taps + (FLIP && SIZE == 3 ? SIZE * SIZE - 1 - k : k) * leading",
        FFN,
    ),
    Mutation(
        "the gradient of a gate without its slope",
        "csrc/cpu/mix_ffn/mix_ffn.h",
        "store(grad + gate, g * x * f.slope);",
        "store(grad + gate, g * x);",
        FFN,
    ),
    Mutation(
        "ReLU attention: what queries get through their sum left out",
        "csrc/cpu/attention/rows.h",
        "      add_scaled(-dot, key_sum, width, grad_keys_ + i * width);\n",
        "",
        PLAIN,
    ),
    Mutation(
        "ReLU attention: what keys get through the sum left out, where tokens lie side by side",
        "csrc/cpu/attention/columns.h",
        "grad_sum[c] -= dot_rows(totals_, keys_ + c * width, width);",
        "",
        PLAIN,
    ),
    Mutation(
        "memory tokens get the gradient of one image less",
        "csrc/cpu/attention/attention.cpp",
        "combine_partials<T>(grads + head * size, nullptr, a.batch,",
        "combine_partials<T>(grads + head * size, nullptr, a.batch - (a.batch > 1),",
        PLAIN,
    ),
    Mutation(
        "MixFFN: slices of hidden features forget the images of the groups before",
        "csrc/cpu/mix_ffn/whole.cpp",
        "if (first == 0) vectors.clear();",
        "vectors.clear();",
        FFN,
    ),
    Mutation(
        "self-attention: keys of x do not see what the memory gets",
        "csrc/cpu/self_attention/memory.h",
        "found += static_cast<double>(weight(m, row, max, sum)) * gain(m, row, grad_context);",
        "(void)grad_context;",
        SELF,
    ),
    Mutation(
        "self-attention: the bias of values counted for memory tokens as well",
        "csrc/cpu/self_attention/memory.h",
        "return kept ? static_cast<T>(1 - of_memory) : T(0);",
        "return kept ? T(1) + T(0 * of_memory) : T(0);",
        SELF,
    ),
    Mutation(
        "gradient of RMSNorm about the mean",
        "csrc/cpu/base/norm.h",
        "const T mean = norm.centred ? horizontal_sum<T>(sum) * inverse : T(0), mean_dot",
        "const T mean = horizontal_sum<T>(sum) * inverse, mean_dot",
        SELF,
    ),
    Mutation(
        "one feature of 5003 left out of a linear layer",
        "csrc/cpu/linear/linear.cpp",
        "k * (range + 1) / k_ranges}",
        "k * (range + 1) / k_ranges - (k > 5000 && range == 0)}",
        "linear",
    ),
    Mutation(
        "chunks of BatchNorm joined without their sizes",
        "csrc/cpu/batch_norm/batch_norm.cpp",
        "difference * other_count / total;",
        "(count ? difference / 2 : difference);",
        "batch_norm",
    ),
    Mutation(
        "tiles: x3 y1 left out of six products",
        f"{ENGINE}/tile_product.h",
        "sum_products<ROWS, COLUMNS>(0, small);",
        "sum_products<ROWS, COLUMNS>(0, layout_.parts == 3 ? small - 1 : small);",
        FFN,
        *TILES,
    ),
    Mutation(
        "tiles: the last pair along k left out where k is no whole number of steps",
        f"{ENGINE}/parts.h",
        "for (std::int64_t i = 0; i < layout.rest; i += 2)",
        "for (std::int64_t i = 0; i + 2 < layout.rest; i += 2)",
        FFN,
        *TILES,
    ),
    Mutation(
        "tiles: the rest of one row along k rounded to two parts",
        f"{ENGINE}/parts.h",
        "for_parts(layout_.parts, load(from + c),",
        "for_parts(row == 5 ? 2 : layout_.parts, load(from + c),",
        FFN,
        *TILES,
    ),
    Mutation(
        "tiles: one of the three products of two parts twice",
        f"{ENGINE}/parts.h",
        "kTwo[] = {{0, 1}, {0, 0}, {1, 0}}",
        "kTwo[] = {{0, 1}, {0, 0}, {0, 1}}",
        "precision",
        *TILES,
    ),
    Mutation(
        "few tokens: two features left out of the products with one block of rows of a weight",
        f"{ENGINE}/weight_rows.h",
        "gemm<E>(count, k, width, {rows + first * k, k, 1}",
        "gemm<E>(count, k - 2 * (block == 1), width, {rows + first * k, k, 1}",
        SELF,
    ),
    Mutation(
        "few tokens: the last rows of a weight's gradient not written",
        f"{ENGINE}/dense.h",
        "i < min_of(rows_, kRows * (block + 1)); ++i)",
        "i < min_of(rows_ - 1, kRows * (block + 1)); ++i)",
        SELF,
    ),
    Mutation(
        "few tokens: what one product made of the tokens taken for another's",
        f"{ENGINE}/dense.h",
        "return engine.make_left(num_threads, memory_, k, tokens, {x, 1, leading});",
        "return engine.make_left(num_threads, memory_, k, tokens - (tokens > 20), {x, 1, leading});",
        FFN,
    ),
    Mutation(
        "few tokens: delta of the keys without the memory's part",
        "csrc/cpu/attention/attention.cpp",
        "{this->of_memory(), this->of_images()}",
        "{this->of_images()}",
        PLAIN,
    ),
    Mutation(
        "Triton: sums of the context in bfloat16",
        f"{KERNELS}/{PLAIN}/triton_kernels.py",
        "        context += dot(tl.trans(key), value, tl.float32, PRECISION)\n    row",
        "        context += dot(tl.trans(key), value, tl.bfloat16, PRECISION)\n    row",
        PLAIN,
        TRITON,
    ),
    Mutation(
        "Triton: one token of 170 left out of the softmax's sum",
        f"{KERNELS}/{PLAIN}/triton_kernels.py",
        "total = total * rescale + tl.sum(key, 0)",
        "total = total * rescale + tl.sum(tl.where((rows != 85)[:, None], key, 0.0), 0)",
        PLAIN,
        TRITON + " and tiles",
    ),
    Mutation(
        "Triton: delta of the wrong head",
        f"{KERNELS}/{PLAIN}/triton_backward.py",
        "tl.load(delta_ptr + pair * key_channels + features,",
        "tl.load(delta_ptr + pair // heads * heads * key_channels + features,",
        PLAIN,
        TRITON + " and tiles",
    ),
    Mutation(
        "CUDA: taps of the backward's convolution not turned round",
        f"{CUDA}/mix_ffn.h",
        "(BACKWARD ? 8 - t : t)",
        "t",
        FFN,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: chunks of the hidden norm joined without their sizes",
        f"{CUDA}/mix_ffn.h",
        "mean[r] = old + difference * share;",
        "mean[r] = old + difference / 2;",
        FFN,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: a term of the hidden norm's gradient dropped",
        f"{CUDA}/mix_ffn_first_backward.cu",
        " - normalized * z_product[p]);",
        ");",
        FFN,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: fc2's gradient from the first 128 channels of a block that has others",
        f"{CUDA}/mix_ffn_second_backward.cu",
        "tokens + (a.channel_chunk < g.channels ? 0 : out);",
        "tokens;",
        FFN,
        "cuda and bf16",
    ),
    Mutation(
        "CUDA: 16 of 64 pixels of a tile left out of fc1's gradient",
        f"{CUDA}/mix_ffn_first_backward.cu",
        "C::PIXELS, channels, ins);",
        "C::PIXELS - 16, channels, ins);",
        FFN,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: float32 in two parts of bfloat16 in place of three",
        f"{CUDA}/tiles.h",
        "for (int order = 2; order > 0; order--)",
        "for (int order = 1; order > 0; order--)",
        FFN,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: the hidden tile read before all warps have written it",
        f"{CUDA}/mix_ffn.h",
        "from_float<T>(exists ? sum + bias : 0.0f);\n  });\n  __syncthreads();",
        "from_float<T>(exists ? sum + bias : 0.0f);\n  });",
        FFN,
        "cuda and bf16",
    ),
    Mutation(
        "CUDA: weights used before their copy is waited for",
        f"{CUDA}/mix_ffn.h",
        "    wait<0>();\n",
        "",
        FFN,
        "cuda and bf16",
    ),
    Mutation(
        "CUDA: the sum of self-attention's softmax not rescaled",
        f"{CUDA}/self_attention_forward.cu",
        "total[h] *= rescale[h];",
        "",
        SELF,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: parts of the tokens weighted alike in the fold",
        f"{CUDA}/self_attention_fold.cu",
        "weights[s] = expf(read(f.maxima + part) - shift);",
        "weights[s] = 1;",
        SELF,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: delta not subtracted in the keys' gradient",
        f"{CUDA}/self_attention_token_backward.h",
        "(grad - delta[feature + own + p.column(j, q)])",
        "grad",
        SELF,
        "cuda and f32",
    ),
    Mutation(
        "CUDA: the sum of plain attention's softmax not rescaled",
        f"{CUDA}/attention_reduction.h",
        "    sum *= shrink;",
        "",
        PLAIN,
        "cuda and f32",
    ),
]


def prepare(folder: Path) -> None:
    for name in ("kernels", "csrc", "tests", "benchmarks", "msformer", "setup.py", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)


def build(folder: Path, module: str, variant: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, module, variant],
        cwd=folder,
        env=os.environ | {"MSFORMER_EMULATE_TILES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"the mutant does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def verdict(folder: Path, mutation: Mutation) -> str:
    """What the tests say: the first fault, or that they pass."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder / "kernels"), str(folder)]),
        "MSFORMER_TEST_EFFORT": "0.25",
        "MSFORMER_CUDA_EMULATE": "1",
        "TRITON_INTERPRET": "1",
    }
    if mutation.variant:
        environment["MSFORMER_CPU_ISA"] = mutation.variant
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "accuracy"]
    command += ["-k", mutation.expression, f"tests/kernels/ops/test_{mutation.tests}.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return "passes"
    lines = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    return next((line.removeprefix("AssertionError: ") for line in lines if line), f"exit status {done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--only", default="", help="only the mutations whose description holds this")
    options = parser.parse_args()
    from msformer_kernels import _native

    variant, rows, missed = _native.isa(), [], 0
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.what]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for module in sorted({"_native", *(mutation.module for mutation in chosen if mutation.module)}):
            build(folder, module, variant)
        for mutation in chosen:
            path = folder / mutation.file
            original = path.read_text()
            if original.count(mutation.old) != 1:
                raise SystemExit(
                    f"{mutation.what}: {mutation.file} holds the line {original.count(mutation.old)} times"
                )
            path.write_text(original.replace(mutation.old, mutation.new))
            if mutation.module:
                build(folder, mutation.module, mutation.variant or variant)
            found = verdict(folder, mutation)
            path.write_text(original)
            if mutation.module:
                build(folder, mutation.module, variant)
            missed += (found == "passes") != (mutation.old == mutation.new)
            rows.append(f"| {mutation.what} | {mutation.file} | {found} |")
            print(rows[-1], flush=True)
    table = "\n".join(["| mutation | file | what the tests say |", "|---|---|---|", *rows]) + "\n"
    if options.out:
        options.out.write_text(table)
    print(f"{missed} of {len(chosen)} not as they should be ({variant})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
