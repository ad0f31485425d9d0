"""``python -m msformer_kernels.patch MODULE:CALLABLE [--shape 1,3,512,512]``

Patches a model that a function of the user makes, prints the report, and beside each other time and memory of the
original and of the patched model. CALLABLE takes nothing and returns a model, or a model and the tuple of its inputs;
or it is a model. MODULE is imported with the current folder on the path.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.patching.api import patch
from msformer_kernels.patching.gain import run_example
from msformer_kernels.patching.memory import peak_memory
from msformer_kernels.patching.report import table
from msformer_kernels.patching.timing import medians

DEFAULT_SHAPE = (1, 3, 512, 512)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m msformer_kernels.patch", description=_first_lines())
    parser.add_argument("target", metavar="MODULE:CALLABLE", help="makes the model, or the model and its inputs")
    default = ",".join(map(str, DEFAULT_SHAPE))
    parser.add_argument("--shape", type=_shape, default=default, help="of a random input (%(default)s)")
    parser.add_argument("--min-gain", type=float, default=1.05, help="of a module, to be replaced (%(default)s)")
    parser.add_argument("--samples", type=int, default=5, help="of each time; 0 leaves the times out (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        make = found(options.target)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        parser.error(str(error))
    returned = called(make)
    try:
        model, inputs = model_and_inputs(options.target, returned, options.shape)
    except TypeError as error:
        parser.error(str(error))
    try:
        run_example(model, inputs)
    except Exception as error:  # of a model that we know nothing of
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors(inputs))
        parser.error(f"{options.target}: a call with {shapes} fails (see --shape): {type(error).__name__}: {error}")
    original = copy.deepcopy(model)
    print(patch(model, example=inputs, min_gain=options.min_gain))
    if options.samples > 0:
        threads = f"{torch.get_num_threads()} threads"
        print(f"\ntimes, {threads}, inputs {', '.join(str(tuple(x.shape)) for x in tensors(inputs))}:")
        print(compared(original, model, inputs, options.samples))


def _first_lines() -> str:
    return (__doc__ or "").partition("\n\n")[2]


def _shape(text: str) -> tuple[int, ...]:
    """Raises argparse.ArgumentTypeError for anything but sizes."""
    if not all(size.strip().isdecimal() and int(size) > 0 for size in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, got {text!r}")
    return tuple(int(size) for size in text.split(","))


def found(target: str) -> Any:
    """What ``MODULE:CALLABLE`` names: a model, or what can be called without arguments.

    Raises:
        ValueError: target is not of this form.
        ImportError, AttributeError: it is not there.
        TypeError: it cannot be called without arguments.
    """
    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise ValueError(f"target: expected MODULE:CALLABLE, got {target!r}")
    with _current_folder():
        named = getattr(import_module(module), name)
    if isinstance(named, nn.Module):
        return named
    if not callable(named):
        raise TypeError(f"{target}: expected something to be called, got {named!r}")
    try:
        inspect.signature(named).bind()
    except TypeError as error:
        raise TypeError(f"{target}: expected that it takes no arguments, {error}") from None
    except ValueError:  # of what is not written in Python
        pass
    return named


@contextmanager
def _current_folder() -> Iterator[None]:
    """On the path of imports."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def called(named: Any) -> Any:
    """What a callable returns, or a model itself. What the user's own code raises goes through, with its traceback."""
    with _current_folder():
        return named if isinstance(named, nn.Module) else named()


def model_and_inputs(target: str, returned: Any, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model that a callable returned, and the inputs of a call.

    Raises:
        TypeError: it is no model.
    """
    model, inputs = returned if isinstance(returned, (tuple, list)) and len(returned) == 2 else (returned, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{target}: expected it to return a torch.nn.Module, got {type(model).__name__}")
    if inputs is None:
        first = next(model.parameters(), torch.empty(0))
        inputs = (torch.randn(shape, device=first.device, dtype=first.dtype),)
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def compared(original: nn.Module, patched: nn.Module, inputs: tuple[Any, ...], samples: int) -> str:
    """A table of times and memory, of the forward in evaluation mode and of forward + backward in training mode."""
    rows = []
    for title, training in (("forward", False), ("forward + backward", True)):
        run = training_step if training else forward
        rivals = [model.train(training) for model in (original, patched)]
        before, after = medians(lambda model, run=run: run(model, inputs), rivals, samples)  # type: ignore[misc]
        memory = [peak_memory(lambda m=m, run=run: run(m, inputs), m) for m in rivals]  # type: ignore[misc]
        times = (f"{1e3 * before:.1f} ms", f"{1e3 * after:.1f} ms", f"{before / after:.2f} x")
        rows.append((title, *times, *("unknown" if m is None else f"{m / 2**20:.0f} MiB" for m in memory)))
    return table(("", "original", "patched", "speed-up", "peak memory", "patched"), rows)


def forward(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A call without gradients."""
    with torch.no_grad():
        model(*inputs)


def training_step(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A call and the backward of half the square of its outputs, for all parameters and the inputs that ask for it."""
    outputs = [y for y in tensors(model(*inputs)) if y.requires_grad]
    torch.autograd.backward(outputs, [y.detach() for y in outputs])
    model.zero_grad(set_to_none=True)
    for x in tensors(inputs):
        x.grad = None


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a model takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)
