"""The operators in PyTorch's counter of operations, `torch.utils.flop_counter.FlopCounterMode`.

PyTorch's module for it imports Triton where that is installed, which takes longer than this whole package. So it is not
imported here: formulas are handed to it when something else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count_flops(op: Any, formula: Callable[..., int]) -> None:
    """From now on FlopCounterMode counts what `formula` says of a call, which gets the op's arguments and its output
    as ``out_val``."""
    _formulas[op] = formula
    if _COUNTER in sys.modules:
        _register()


def _register() -> None:
    register = import_module(_COUNTER).register_flop_formula
    while _formulas:
        op, formula = _formulas.popitem()
        register(op, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter as the other finders do, once; it gets the formulas at the end of its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in sys.meta_path)), None)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            found.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return found


sys.meta_path.insert(0, _WhenImported())
