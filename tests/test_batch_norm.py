"""Batch normalisation with a set of statistics a task, the networks that have it, and what their layers make."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close

from jaxcl import continual, masks, nets, trees
from jaxcl.continual import Examples, streams

IMAGES = np.random.default_rng(0).normal(2, 3, size=(12, 32, 32, 3)).astype(np.float32)


def test_in_training_statistics_are_the_batchs_and_else_they_are_parameters():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(6, 4, 5)), jnp.float32)
    params = nets.BatchNorm().init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, params) == {"params": {"mean": (5,), "square": (5,)}}
    mean, variance = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    trained = nets.BatchNorm(training=True).apply(params, x)
    assert_close(trained, (x - mean) / np.sqrt(variance + 1e-5))
    assert_close(nets.BatchNorm().apply(params, x), x / np.sqrt(1 + 1e-5))
    measured = nets.batch_statistics(nets.BatchNorm(training=True))(params, x)
    assert_close(measured["params/mean"], mean)
    assert_close(measured["params/square"], np.mean(x**2, axis=(0, 1)))
    assert_close(nets.BatchNorm().apply(trees.replace_leaves(params, measured), x), trained)
    gradient = jax.grad(lambda params: nets.BatchNorm().apply(params, x).sum())(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("net", "shapes"),
    [
        (
            nets.AlexNet(10, channels=(4, 5, 6), hidden=7),
            {
                "Conv_0/kernel": (4, 4, 3, 4), "Conv_1/kernel": (3, 3, 4, 5), "Conv_2/kernel": (2, 2, 5, 6),
                "Dense_0/kernel": (2 * 2 * 6, 7), "Dense_1/kernel": (7, 7), "head/kernel": (7, 10),
            },
        ),
        (
            nets.LeNet5(10, channels=(4, 5), hidden=7),
            {
                "Conv_0/kernel": (5, 5, 3, 4), "Conv_1/kernel": (5, 5, 4, 5), "Dense_0/kernel": (5 * 5 * 5, 7),
                "head/kernel": (7, 10), "head/bias": (10,),
            },
        ),
        (
            nets.Mixer(10, patch=4, width=6, layers=1, patch_hidden=5, channel_hidden=7),
            {
                "Dense_0/kernel": (48, 6), "Dense_1/kernel": (64, 5), "Dense_2/kernel": (5, 64),
                "Dense_3/kernel": (6, 7), "Dense_4/kernel": (7, 6), "head/kernel": (6, 10), "head/bias": (10,),
            },
        ),
    ],
    ids=["AlexNet", "LeNet5", "Mixer"],
)  # fmt: skip
def test_networks_for_small_images(net, shapes):
    params = net.init(jax.random.key(0), IMAGES)
    found = {path.removeprefix("params/"): leaf.shape for path, leaf in trees.leaves_by_path(params).items()}
    assert found | shapes == found
    assert net.apply(params, IMAGES).shape == (12, 10)
    outputs = nets.layer_outputs(net)(params, IMAGES)
    assert set(outputs) == {f"params/{name}" for name in shapes if name.endswith("kernel")}
    if "Conv_0" in params["params"]:
        own = params["params"]["Conv_0"]
        first = jax.lax.conv_general_dilated(
            IMAGES, own["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        assert_close(outputs["params/Conv_0/kernel"], first + own.get("bias", 0))
    else:
        patch = IMAGES[3, 8:12, 20:24].reshape(-1) @ params["params"]["Dense_0"]["kernel"]  # in the third row the sixth
        assert_close(outputs["params/Dense_0/kernel"][3, 2 * 8 + 5], patch)
    with pytest.raises(ValueError, match="inputs: got shape"):
        net.apply(params, IMAGES[0])


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(nets.AlexNet, 10, channels=(4, 5, 6), hidden=7),
        functools.partial(nets.ResNet18, 10, width=4, normalisation="batch"),
    ],
    ids=["AlexNet", "ResNet18"],
)
def test_a_batchs_own_statistics_give_what_training_gives(make):
    net, training = make(), make(training=True)
    params = net.init(jax.random.key(0), IMAGES)
    expected, statistics = jax.jit(
        lambda params, x: (training.apply(params, x), nets.batch_statistics(training)(params, x))
    )(params, IMAGES)
    assert set(statistics) == {path for path in trees.leaves_by_path(params) if "BatchNorm" in path}
    assert_close(jax.jit(net.apply)(trees.replace_leaves(params, statistics), IMAGES), expected, 1e-4)
    assert np.abs(np.asarray(jax.jit(net.apply)(params, IMAGES)) - expected).max() > 0.1


def test_alexnet_has_the_published_size():
    shapes = jax.eval_shape(nets.AlexNet(10).init, jax.random.key(0), IMAGES)
    kernels = [leaf.size for path, leaf in trees.leaves_by_path(shapes).items() if path.endswith("kernel")]
    assert sum(kernels) == 4 * 4 * 3 * 64 + 9 * 64 * 128 + 4 * 128 * 256 + 1024 * 2048 + 2048 * 2048 + 2048 * 10


def test_each_task_keeps_the_statistics_of_its_own_network():
    """Over batches of 16 and of 8, which come twice to fill theirs up, of inputs of unlike scale."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(48, 12)).astype(np.float32)
    labels = (np.arange(48) % 4).astype(np.int32)
    inputs[labels >= 2] *= 5
    examples = Examples(inputs, labels)
    stream = streams.task_incremental(None, examples, examples, classes_per_task=2)

    class Net(nn.Module):
        training: bool = False

        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = jnp.tanh(nets.BatchNorm(self.training)(nn.Dense(9, use_bias=False)(x)))
            return nn.Dense(4, name="head")(x)

    net, training = Net(), Net(training=True)
    method = masks.packnet(lambda path: "Dense" in path, 2, share=0.5, prune_after=4)
    strategy = continual.masked_network(
        method, net.apply, training_apply=training.apply, statistics=nets.batch_statistics(training)
    )
    masked, _ = method.init(jax.random.key(0), net.init(jax.random.key(1), inputs))
    result = continual.run(jax.random.key(2), strategy, optax.adamw(1e-2), masked, stream, epochs=4, batch_size=16)
    assert result.accuracy[1, 0] == result.accuracy[0, 0]
    assert all(count == 1 for count in result.compilations.values())
    state = result.strategy_state.of_method
    for task in range(2):
        params = method.select(result.params, state, task)
        kernel = params["params"]["Dense_0"]["kernel"]
        hidden = inputs[stream.train_sets[task].rows] @ np.asarray(kernel)
        norm = params["params"]["BatchNorm_0"]
        assert_close(norm["mean"], hidden.mean(axis=0), 1e-5)
        assert_close(norm["square"], np.mean(hidden**2, axis=0), 1e-5)
