"""Layer normalisation that keeps one array for its gradient."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxcl.typing import Array


class LayerNorm(nn.Module):
    """Vectors less their mean, over their standard deviation, with a scale and a bias (Ba et al. 2016).

    As ``flax.linen.LayerNorm``, with its parameters, but for what is kept for the gradient: the vectors normalised and
    one number for each, where XLA keeps four arrays on CPU. Statistics are in float32 at least.
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None  # of what it returns; that of vectors and parameters together if None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalised [..., D] of [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        precise = (part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in (x, scale, bias))
        return _scaled(*precise, self.epsilon).astype(self.dtype or jnp.result_type(x, scale, bias))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _scaled(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """[..., D] of [..., D] and twice [D]."""
    unit, _ = _standardised(x, epsilon)
    return unit * scale + bias


@_scaled.defjvp
def _derivative(
    epsilon: float, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    (x, scale, bias), (change, scale_change, bias_change) = primals, tangents
    # What the gradient takes is kept, its scale apart from that of the forward pass: one that both shared, XLA would
    # spread over all vectors on CPU, and keep that.
    unit, inverse, kept_scale = lax.optimization_barrier((*_standardised(x, epsilon), scale))
    along = (unit * change).mean(axis=-1, keepdims=True)
    slope = inverse * (change - change.mean(axis=-1, keepdims=True) - unit * along)
    return unit * scale + bias, slope * kept_scale + unit * scale_change + bias_change


def _standardised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Vectors [..., D] of mean 0 and variance 1, and what they were multiplied by, [..., 1]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse
