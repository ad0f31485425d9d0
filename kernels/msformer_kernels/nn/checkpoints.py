"""Checkpoints of other implementations: their names and shapes become ours while a layer loads.

Names of the layers, each with `weight` and `bias`, below the prefix of a feed-forward layer:

| ours | transformers 4 | transformers 5 | timm | MISSFormer, DAE-Former |
|---|---|---|---|---|
| fc1 | dense1 | fc1 | fc1 | fc1 |
| dwconv.dwconv | dwconv.dwconv | dwconv.dwconv | dwconv | dwconv.dwconv |
| fc2 | dense2 | fc2 | fc2 | fc2 |
| norm1 | | | | norm1, and norm2, norm3, which no forward uses |

Linear layers may come as 1 x 1 convolutions, ``[out, in, 1, 1]``, and the other way round.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

_RENAMED = {"dense1": "fc1", "dense2": "fc2", "dwconv": "dwconv.dwconv"}
_UNUSED = ("norm2", "norm3")


def accept_other_names(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook for `load_state_dict` of a feed-forward layer. Tensors that no published forward uses are left out with a
    warning that names them."""
    # a submodule that was put in place of another one may have such a name
    own = dict((*layer.named_parameters(), *layer.named_buffers()))
    for other, ours in _RENAMED.items():
        for part in ("weight", "bias"):
            key, name = f"{prefix}{other}.{part}", f"{prefix}{ours}.{part}"
            if key in state and name not in state and f"{other}.{part}" not in own:
                state[name] = state.pop(key)
    if getattr(layer, "norm1", None) is not None:
        unused = [key for name in _UNUSED for part in ("weight", "bias") if (key := f"{prefix}{name}.{part}") in state]
        unused = [key for key in unused if key.removeprefix(prefix) not in own]
        for key in unused:
            state.pop(key)
        if unused:
            names = ", ".join(unused)
            warnings.warn(f"load_state_dict: {names}: not loaded, no published forward uses it", stacklevel=2)
    accept_other_shapes(layer, state, prefix)


def accept_other_shapes(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook for `load_state_dict`: weights of linear layers and of 1 x 1 convolutions for one another."""
    for name, parameter in layer.named_parameters():
        found = state.get(prefix + name)
        if isinstance(found, Tensor) and _without_ones(found) == _without_ones(parameter) and found.dim() >= 2:
            state[prefix + name] = found.reshape(parameter.shape)


def _without_ones(x: Tensor) -> tuple[int, ...]:
    """The shape without the size of a 1 x 1 kernel."""
    return tuple(x.shape[:2]) if x.dim() == 4 and x.shape[2:] == (1, 1) else tuple(x.shape)
