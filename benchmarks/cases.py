"""What can be measured: an operation at a shape, in a type, forward or with its gradients; how much work that is at the
least; and the grids of these.

Work is the flop of the folded form, and the bytes that must move, whoever does it: a form that does more, as the
published one does, is not credited for it. Counted are the products; the backward recomputes what it needs. Bytes are
inputs, outputs and weights, moved once (see docs/design.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from msformer.model import MINIMUM_SIZE

from .rivals import DTYPES, PLAIN, STORAGE, type_name

_TEXT = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:h(\d+))?(?:m(\d+))?")
EXPECTED = "BATCHxHEIGHTxWIDTHxDIM, then optionally hHEADS and mHIDDEN, such as 1x257x257x100 or 8x64x64x64h2m256"


@dataclass(frozen=True)
class Shape:
    """Images of ``height * width`` tokens with ``dim`` channels, attention heads, and width of the hidden layer."""

    batch: int
    height: int
    width: int
    dim: int
    heads: int = 1
    hidden: int = 0
    """0 means the usual 4 * dim."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", self.hidden or 4 * self.dim)
        for name in ("batch", "height", "width", "dim", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide {self.dim} channels")

    @property
    def tokens(self) -> int:
        """Of all images of the batch."""
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        hidden = "" if self.hidden == 4 * self.dim else f"m{self.hidden}"
        return f"{self.batch}x{self.height}x{self.width}x{self.dim}h{self.heads}{hidden}"


def parse_shape(text: str) -> Shape:
    """The shape that a text such as ``1x257x257x100h1`` names.

    Raises:
        ValueError: not of that form, a size below 1, heads that do not divide the channels.
    """
    match = _TEXT.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a shape; expected {EXPECTED}")
    batch, height, width, dim, heads, hidden = (int(part) if part is not None else None for part in match.groups())
    assert batch is not None
    assert height is not None
    assert width is not None
    assert dim is not None
    if heads == 0 or hidden == 0:
        raise ValueError(f"{text!r}: heads and hidden must be at least 1")
    return Shape(batch, height, width, dim, heads or 1, hidden or 0)


def _square(size: int, dim: int, heads: int) -> Shape:
    return Shape(1, size, size, dim, heads)


MSFORMER = tuple(_square(size, 100, 1) for size in (65, 129, 257, 513, 1025))
# strides 4, 8, 16 and 32 of an image of 512 x 512
SEGFORMER = (_square(128, 32, 1), _square(64, 64, 2), _square(32, 160, 5), _square(16, 256, 8))
PVT = (_square(128, 64, 1), _square(64, 128, 2), _square(32, 320, 5), _square(16, 512, 8))
SMALL = (_square(14, 160, 5), _square(14, 256, 8), _square(7, 256, 8), _square(7, 512, 8))
STAGES = SEGFORMER + PVT + SMALL

_FAMILIES = {"MS-Former": MSFORMER, "SegFormer stages": SEGFORMER, "PVTv2 stages": PVT, "few tokens": SMALL}


def batched(shapes: tuple[Shape, ...], batch: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, batch=batch) for shape in shapes)


def family(shape: Shape) -> str:
    """The group of the grid that a shape belongs to, by whatever size of batch."""
    single = replace(shape, batch=1)
    name = next((name for name, members in _FAMILIES.items() if single in members), None)
    if name is None:
        name = "MS-Former" if replace(MSFORMER[0], height=shape.height, width=shape.width) == single else "other"
    return name if shape.batch == 1 else f"{name}, batch {shape.batch}"


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


def attention_work(shape: Shape, training: bool, item: int) -> Work:
    """Forward: 8 N C^2; x twice, the output. Backward: 22 N C^2; x and its gradient's input twice, its gradient."""
    square, values, weights = shape.tokens * shape.dim**2, shape.tokens * shape.dim, 4 * shape.dim**2
    forward = Work(8 * square, (3 * values + weights) * item)
    return forward + Work(22 * square, (5 * values + 2 * weights) * item) if training else forward


def mix_ffn_work(shape: Shape, training: bool, item: int) -> Work:
    """Forward: 4 N C hidden. Backward: 10 N C hidden."""
    product, values, weights = (
        shape.tokens * shape.dim * shape.hidden,
        shape.tokens * shape.dim,
        2 * shape.dim * shape.hidden,
    )
    forward = Work(4 * product, (2 * values + weights) * item)
    return forward + Work(10 * product, (3 * values + 2 * weights) * item) if training else forward


def block_work(shape: Shape, training: bool, item: int) -> Work:
    return attention_work(shape, training, item) + mix_ffn_work(shape, training, item)


def step_work(shape: Shape, depth: int, training: bool, item: int) -> Work:
    """MS-Former on an image: `depth` blocks on two scales, patch embeddings, and the linear layers of the logits.

    The bytes are those of the blocks alone, so the floor is a little too low.
    """
    half = Shape(shape.batch, -(-shape.height // 2), -(-shape.width // 2), shape.dim, shape.heads, shape.hidden)
    blocks = (block_work(shape, training, item) + block_work(half, training, item)) * depth
    convolutions = 2 * 27 * shape.dim * (shape.tokens + half.tokens)
    logits = 2 * shape.dim**2 * (shape.tokens + 4 * half.tokens)
    patches = 4 * shape.dim**2 * shape.tokens
    # the gradients of weights and inputs are one more product each; the image needs none
    rest = (2 * convolutions + 3 * (logits + patches)) if training else convolutions + logits
    return blocks + Work(rest, 0)


LAYERS = ("attention", "mix_ffn", "mix_ffn_skip", "block")
MODELS = ("step", "image")
OPERATIONS = LAYERS + MODELS
PASSES = ("forward", "training")
DEPTH = 2
IMAGE_STEPS = 5


@dataclass(frozen=True)
class Case:
    """One group of rivals.

    - ``attention``: LayerNorm, efficient attention, residual; ``mix_ffn`` and ``mix_ffn_skip`` likewise.
    - ``block``: attention, then MixFFN-skip.
    - ``step``: one step of fitting MS-Former (two blocks a branch): forward, losses, backward, optimiser.
    - ``image``: `msformer.segment` from the image to the label map, with 5 steps.

    ``forward`` is without gradients, ``training`` is forward and backward, with the gradients of the input and of all
    parameters. Steps and images are always ``training``.
    """

    operation: str
    shape: Shape
    dtype: str
    passes: str
    precision: str = field(default="highest", kw_only=True)
    """PyTorch's setting for products of float32 tensors, for every rival; matters in float32 only."""

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {self.type} {self.passes}"

    @property
    def type(self) -> str:
        return type_name(self.dtype, self.precision)

    @property
    def is_model(self) -> bool:
        return self.operation in MODELS

    @property
    def joins_gradients(self) -> bool:
        """Whether results are compared with the gradients of all parameters as one vector; see `measure`."""
        return self.is_model or self.type in ("bfloat16", "float32 medium")

    @property
    def training(self) -> bool:
        return self.passes == "training"

    @property
    def family(self) -> str:
        return family(self.shape)

    def work(self) -> Work:
        """The least that the case takes; values of 4 or 2 bytes, by its type."""
        item = STORAGE[self.dtype].itemsize
        if self.operation == "attention":
            return attention_work(self.shape, self.training, item)
        if self.operation == "block":
            return block_work(self.shape, self.training, item)
        if self.operation == "step":
            return step_work(self.shape, DEPTH, True, item)
        if self.operation == "image":
            return step_work(self.shape, DEPTH, True, item) * IMAGE_STEPS + step_work(self.shape, DEPTH, False, item)
        return mix_ffn_work(self.shape, self.training, item)


def why_not(operation: str, shape: Shape) -> str | None:
    """Why an operation cannot be measured at a shape; None if it can."""
    if operation not in MODELS:
        return None
    if min(shape.height, shape.width) < MINIMUM_SIZE:
        return f"{operation} needs images of at least {MINIMUM_SIZE} x {MINIMUM_SIZE}"
    if shape.heads != 1 or shape.hidden != 4 * shape.dim:
        return f"{operation} has one head and a hidden width of 4 * dim, as published"
    if operation == "image" and shape.batch != 1:
        return "image has batch 1"
    return None


def make_cases(
    operations: Iterable[str], shapes: Iterable[Shape], dtypes: Iterable[str], passes: Iterable[str]
) -> list[Case]:
    """All combinations that there are, in this order; an image is only fitted in float32."""
    dtypes, passes, shapes = tuple(dtypes), tuple(passes), tuple(shapes)
    found = []
    for operation in operations:
        for shape in shapes:
            for dtype in dtypes:
                if why_not(operation, shape) or (operation == "image" and dtype != "float32"):
                    continue
                kinds = [kind for kind in passes if operation not in MODELS or kind == "training"]
                found += [Case(operation, shape, dtype, kind) for kind in kinds]
    return found


def in_precisions(case: Case, precisions: Iterable[str]) -> list[Case]:
    """A case of float32 in each of these; another as it is."""
    return [replace(case, precision=name) for name in precisions] if case.dtype == "float32" else [case]


QUICK_CASES = (
    Case("attention", MSFORMER[1], "float32", "training"),
    Case("mix_ffn", Shape(1, 32, 32, 160, 5), "float32", "training"),
    Case("mix_ffn_skip", MSFORMER[1], "float32", "training"),
    Case("block", MSFORMER[1], "float32", "training"),
    Case("step", MSFORMER[1], "float32", "training"),
    Case("image", MSFORMER[0], "float32", "training"),
)
"""A look at everything in less than three minutes on two cores."""


def quick_rivals(case: Case, rivals: Iterable[str]) -> tuple[str, ...]:
    """The quick selection compiles layers only; compiling the model would take most of its time."""
    return tuple(rival for rival in rivals if rival != "compile" or not case.is_model)


def full_shapes(operation: str) -> tuple[Shape, ...]:
    """MixFFN at the stages it is used in, MixFFN-skip in MS-Former; the rest at both."""
    stages = STAGES + batched(STAGES, 8)
    if operation in MODELS:
        return MSFORMER[:4]
    return stages if operation == "mix_ffn" else MSFORMER if operation == "mix_ffn_skip" else MSFORMER + stages


def full_cases() -> list[Case]:
    """The whole grid."""
    return [
        case for operation in OPERATIONS for case in make_cases([operation], full_shapes(operation), DTYPES, PASSES)
    ]


def order_rivals(rivals: Iterable[str]) -> tuple[str, ...]:
    """The plain forms first, then the backends, each once."""
    chosen = dict.fromkeys(rivals)
    return tuple([name for name in PLAIN if name in chosen] + [name for name in chosen if name not in PLAIN])
