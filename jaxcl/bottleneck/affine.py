"""Keys that are SimVQ's codes: an affine image of a codebook that is drawn once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.bottleneck.layer import Bottleneck, KeyState
from jaxcl.nearest import nearest_codes
from jaxcl.quantize import initial_averages
from jaxcl.quantize.contract import usable
from jaxcl.typing import Array, Key, check_count

_RIDGE = 1e-4  # of the mean square: codes of which few are chosen may not span all directions


@partial(jax.jit, static_argnames=("bottleneck", "iterations"))
def fit_simvq_keys(
    key: Key, bottleneck: Bottleneck, state: KeyState, features: Array, *, iterations: int = 10
) -> KeyState:
    """Keys of each codebook as C W + b, with C [J, W_key] ~ N(0, 1) and W, b fitted to features [N, D], unlabelled.

    In place of `fit_epoch`: all keys of a codebook move together, as in SimVQ (Zhu et al. 2025, section 4), so none is
    left behind where no feature is. SimVQ's codebook loss is quadratic in W and b once each head has its nearest code;
    here it is not descended but solved, in turn with the search, so many times; the loss never rises, but for a small
    ridge.

    Args:
        key: of C; consumed.
        bottleneck: the layer.
        state: whose keys are replaced; each then counts as the average of one head, so that `fit_keys` may go on from
            there.
        features: [N, D]; those with NaN or infinity in them are left out.
        iterations: searches and solutions.

    Raises:
        ValueError: no iteration, or features of another width.
    """
    check_count("iterations", iterations, 1)
    heads, valid = usable(bottleneck.heads(state, features), None)  # [C, N, W], zeros where not valid
    drawn = jax.random.normal(key, state.keys.codebook.shape)

    def fit(one: tuple[Array, Array, Array, Array]) -> Array:
        codes, x, valid, active = one  # [J, W], [N, W], [N], [J]
        mean = x.mean(axis=0, where=valid[:, None])
        spread = x.std(axis=0, where=valid[:, None])
        extended = jnp.concatenate([codes, jnp.ones((len(codes), 1))], axis=1)

        def improve(_: int, basis: Array) -> Array:
            chosen = extended[nearest_codes(x, _matmul(extended, basis), eligible=active)] * valid[:, None]
            products = _matmul(chosen.T, chosen)
            ridge = _RIDGE * jnp.trace(products) / len(products) * jnp.eye(len(products))
            return basis + jnp.linalg.solve(products + ridge, _matmul(chosen.T, x - _matmul(chosen, basis)))

        first = jnp.concatenate([jnp.diag(spread), mean[None]]).astype(extended.dtype)
        return _matmul(extended, lax.fori_loop(0, iterations, improve, first))

    placed = lax.map(fit, (drawn, heads, valid, state.active))
    return state._replace(keys=jax.vmap(initial_averages)(placed, state.active))


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
