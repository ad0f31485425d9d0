"""What runs under a sanitizer: every operator, forward and backward, in the module that was built for it.

    python -m tests.kernels.native.sanitizers.sample MODULE.so [--fuzz 300] [--threads 3] [--cases small large]

Where the sanitizer finds something it ends the process, or prints it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import torch

NAME = "msformer_kernels._native"
DTYPES = ("f32", "bf16", "f16", "f64")


def load(path: str) -> None:
    """The module at the path as that of the package, which is imported afterwards."""
    spec = spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, path))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


def run_cases(kinds: Iterable[str], threads: int) -> int:
    """The cases of the operator tests, in every dtype and precision, both forms and several threads."""
    from msformer_kernels.core.operator import OPERATORS
    from msformer_kernels.core.precision import float32_products
    from msformer_kernels.native import arguments
    from tests.kernels.cases import cast, run
    from tests.kernels.fuzzing.recipe import DTYPES as BY_NAME

    count = 0
    torch.set_num_threads(threads)
    for name in OPERATORS:
        cases = import_module(f"tests.kernels.cases.{name}").CASES
        for case in (case for kind in kinds for case in getattr(cases, kind)):
            for dtype in DTYPES:
                for form in (arguments.MANY_TOKENS, arguments.FEW_TOKENS):
                    arguments.FORM = form
                    for precision in ("highest", "high", "medium") if dtype == "f32" else ("highest",):
                        with float32_products(precision):
                            run(case, cast(case.draw(), BY_NAME[dtype]), "native")
                        count += 1
        print(f"{name}: {count} calls", flush=True)
    arguments.FORM = arguments.BY_SHAPE
    return count


def run_recipes(count: int) -> int:
    """Calls of the fuzzer, whose results nobody looks at."""
    from tests.kernels.fuzzing.judge import exercise
    from tests.kernels.fuzzing.recipe import draw

    done = 0
    for number in range(count):
        try:
            exercise(draw(1, number))
            done += 1
        except RuntimeError:  # refused by the reference as well
            continue
    return done


def run_concurrently(threads: int) -> int:
    """Calls from several threads at a time, each of them on several threads of its own; every one has the bits of a
    call alone."""
    from tests.kernels.native.test_threads import call, calls, same

    expected = {name: call(name) for name in calls()}

    def work(number: int) -> bool:
        name = calls()[number % len(calls())]
        torch.set_num_threads(1 + number % threads)
        return same(call(name), expected[name])

    numbers = range(4 * len(calls()))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, numbers))
    return len(numbers)


def read_beyond_a_tensor() -> None:
    """By way of NumPy, which lets a tensor be larger than its memory."""
    import msformer_kernels as kernels

    memory = np.zeros((7, 16), np.float32)
    x = torch.from_numpy(np.lib.stride_tricks.as_strided(memory, (1, 8, 16)))
    kernels.linear(x, torch.zeros(16, 16), backend="native")


def write_from_two_threads() -> None:
    """The same output, by calls that are made for it."""
    from msformer_kernels import _native
    from msformer_kernels.native.arguments import activation, addresses

    x, weight, output = torch.ones(1, 4000, 16), torch.ones(16, 16), torch.empty(1, 4000, 16)
    call = (1, 0, *x.shape, 16, *activation(x), *addresses((weight, None)), *activation(output))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_native.linear_forward, [call] * 8))


FAULTS: dict[str, Callable[[], None]] = {"beyond": read_beyond_a_tensor, "race": write_from_two_threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("--fuzz", type=int, default=300)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=["small", "medium", "large", "empty"])
    parser.add_argument("--fault", choices=list(FAULTS), help="a call that is wrong, which the sanitizer must find")
    options = parser.parse_args()
    load(options.module)
    if options.fault:
        return FAULTS[options.fault]()
    native = sys.modules[NAME]
    counts = {
        "cases": run_cases(options.cases, options.threads),
        "recipes": run_recipes(options.fuzz),
        "concurrent calls": run_concurrently(options.threads),
    }
    print(f"{native.isa()}: {', '.join(f'{count} {name}' for name, count in counts.items())}", flush=True)


if __name__ == "__main__":
    main()
