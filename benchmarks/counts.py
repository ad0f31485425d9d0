"""How much work a case is at the least, whoever does it: the flop of the folded form, and the bytes that must move.

A form that does more, as the published one does, is not credited for it. Counted are the products; the backward
recomputes what it needs. Bytes are inputs, outputs and weights, moved once (see docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Work:
    """Products and sums, and bytes."""

    flop: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flop * factor, self.bytes * factor)

    def seconds(self, peak_flop_rate: float, bandwidth: float) -> float:
        """What a machine with these ceilings needs at the least."""
        return max(self.flop / peak_flop_rate, self.bytes / bandwidth)


def attention(shape: Shape, training: bool, item: int) -> Work:
    """Forward: 8 N C^2; x twice, the output. Backward: 22 N C^2; x and its gradient's input twice, its gradient."""
    square, values, weights = shape.tokens * shape.dim**2, shape.tokens * shape.dim, 4 * shape.dim**2
    forward = Work(8 * square, (3 * values + weights) * item)
    return forward + Work(22 * square, (5 * values + 2 * weights) * item) if training else forward


def mix_ffn(shape: Shape, training: bool, item: int) -> Work:
    """Forward: 4 N C hidden. Backward: 10 N C hidden."""
    product, values, weights = (
        shape.tokens * shape.dim * shape.hidden,
        shape.tokens * shape.dim,
        2 * shape.dim * shape.hidden,
    )
    forward = Work(4 * product, (2 * values + weights) * item)
    return forward + Work(10 * product, (3 * values + 2 * weights) * item) if training else forward


def block(shape: Shape, training: bool, item: int) -> Work:
    return attention(shape, training, item) + mix_ffn(shape, training, item)


def step(shape: Shape, depth: int, training: bool, item: int) -> Work:
    """MS-Former on an image: `depth` blocks on two scales, patch embeddings, and the linear layers of the logits.

    The bytes are those of the blocks alone, so the floor is a little too low.
    """
    half = Shape(shape.batch, -(-shape.height // 2), -(-shape.width // 2), shape.dim, shape.heads, shape.hidden)
    blocks = (block(shape, training, item) + block(half, training, item)) * depth
    convolutions = 2 * 27 * shape.dim * (shape.tokens + half.tokens)
    logits = 2 * shape.dim**2 * (shape.tokens + 4 * half.tokens)
    patches = 4 * shape.dim**2 * shape.tokens
    # the gradients of weights and inputs are one more product each; the image needs none
    rest = (2 * convolutions + 3 * (logits + patches)) if training else convolutions + logits
    return blocks + Work(rest, 0)
