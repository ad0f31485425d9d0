"""Cases of `efficient_attention`."""

from __future__ import annotations

from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases.base import Case, Cases, Tensors, random, random_mask, strided


def attention_case(
    name: str,
    batch: int = 1,
    heads: int = 1,
    query_tokens: int = 7,
    tokens: int = 9,
    key_channels: int = 5,
    value_channels: int = 6,
    mask: str | None = None,
    layout: str = "contiguous",
    memory: int | None = None,
    **options: object,
) -> Case:
    def of_memory() -> Tensors:
        if memory is None:
            return {}
        sizes = {"memory_key": key_channels, "memory_value": value_channels}
        return {name: strided(random(heads, memory, size), layout) for name, size in sizes.items()}

    def make() -> Tensors:
        return {
            "query": strided(random(batch, heads, query_tokens, key_channels, scale=2), layout),
            "key": strided(random(batch, heads, tokens, key_channels, scale=2), layout),
            "value": strided(random(batch, heads, tokens, value_channels), layout),
            "mask": random_mask(mask, batch, tokens),
            **of_memory(),
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return kernels.efficient_attention(**tensors, **options, backend=backend)

    return Case(name, make, call)


CASES = Cases(
    small=[
        attention_case("one", query_tokens=1, tokens=1, key_channels=1, value_channels=1),
        attention_case("cross", batch=2, heads=3, query_tokens=4, tokens=13, key_channels=5, value_channels=9),
        attention_case("masked", batch=3, heads=2, tokens=17, mask="random"),
        attention_case("all_masked", batch=2, heads=2, tokens=6, mask="one_image_masked"),
        attention_case("scales", batch=2, query_scale=0.7, key_scale=1.4, output_scale=0.3),
        attention_case("plain_query", normalize_query=False, mask="random"),
        attention_case("scaling", batch=2, heads=2, normalization="scaling", mask="one_image_masked", output_scale=2.0),
        attention_case("scaling_plain_query", normalization="scaling", normalize_query=False, key_scale=0.5),
        attention_case("transposed", batch=2, heads=2, layout="transposed"),
        attention_case("sliced", batch=2, heads=2, layout="sliced", mask="random"),
        attention_case("expanded", batch=3, heads=2, layout="expanded"),
        attention_case("memory", batch=2, heads=3, layout="transposed", memory=4),
    ],
    medium=[
        attention_case(
            "tiles", heads=2, query_tokens=75, tokens=170, key_channels=70, value_channels=66, mask="random"
        ),
    ],
    large=[
        attention_case(
            "columns", heads=2, query_tokens=75, tokens=137, key_channels=37, value_channels=21, layout="transposed"
        ),
        attention_case(
            "long", heads=2, query_tokens=301, tokens=1003, key_channels=33, value_channels=20, mask="random"
        ),
        attention_case(
            "scaling_long", query_tokens=7, tokens=700, key_channels=8, value_channels=70, normalization="scaling"
        ),
        attention_case("memory_rows", batch=2, tokens=211, mask="random", memory=99, normalization="scaling"),
        attention_case("relu_rows", batch=2, query_tokens=137, tokens=301, query_scale=-0.7, normalization="relu"),
        attention_case(
            "relu_columns",
            heads=2,
            query_tokens=205,
            tokens=330,
            key_channels=17,
            value_channels=19,
            mask="random",
            layout="transposed",
            key_scale=1.4,
            output_scale=0.3,
            memory=3,
            normalization="relu",
            eps=1e-3,
        ),
        attention_case(
            "relu_plain", heads=3, layout="transposed", normalize_query=False, normalization="relu", output_scale=0.6
        ),
    ],
    empty=[
        attention_case("empty_batch", batch=0),
        attention_case("no_keys", tokens=0),
        attention_case("only_memory", heads=2, tokens=0, memory=3),
        attention_case("no_queries", query_tokens=0),
    ],
)
