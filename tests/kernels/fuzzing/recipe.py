"""A call of an operator in one line of text, from which the same call is made again.

    mix_ffn height=5 width=7 dtype=bf16 layout.x=sliced values=nan seed=3

Whatever is not named has the default of `DEFAULTS`, or that of the operator's case (tests/kernels/cases).
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from tests.kernels.cases import (
    Case,
    Tensors,
    attention_case,
    batch_norm_case,
    linear_case,
    mix_ffn_case,
    self_attention_case,
)
from tests.kernels.fuzzing.layouts import LAYOUTS, OF_WEIGHTS, laid_out, with_gradient_laid_out
from tests.kernels.fuzzing.values import OVERFLOWING, REGULAR, SPECIAL, VALUES

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
FACTORIES: dict[str, Callable[..., Case]] = {
    "batch_norm": batch_norm_case,
    "efficient_attention": attention_case,
    "efficient_self_attention": self_attention_case,
    "linear": linear_case,
    "mix_ffn": mix_ffn_case,
}
DEFAULTS: dict[str, Any] = {
    "backend": "native",
    "variant": "",
    "form": "by_shape",
    "dtype": "f32",
    "precision": "highest",
    "values": "normal",
    "at": "",
    "gradients": "contiguous",
    "frozen": "",
    "wide": False,
    "only_first": False,
    "threads": 1,
    "seed": 0,
}
"""variant: of the CPU kernels, "" the best one here. at: the tensor that `values` are for, "" the first. gradients: the
layout of those that come in. frozen: tensors that want no gradient. wide: parameters in float32 beside narrow tokens,
where the operator takes that. only_first: the other outputs are not used."""
_EXACT_IN_FLOAT32 = 1 + 2**-10
"""Times a bfloat16 or float16 number it has more bits than that, and float32 holds them all."""


@dataclass(frozen=True)
class Recipe:
    operator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By name, those that are not the default."""

    def __getitem__(self, name: str) -> Any:
        return self.settings.get(name, DEFAULTS[name])

    def __str__(self) -> str:
        return " ".join([self.operator, *(f"{name}={value}" for name, value in self.settings.items())])

    @staticmethod
    def parse(text: str) -> Recipe:
        """Raises ValueError for what is no recipe."""
        operator, *words = text.split()
        if operator not in FACTORIES:
            raise ValueError(f"recipe: expected one of {', '.join(FACTORIES)} first, got {operator!r}")
        settings: dict[str, Any] = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"recipe: expected name=value, got {word!r}")
            try:
                settings[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                settings[name] = value
        return Recipe(operator, settings)

    def changed(self, **settings: Any) -> Recipe:
        return Recipe(self.operator, {**self.settings, **settings})

    def without(self, name: str) -> Recipe:
        return Recipe(self.operator, {key: value for key, value in self.settings.items() if key != name})

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self["dtype"]]

    @property
    def repeats_itself(self) -> bool:
        """Whether all tokens or their gradients are the same: errors are, too, and add up instead of averaging out."""
        layouts = {value for name, value in self.settings.items() if name.startswith("layout.")}
        layouts.add(self["gradients"])
        return bool(layouts & {"one_token", "one_value"}) or self["values"] in ("same_tokens", "constant")

    @property
    def is_regular(self) -> bool:
        """Whether the error rule holds for the values."""
        return self["values"] in REGULAR

    def _wide_parameters(self) -> tuple[str, ...]:
        if not self["wide"] or self.dtype.itemsize > 2:
            return ()
        return tuple(name for name, _, wide in OPERATORS[self.operator]._floating if wide)

    def case(self) -> Case:
        """Makes the inputs, in their layouts, and calls the operator."""
        own = {n: v for n, v in self.settings.items() if n not in DEFAULTS and not n.startswith("layout.")}
        plain = FACTORIES[self.operator](str(self), **own)
        layouts = {n.removeprefix("layout."): v for n, v in self.settings.items() if n.startswith("layout.")}
        frozen = self["frozen"].split(",")
        wide = self._wide_parameters()

        def make() -> Tensors:
            torch.manual_seed(torch.initial_seed() + 1000 * self["seed"])  # a case has draws of its own
            tensors = plain.make()
            name = self["at"] or next(iter(tensors))
            if tensors.get(name) is not None:
                tensors[name] = VALUES[self["values"]](tensors[name], self.dtype)
            return {n: x if x is None else laid_out(x, layouts.get(n, "contiguous")) for n, x in tensors.items()}

        def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
            given: Tensors = {}
            for name, x in tensors.items():
                if x is not None and name in wide:
                    x = (x.float() if x.dtype.itemsize == 2 else x) * _EXACT_IN_FLOAT32
                given[name] = x.detach() if x is not None and name in frozen else x
            outputs = plain.call(given, backend)[: 1 if self["only_first"] else None]
            return tuple(with_gradient_laid_out(output, self["gradients"]) for output in outputs)

        return Case(str(self), make, call)


SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 23, 31, 32, 33, 37, 48, 63, 64, 65, 97, 100, 128, 131)
TOKENS = (*SIZES, 170, 211, 256, 257, 301, 509, 1003)
MOST_WORK = {"native": 3_000_000, "cuda": 60_000, "triton": 20_000}
"""Products of a call; the GPU backends run in an emulation and an interpreter."""


def draw(seed: int, index: int, backends: tuple[str, ...] = ("native",), variant: str = "") -> Recipe:
    """The recipe of this number, for a variant of the CPU kernels; each number is independent of the others."""
    rng = random.Random(f"{seed} {index}")
    operator = rng.choice(list(FACTORIES))
    backend = rng.choices(backends, [100 if name == "native" else 4 for name in backends])[0]
    if backend not in OPERATORS[operator].served_by:
        backend = "native"
    settings = _settings(rng, backend, variant)
    while True:
        options = _OPTIONS[operator](rng)
        if _work(operator, options) <= MOST_WORK[backend]:
            break
    with torch.device("meta"):
        names = [name for name, x in FACTORIES[operator]("names", **options).make().items() if x is not None]
    settings |= options
    first, *others = names
    for name in names:
        if rng.random() < (0.7 if name == first or operator == "efficient_attention" else 0.2):
            settings[f"layout.{name}"] = rng.choice(LAYOUTS if name == first else OF_WEIGHTS)
    floating = [name for name in names if name != "mask"]
    settings["values"] = rng.choice(rng.choices((("normal",), REGULAR, SPECIAL), (4, 3, 3))[0])
    settings["at"] = rng.choice((first, rng.choice(floating)))
    if others and rng.random() < 0.2:
        settings["frozen"] = ",".join(name for name in others if rng.random() < 0.5)
    if settings.get("norm") and settings.get("layout.x") == "one_value":
        settings["layout.x"] = "one_token"  # a norm of equal values is that of the rounding of their mean
    if settings["dtype"] == "f64" and settings["values"] in OVERFLOWING:
        settings["values"] = "big"  # nothing is more exact than float64
    if operator == "batch_norm" and settings.get("layout.x") in ("one_token", "one_value"):
        settings["layout.x"] = "expanded"  # nothing is left of tokens that are all the same
    if settings.get("norm") and (settings["values"], settings["at"]) == ("subnormal", first):
        settings["values"] = "some_subnormal"  # a norm makes tokens of it that are all the same
    if operator == "batch_norm" and settings["values"] == "same_tokens":
        settings["values"] = "constant"
    if operator == "batch_norm" and settings["gradients"] not in OF_WEIGHTS:
        settings["gradients"] = "contiguous"  # of the same gradient for every token nothing is left
    for name in ("activation", "inner_activation"):
        if settings["values"] in SPECIAL and settings.get(name) == "relu6":
            settings[name] = "relu"  # what PyTorch makes of NaN in ReLU6 depends on vectorisation
        if settings["values"] in ("subnormal", "some_subnormal") and settings.get(name) == "relu":
            settings[name] = "gelu"  # tiles make zeros of subnormal numbers, at which ReLU switches
    settings["seed"] = rng.randrange(1000)
    return _tidied(operator, settings, first)


def _settings(rng: random.Random, backend: str, variant: str) -> dict[str, Any]:
    """How the operator is called, whichever it is."""
    own = {"backend": backend, "dtype": rng.choices(list(DTYPES), (4, 3, 2, 1))[0]}
    if backend == "native":
        own["variant"] = variant
        own["form"] = rng.choice(("by_shape", "many_tokens", "few_tokens"))
        own["threads"] = rng.choice((1, 1, 1, 2, 3, 7))
        if own["dtype"] == "f32":
            own["precision"] = rng.choices(("highest", "high", "medium"), (6, 1, 1))[0]
    elif own["dtype"] == "f64":
        own["dtype"] = "f32"
    return own | {
        "gradients": rng.choice(("contiguous", "contiguous", *LAYOUTS)),
        "wide": rng.random() < 0.3,
        "only_first": rng.random() < 0.2,
    }


def _tidied(operator: str, settings: dict[str, Any], first: str) -> Recipe:
    """Without what is the default, or has no meaning for the operator."""
    if settings["at"] == first or settings["values"] == "normal":
        settings["at"] = ""
    if operator not in ("mix_ffn", "efficient_self_attention"):
        settings.pop("form", None)
    kept = {n: v for n, v in settings.items() if v not in (DEFAULTS.get(n), "contiguous") or n not in DEFAULTS}
    return Recipe(operator, {n: v for n, v in kept.items() if v != "contiguous"})


def _size(rng: random.Random, sizes: tuple[int, ...] = SIZES, empty: float = 0.0) -> int:
    return 0 if rng.random() < empty else rng.choice(sizes)


def _batch(rng: random.Random) -> int:
    return rng.choices((0, 1, 2, 3, 5, 9), (1, 20, 20, 10, 5, 3))[0]


