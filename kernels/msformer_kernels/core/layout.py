"""How tokens that an operator makes lie in memory."""

from __future__ import annotations

from torch import Tensor


def room_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor for tokens like x ``[..., N, C]``, by default of as many channels.

    It lies channel by channel where x does, as images with channels first do, else token by token.
    """
    shape = x.shape if channels is None else (*x.shape[:-1], channels)
    if x.dim() > 2 and x.stride(-2) == 1 and x.stride(-1) != 1:
        return x.new_empty((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    return x.new_empty(shape)


def placed_like(found: Tensor, room: Tensor) -> Tensor:
    """`found` as it is where it lies in memory as `room` does, else a copy in that."""
    return found if found.stride() == room.stride() else room.copy_(found)
