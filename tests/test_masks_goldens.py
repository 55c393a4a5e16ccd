"""Mask methods against the authors' code: layers, ratios, two tasks of IBM from first step to last, layers of WSN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, golden

from jaxcl import masks, threefry
from jaxcl.masks import information_bottleneck, scales

pytestmark = pytest.mark.core

LAYERS = ["ibm_conv_alexnet", "ibm_conv_resnet", "ibm_linear"]


def layer(x, weight, options):
    """As PyTorch has it: weights [out, in, h, w] on images [B, in, H, W], or [out, in] on vectors."""
    if weight.ndim == 2:
        return x @ weight.T
    stride, padding = options["stride"], options["padding"]
    return jax.lax.conv(x, weight, (stride, stride), [(edge, edge) for edge in padding])


def noise_of(arrays):
    return masks.Noise(jnp.asarray(arrays["post_z_mu"]), jnp.asarray(arrays["post_z_logD"]))


@pytest.fixture
def drawn(monkeypatch):
    """Puts given numbers in place of what `noisy` draws."""
    return lambda values: monkeypatch.setattr(threefry, "standard_normal", lambda *_: jnp.asarray(values))


def penalty(own, arrays, options):
    multiplier = 1.0 if "Alexnet_IB.SubnetConv2d" in options["layer"] else options["kl_mult"]
    return options["svd_ratio"] * multiplier * masks.information(own) / options["batch"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_of_ibm(name, drawn):
    arrays, options = golden(name)
    drawn(arrays["eps"])

    def loss(weight, own, x):
        out = layer(x, masks.noisy(jax.random.key(0), weight, own), options)
        kld = penalty(own, arrays, options)
        return jnp.sum(arrays["P"] * out) + options["kl_coefficient_in_grad"] * kld, (out, kld)

    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, (out, kld)), (of_weight, of_noise, of_x) = gradients(arrays["weight"], noise_of(arrays), arrays["x"])
    assert_close(out, arrays["out_train"])
    assert_close(kld, arrays["kld"])
    assert_close(of_weight, arrays["grad_weight"])
    assert_close(of_noise.mean, arrays["grad_post_z_mu"])
    assert_close(of_noise.log_variance, arrays["grad_post_z_logD"])
    assert_close(of_x, arrays["grad_x"])
    alone = jax.grad(lambda own: penalty(own, arrays, options))(noise_of(arrays))
    assert_close(alone.mean, arrays["grad_mu_kld_only"])
    assert_close(alone.log_variance, arrays["grad_logD_kld_only"])


@pytest.mark.parametrize("name", LAYERS)
def test_masks_and_scales_of_ibm(name):
    arrays, options = golden(name)
    own, weight = noise_of(arrays), jnp.asarray(arrays["weight"])
    assert_close(masks.log_alpha(own), arrays["logalpha"])
    for threshold, of_golden in ((0.0, "mask_thr0"), (options["mask_threshold_other"], "mask_thr_other")):
        np.testing.assert_array_equal(masks.log_alpha(own) < threshold, arrays[of_golden].astype(bool))
    none = jnp.zeros(weight.shape, bool)
    _, _, scale = scales.stored_scales().settle(weight, own, none, none)
    assert_close(scale, arrays["zscale"])
    assert_close(layer(arrays["x"], weight * scale * arrays["mask_thr0"], options), arrays["out_test_masked"])
    assert_close(layer(arrays["x"], weight, options), arrays["out_test_no_mask"])


def test_decomposition_ratios():
    arrays, options = golden("ibm_svd_ratio")
    for name in ("conv1", "fc1"):
        features = arrays[f"feature_{name}"]
        features = np.moveaxis(features, 1, -1) if features.ndim == 4 else features
        ratio = masks.decomposition_ratio(features, share=options["threshold"])
        assert_close(ratio, arrays[f"ratio_{name}"])
        assert round(float(ratio) * features.shape[-1]) == arrays[f"count_{name}"]


def test_two_tasks_of_ibm(monkeypatch):
    """All parameters after each step, the masks and scales of each task, and what the first one answers at the end."""
    arrays, options = golden("ibm_two_tasks")
    layers = ("conv1", "fc1")
    params = {name: jnp.asarray(arrays[f"init_{name}_weight"]) for name in layers}
    params |= {f"head{task}": jnp.asarray(arrays[f"init_head{task}_weight"]) for task in range(2)}
    method = masks.ib_masks(lambda path: path in layers, 2, scale_rule="authors", redraw="free")
    masked, state = method.init(jax.random.key(0), params)
    masked = masked._replace(scores={
        name: masks.Noise(*(jnp.asarray(arrays[f"init_{name}_{part}"]) for part in ("mu", "logD"))) for name in layers
    })  # fmt: skip

    def apply(params, x, task):
        x = jax.nn.relu(jax.lax.conv(x, params["conv1"], (1, 1), "VALID"))
        x = jax.nn.relu(x.reshape(len(x), -1) @ params["fc1"].T)
        return x @ params[f"head{task}"].T

    def noisy_with(draws):
        left = iter(draws)
        monkeypatch.setattr(information_bottleneck, "noisy", lambda key, weight, own: weight * (
            own.mean + jnp.exp(own.log_variance / 2) * next(left)
        ))  # fmt: skip

    for task in range(2):
        tx = optax.adam(options["lr"])
        opt_state = tx.init(masked)
        for number in range(options["steps"]):
            x, labels = arrays["x"][task, number], arrays["y"][task, number]
            noisy_with([arrays[f"eps_{name}_t{task}_s{number}"] for name in layers])

            def loss(masked, x=x, labels=labels, task=task, state=state):
                params, nats = method.sample(jax.random.key(0), masked, state)
                losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, x, task), labels)
                return losses.mean() + options["kl_fac"] * nats / len(x)

            value, grads = jax.value_and_grad(loss)(masked)
            assert_close(value, arrays[f"loss_t{task}_s{number}"])
            updates, opt_state = tx.update(grads, opt_state, masked)
            updates, state = method.protect(masked, updates, state)
            masked = optax.apply_updates(masked, updates)
            for name in layers:
                here = f"t{task}_s{number}_{name}"
                assert_close(masked.weights[name], arrays[f"{here}_weight"])
                assert_close(masked.scores[name].mean, arrays[f"{here}_mu"])
                assert_close(masked.scores[name].log_variance, arrays[f"{here}_logD"])
            assert_close(masked.weights[f"head{task}"], arrays[f"t{task}_s{number}_head{task}_weight"])
        fresh = iter([
            masks.Noise(*(jnp.asarray(arrays[f"t{task}_end_{name}_fresh_{part}"]) for part in ("mu", "logD")))
            for name in layers
        ])  # fmt: skip
        monkeypatch.setattr(information_bottleneck, "draw_noise", lambda *_, fresh=fresh, **__: next(fresh))
        masked, state = method.commit(jax.random.key(0), masked, state, task)
        for name in layers:
            here = f"t{task}_end_{name}"
            mask = arrays[f"{here}_mask"].astype(bool)
            np.testing.assert_array_equal(masks.task_mask(state.bank, name, task), mask)
            consolidated = arrays[f"{here}_consolidated"].astype(bool)
            np.testing.assert_array_equal(masks.is_free(state.bank)[name], ~consolidated)
            # Scales of weights that the task does not keep are the authors' redrawn ones; nothing reads them.
            assert_close(
                np.where(mask, state.bank.scales[name][task], 0), np.where(mask, arrays[f"{here}_stored_zscale"], 0)
            )
            assert_close(masked.weights[name], arrays[f"{here}_weight"])
            assert_close(masked.scores[name].mean, arrays[f"{here}_mu"])
            assert_close(masked.scores[name].log_variance, arrays[f"{here}_logD"])
    for task in range(2):
        logits = apply(method.select(masked, state, task), arrays["x"][task, 0], task)
        assert_close(logits, arrays[f"final_eval_logits_t{task}"])


@pytest.mark.parametrize("name", ["wsn_conv", "wsn_linear", "wsn_linear_bias"])
def test_a_layer_of_wsn(name):
    arrays, options = golden(name)
    sparsity = options["sparsity"]

    def loss(weight, scores, x, bias):
        out = layer(x, masks.masked_by_scores(weight, scores, sparsity), options)
        if bias is not None:
            out += masks.masked_by_scores(*bias, sparsity)
        return jnp.sum(arrays["P"] * out), out

    bias = (arrays["bias"], arrays["bias_scores"]) if options["bias"] else None
    gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    (_, out), (of_weight, of_scores, of_x, of_bias) = gradients(
        jnp.asarray(arrays["weight"]), jnp.asarray(arrays["scores"]), jnp.asarray(arrays["x"]),
        bias and tuple(map(jnp.asarray, bias)),
    )  # fmt: skip
    mask = masks.winning_mask(jnp.asarray(arrays["scores"]), sparsity)
    np.testing.assert_array_equal(mask, arrays["weight_mask"].astype(bool))
    assert int(mask.sum()) == options["kept"]
    assert_close(out, arrays["out"])
    assert_close(of_weight, arrays["grad_weight"])
    assert_close(of_scores, arrays["grad_scores"])
    assert_close(of_x, arrays["grad_x"])
    if bias:
        np.testing.assert_array_equal(
            masks.winning_mask(jnp.asarray(bias[1]), sparsity), arrays["bias_mask"].astype(bool)
        )
        assert_close(of_bias[0], arrays["grad_bias"])
        assert_close(of_bias[1], arrays["grad_bias_scores"])
    k = options["k"]
    assert_close(masks.kth_smallest(jnp.abs(jnp.asarray(arrays["scores"])).reshape(-1), k), arrays["threshold"])