def _linear(rng: random.Random) -> dict[str, Any]:
    sizes = {"tokens": _size(rng, TOKENS, 0.03), "channels": _size(rng, TOKENS, 0.03), "out": _size(rng, empty=0.03)}
    return {"batch": _batch(rng), **sizes, "bias": rng.random() < 0.7}


def _batch_norm(rng: random.Random) -> dict[str, Any]:
    options = {"batch": rng.choice((1, 2, 3, 5)), "tokens": rng.choice(TOKENS[2:]), "channels": _size(rng, empty=0.03)}
    return {**options, "affine": rng.random() < 0.7, "eps": rng.choice((1e-5, 1e-5, 0.3))}


def _attention(rng: random.Random) -> dict[str, Any]:
    options = {
        "batch": _batch(rng),
        "heads": rng.choice((1, 1, 2, 3, 8)),
        "query_tokens": _size(rng, TOKENS, 0.03),
        "tokens": _size(rng, TOKENS, 0.03),
        "key_channels": _size(rng),
        "value_channels": _size(rng),
        "mask": rng.choice((None, None, "random", "one_image_masked")),
        "memory": rng.choice((None, None, None, 1, 4, 99)),
        "normalization": rng.choice(("softmax", "softmax", "scaling", "relu")),
        "normalize_query": rng.random() < 0.8,
    }
    scales = {name: rng.choice((1.0, 1.0, 0.3, -0.7, 1.4)) for name in ("query_scale", "key_scale", "output_scale")}
    eps = {"eps": rng.choice((1e-15, 1e-5, 1e-3))} if options["normalization"] == "relu" else {}
    if options["batch"] == 0:
        options["mask"] = None
    return options | scales | eps


def _self_attention(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice((1, 1, 2, 4, 5))
    options = {
        "batch": _batch(rng),
        "tokens": _size(rng, TOKENS, 0.03),
        "channels": _size(rng),
        "key_channels": heads * max(1, rng.choice(SIZES) // heads),
        "value_channels": heads * max(1, rng.choice(SIZES) // heads),
        "heads": heads,
        "mask": rng.choice((None, None, "random", "one_image_masked")),
        "norm_kind": rng.choice(("layer", "layer", "rms")),
        "norm_eps": rng.choice((1e-5, 1e-5, 0.2)),
        "memory": rng.choice((None, None, None, 1, 5)),
    }
    if options["batch"] == 0:
        options["mask"] = None
    return options | {name: rng.random() < 0.6 for name in ("norm", "residual", "biases")}


def _mix_ffn(rng: random.Random) -> dict[str, Any]:
    sides = (1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 23, 32, 40, 71)
    gated = rng.random() < 0.2
    options = {
        "batch": _batch(rng),
        "height": _size(rng, sides, 0.02),
        "width": _size(rng, sides, 0.02),
        "channels": _size(rng),
        "hidden": 2 * _size(rng, empty=0.01) if gated else _size(rng, empty=0.01),
        "kernel_size": rng.choice((3, 3, 5, 7)),
        "activation": rng.choice(list(ACTIVATIONS)),
        "inner_activation": rng.choice(("identity", "identity", *ACTIVATIONS)),
        "gated": gated,
        "norm_eps": rng.choice((1e-5, 1e-5, 0.3)),
    }
    chosen = {name: rng.random() < 0.5 for name in ("hidden_norm", "norm", "biases", "skip", "residual")}
    return options | chosen | {"hidden_norm": chosen["hidden_norm"] and not gated}


_OPTIONS = {
    "batch_norm": _batch_norm,
    "efficient_attention": _attention,
    "efficient_self_attention": _self_attention,
    "linear": _linear,
    "mix_ffn": _mix_ffn,
}


def _work(operator: str, o: dict[str, Any]) -> int:
    """About how many multiplications a forward has."""
    batch = max(1, o["batch"])
    if operator == "batch_norm":
        return batch * int(o["tokens"] * o["channels"])
    if operator == "linear":
        return batch * int(o["tokens"] * o["channels"] * o["out"])
    if operator == "efficient_attention":
        tokens = o["tokens"] + o["query_tokens"] + (o["memory"] or 0)
        return batch * int(o["heads"] * tokens * o["key_channels"] * o["value_channels"])
    if operator == "mix_ffn":
        per_token = o["hidden"] * (2 * o["channels"] + o["kernel_size"] ** 2)
        return batch * int(o["height"] * o["width"] * per_token)
    return batch * int(o["tokens"] * 2 * o["channels"] * (o["key_channels"] + o["value_channels"]))


def shrunk(recipe: Recipe) -> list[Recipe]:
    """Simpler recipes, one change each; those that leave most out come first."""
    found = [recipe.without(name) for name in recipe.settings if name not in ("backend", "variant", "dtype")]
    for name, value in recipe.settings.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 1 and name not in ("seed", "heads"):
            found += [recipe.changed(**{name: smaller}) for smaller in sorted({1, value // 2, value - 1})]
    return found
