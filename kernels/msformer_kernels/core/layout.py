"""How tokens that an operator makes lie in memory."""

from __future__ import annotations

from torch import Tensor


def lies_by_channel(x: Tensor) -> bool:
    """Whether tokens ``[..., N, C]`` lie channel by channel, as images with channels first do."""
    return x.dim() > 2 and x.stride(-2) == 1 and x.stride(-1) != 1


def room_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty tensor for tokens like x ``[..., N, C]``, by default of as many channels.

    It lies channel by channel where x does, else token by token.
    """
    shape = x.shape if channels is None else (*x.shape[:-1], channels)
    if lies_by_channel(x):
        return x.new_empty((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
    return x.new_empty(shape)


def placed_like(found: Tensor, room: Tensor) -> Tensor:
    """`found` as it is where it lies in memory as `room` does, else a copy in that."""
    return found if found.stride() == room.stride() else room.copy_(found)


def laid_like(found: Tensor, x: Tensor) -> Tensor:
    """`found`, which lies token by token, or a copy that lies as x does."""
    return room_like(x).copy_(found) if lies_by_channel(x) else found
