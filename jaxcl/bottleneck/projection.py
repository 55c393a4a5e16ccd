"""A projection that is learned from unlabelled features."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.bottleneck.layer import KeyState
from jaxcl.quantize.contract import usable
from jaxcl.typing import Array, Key, bad_argument, check_between, check_count, check_rank, check_width


def learn_projection(key: Key, state: KeyState, features: Array, *, share: float = 0.99) -> KeyState:
    """The state with a projection into random directions of the whitened principal subspace of the features.

    A random projection of the features themselves follows the few directions in which they vary most. Here the
    principal directions that explain `share` of their variance all have variance 1, and so has each entry of each head.
    Call it before keys are placed or fitted. (The authors' learned projection is a layer that nothing in the method
    gives a gradient to.)

    Args:
        key: decides the directions; consumed.
        state: of a bottleneck whose projection is "random".
        features: [N, D], unlabelled, two or more. Those that hold NaN or infinity do not count.
        share: from above 0 to 1.

    Raises:
        ValueError: a state without a projection, features of another width, a share out of range.
    """
    if state.projection is None:
        raise bad_argument("state", "one of a bottleneck that cuts features into chunks", 'make it with "random"')
    check_between("share", share, 1e-12, 1)
    check_rank("features", features, 2)
    check_count("features, their number", len(features), 2)
    check_width("features", features, state.projection.shape[1], "the bottleneck")
    x, valid = usable(jnp.asarray(features, jnp.float32), None)
    centred = jnp.where(valid[:, None], x - x.mean(axis=0, where=valid[:, None]), 0)
    covariance = jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST) / valid.sum()
    variances, directions = jnp.linalg.eigh(covariance)  # from the least to the greatest
    # Kept are the last ones: those after the first that take less than 1 - share together.
    rest = jnp.cumsum(variances) < (1 - share) * variances.sum()
    scales = jnp.where(rest | (variances <= 0), 0, 1 / jnp.sqrt(jnp.maximum(variances, 1e-30)))
    codebooks, _, width = state.projection.shape
    drawn = jax.random.normal(key, (codebooks, len(scales), width)) * (scales > 0)[:, None]
    # Without any variance there is no direction, and all heads are alike.
    drawn /= jnp.maximum(jnp.linalg.norm(drawn, axis=1, keepdims=True), 1e-30)
    whitened = jnp.einsum("de,cew->cdw", directions * scales, drawn, precision=lax.Precision.HIGHEST)
    return state._replace(projection=whitened)
