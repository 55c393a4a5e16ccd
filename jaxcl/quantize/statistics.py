"""How well a codebook is used."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.typing import Array, check_count


def usage(indices: Array, codebook_size: int, *, axis_name: str | None = None) -> Array:
    """How often each code was chosen: [K] int32 from `indices` of any shape, added up over `axis_name` if given.

    Indices outside [0, K), such as `NO_CODE`, are not counted.
    """
    check_count("codebook_size", codebook_size, 1)
    flat = indices.reshape(-1).astype(jnp.int32)
    within = jnp.where(flat >= 0, flat, codebook_size)  # a negative index would count from the end
    counts = jnp.zeros(codebook_size, jnp.int32).at[within].add(1, mode="drop")
    return counts if axis_name is None else lax.psum(counts, axis_name)


def utilisation(counts: Array) -> Array:
    """Share of codes chosen at least once, from counts [..., K]; [...] float32."""
    return jnp.mean(counts > 0, axis=-1, dtype=jnp.float32)


def perplexity(counts: Array) -> Array:
    """Exp of the entropy (nats) of the codes' frequencies, from counts [..., K]; from 1 to K, and 0 for no counts."""
    counts = jnp.asarray(counts, jnp.float32)  # whose sum may be beyond that of integers
    total = counts.sum(axis=-1, keepdims=True)
    frequency = counts / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(frequency, frequency), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def dead_codes(counts: Array) -> Array:
    """Number of codes never chosen, from counts [..., K]; [...] int32."""
    return jnp.sum(counts == 0, axis=-1, dtype=jnp.int32)
