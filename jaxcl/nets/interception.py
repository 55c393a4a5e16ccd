"""Layers of a Linen network seen and changed from outside, its own code untouched."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxcl.adapters import LayerFunction
from jaxcl.typing import Array


def through_layers(function: LayerFunction, call: Callable[[], Any]) -> Any:
    """What `call` returns where each `nn.Dense` in it has its outputs passed through a function.

    ``through_layers(function, lambda: net.apply(params, inputs))``. Under a transformation of JAX both belong inside.

    Args:
        function: (path of the layer's kernel, as "params/layers_0/query/kernel", inputs [..., I], outputs [..., O]) ->
            outputs [..., O].
        call: without arguments, applies a Linen network.
    """

    def intercept(layer: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        outputs = layer(*args, **kwargs)
        if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
            return outputs
        inputs: Array = args[0] if args else kwargs["inputs"]
        return function("/".join(("params", *context.module.path, "kernel")), inputs, outputs)

    with nn.intercept_methods(intercept):
        return call()
