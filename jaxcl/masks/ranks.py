"""The k-th smallest of many numbers, without sorting them."""

import jax
import jax.numpy as jnp

from jaxcl.typing import Array


def kth_smallest(values: Array, k: Array | int) -> Array:
    """The k-th smallest [] of numbers that are not negative [n] float32, k from 1; NaN if k is above n.

    The bits of such floats are in their numbers' order. So one bit after the other is found by counting: 31 passes over
    the numbers, where sorting them takes XLA far longer on CPU.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.int32)  # -0 becomes 0

    def settle(number: Array | int, found: Array) -> Array:
        candidate = found | (1 << (30 - number))
        return jnp.where(jnp.sum(bits < candidate) < k, candidate, found)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, settle, jnp.int32(0)), jnp.float32)
