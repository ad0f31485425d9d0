"""Triton's interpreter in half the time. It looks through all of `triton.language` for what it has to replace, at every
launch and every call of a device function; it calculates what follows from a type, for every result. Here both happen
once.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def hasten() -> None:
    """Nothing where there is no Triton, or another form of its interpreter."""
    try:
        interpreter: Any = import_module("triton.runtime.interpreter")
        core: Any = import_module("triton.language.core")
        patch, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
        make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    except (ImportError, AttributeError):
        return
    dtypes: dict[str, Any] = {}
    of_types: dict[Any, dict[str, Any]] = {}
    of_tensors: dict[str, dict[str, Any]] = {}

    @functools.cache
    def patch_for_good(function: Any) -> Any:
        patch(function)
        return SimpleNamespace(restore=lambda: None)  # which a launch calls at its end

    def known_dtype(type: Any) -> Any:
        if type.name not in dtypes:
            dtypes[type.name] = dtype_of(type)
        return dtypes[type.name]

    def known_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = vars(self)
        self.__dict__ = of_types[key].copy()

    def tensor_of_known_type(self: Any, handle: Any, type: Any) -> None:
        if type.name not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[type.name] = vars(self)
        self.__dict__ = of_tensors[type.name] | {"handle": handle}

    interpreter._patch_lang, interpreter._get_np_dtype = patch_for_good, known_dtype
    core.block_type.__init__, core.tensor.__init__ = known_type, tensor_of_known_type
