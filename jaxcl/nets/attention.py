"""Attention whose scores are not kept."""

from functools import partial

import jax
from jax import lax

from jaxcl.typing import Array

_IN_CACHE = 2**19  # scores that stay in a CPU's cache


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    scale: float | None = None,
) -> Array:
    """``jax.nn.dot_product_attention``, with large scores worked out again for the gradient instead of kept.

    On a CPU so few examples are taken at a time that their scores stay in cache; XLA alone would write those of the
    whole batch and read them again.

    Args:
        query: [B, L, N, D], of N heads.
        key: [B, S, K, D], with N a multiple of K.
        value: [B, S, K, D].
        bias: Added to scores, [B, N, L, S]; the first two axes may be of 1.
        mask: True where a query sees a key, [B, N, L, S]; all but the last axis may be of 1.
        scale: Of scores; 1 / sqrt(D) if not given.

    Returns:
        [B, L, N, D].
    """
    batch, length, heads, _ = query.shape
    own, shared = {"query": query, "key": key, "value": value}, dict[str, Array]()
    for name, part in (("bias", bias), ("mask", mask)):
        if part is not None:
            (own if part.shape[0] == batch else shared)[name] = part
    scores = heads * length * key.shape[1]  # of an example
    if batch * scores <= _IN_CACHE:
        return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)

    attend = jax.checkpoint(partial(jax.nn.dot_product_attention, scale=scale))

    few = next(size for size in range(max(1, _IN_CACHE // scores), 0, -1) if batch % size == 0)

    def few_at_a_time(own: dict[str, Array], shared: dict[str, Array]) -> Array:
        # Parts go into `attend` as the loop has them: those that it keeps are then no copies
        parts = {name: part.reshape(-1, few, *part.shape[1:]) for name, part in own.items()}
        return lax.map(lambda part: attend(**part, **shared), parts).reshape(query.shape)

    return lax.platform_dependent(own, shared, cpu=few_at_a_time, default=lambda own, shared: attend(**own, **shared))
