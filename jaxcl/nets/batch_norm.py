"""Batch normalisation whose statistics are parameters that no gradient moves: each task of a bank has its own."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jaxcl.trees import leaves_by_path
from jaxcl.typing import Array, PyTree

_COLLECTION = "statistics"


class BatchNorm(nn.Module):
    """Each channel less its mean over its standard deviation, without a scale or a bias of its own.

    While it trains, mean and variance are those of the batch. Else they follow from its parameters, the means of values
    and of their squares, which are 0 and 1 until somebody puts there what `batch_statistics` measured: such means are
    simply averaged over batches.
    """

    training: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalised [..., channels] of [..., channels]."""
        mean = lax.stop_gradient(self.param("mean", nn.initializers.zeros, x.shape[-1:]))
        square = lax.stop_gradient(self.param("square", nn.initializers.ones, x.shape[-1:]))
        variance = jnp.maximum(square - mean**2, 0)
        if self.training:
            axes = tuple(range(x.ndim - 1))
            mean, variance = x.mean(axis=axes), x.var(axis=axes)
            for name, value in (("mean", mean), ("square", variance + mean**2)):
                self.sow(_COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return (x - mean) * lax.rsqrt(variance + self.epsilon)


def batch_statistics(net: nn.Module) -> Callable[[PyTree, Array], dict[str, Array]]:
    """(params, inputs [B, ...]) -> by path of the parameter, what the batch has for it at each layer, [channels].

    Args:
        net: whose `BatchNorm` layers train.
    """

    def measure(params: PyTree, inputs: Array) -> dict[str, Array]:
        _, found = net.apply(params, inputs, mutable=[_COLLECTION])
        return {f"params/{path}": leaf for path, leaf in leaves_by_path(found[_COLLECTION]).items()}

    return measure


def layer_outputs(net: nn.Module) -> Callable[[PyTree, Array], dict[str, Array]]:
    """(params, inputs [B, ...]) -> by path of its kernel, what each `nn.Dense` and `nn.Conv` makes, [B, ..., channels].

    As `masks.refresh_ratios` takes them.
    """

    def measure(params: PyTree, inputs: Array) -> dict[str, Array]:
        def is_layer(module: nn.Module, method: str) -> bool:
            return isinstance(module, nn.Dense | nn.Conv) and method == "__call__"

        _, found = net.apply(params, inputs, capture_intermediates=is_layer, mutable=["intermediates"])
        outputs = leaves_by_path(found["intermediates"])
        return {
            f"params/{path.removesuffix('/__call__/0')}/kernel": jnp.asarray(leaf) for path, leaf in outputs.items()
        }

    return measure
