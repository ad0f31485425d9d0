"""What can be measured: an operation at a shape, in a type, forward or with its gradients; and the grids of these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import counts
from benchmarks.rivals import DTYPES, PLAIN
from benchmarks.shapes import MSFORMER, STAGES, Shape, batched, family
from msformer.model import MINIMUM_SIZE

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

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {self.dtype} {self.passes}"

    @property
    def is_model(self) -> bool:
        return self.operation in MODELS

    @property
    def joins_gradients(self) -> bool:
        """Whether results are compared with the gradients of all parameters as one vector; see `correctness`."""
        return self.is_model or self.dtype == "bfloat16"

    @property
    def training(self) -> bool:
        return self.passes == "training"

    @property
    def family(self) -> str:
        return family(self.shape)

    def work(self) -> counts.Work:
        """The least that the case takes; values of 4 or 2 bytes, by its type."""
        item = DTYPES[self.dtype].itemsize
        if self.operation == "attention":
            return counts.attention(self.shape, self.training, item)
        if self.operation == "block":
            return counts.block(self.shape, self.training, item)
        if self.operation == "step":
            return counts.step(self.shape, DEPTH, True, item)
        if self.operation == "image":
            return counts.step(self.shape, DEPTH, True, item) * IMAGE_STEPS + counts.step(
                self.shape, DEPTH, False, item
            )
        return counts.mix_ffn(self.shape, self.training, item)


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
