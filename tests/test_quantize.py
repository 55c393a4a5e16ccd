"""Quantizers against recorded values of the public implementation and against plain NumPy of their own."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compiled, golden, host_mesh, numerical_gradient
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcl import quantize as q
from jaxcl.continual.compilations import count_compilations

pytestmark = pytest.mark.core

EMA_STATE = ("codebook", "counts", "sums")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def nearest(x, codebook):
    """Float64 brute force: [N] indices."""
    return ((x[:, None].astype(np.float64) - codebook) ** 2).sum(axis=-1).argmin(axis=-1)


def assert_states_close(actual, expected, tolerance=1e-5):
    for name in EMA_STATE:
        assert_close(getattr(actual, name), getattr(expected, name), tolerance)


# Recorded values of vector-quantize-pytorch 1.32 (goldens/README)


def recorded_state(arrays, form):
    return q.EMAState(*(arrays[form.format(name)] for name in ("embed", "cluster_size", "embed_avg")))


def recorded(name):
    """A golden case: its arrays, meta, quantizer and starting state."""
    arrays, meta = golden(name)
    metric = "cosine" if meta.get("use_cosine_sim") else "euclidean"
    decay, epsilon = meta["decay_used"], meta["eps_used"]
    quantizer = q.ema_vq(meta["codebook_size"], meta["dim"], metric=metric, decay=decay, epsilon=epsilon)
    return arrays, meta, quantizer, recorded_state(arrays, "init_{}")


def step_with_gradient(quantizer, state, x, weights):
    """What the recorded step differentiates: `sum(P * output) + mean square`; its gradient, output and next state."""

    def total(x):
        out = quantizer.quantize((), state, x)
        return (weights * out.codes).sum() + out.commitment_loss.mean() / x.shape[-1], out

    gradient, out = jax.grad(total, has_aux=True)(x)
    return gradient, out, quantizer.update(jax.random.key(0), (), state, x, out.indices)


replace_codes = jax.jit(q.replace_codes)


def replace_as_recorded(arrays, meta, state, x, t):
    """Codes under the threshold replaced by the rows that were drawn in the recorded step."""
    assert_states_close(state, recorded_state(arrays, f"pre_replace_{{}}_{t}"))
    dead = np.asarray(state.counts) < meta["threshold_ema_dead_code"]
    np.testing.assert_array_equal(dead, arrays[f"expired_{t}"].astype(bool))
    rows = np.asarray(x).reshape(-1, x.shape[-1])[np.maximum(arrays[f"replacement_source_row_{t}"], 0)]
    return replace_codes(state, rows, dead, meta["reset_cluster_size"])


@pytest.mark.parametrize(
    ("name", "jitted"),
    [("vq_ema", True), ("vq_ema_cosine", True), ("vq_ema_deadcode", True), ("vq_ema_deadcode", False)],
)
def test_ema_vq_reproduces_recorded_steps(name, jitted):
    arrays, meta, quantizer, state = recorded(name)
    step = partial(step_with_gradient, quantizer)
    step = compiled(step) if jitted else step
    for t in range(3):
        x = jnp.asarray(arrays["x"][t])
        gradient, out, state = step(state, x, arrays["P"][t])
        np.testing.assert_array_equal(out.indices, arrays[f"indices_{t}"])
        assert_close(out.codes, arrays[f"quantized_{t}"])
        assert_close(out.commitment_loss.mean() / x.shape[-1], arrays[f"loss_{t}"])
        assert_close(gradient, arrays[f"grad_x_{t}"])
        if "threshold_ema_dead_code" in meta:
            state = replace_as_recorded(arrays, meta, state, x, t)
        assert_states_close(state, recorded_state(arrays, f"{{}}_{t}"))
    _, out, _ = step(state, jnp.asarray(arrays["x_eval"]), arrays["P"][0])
    np.testing.assert_array_equal(out.indices, arrays["eval_indices"])
    assert_close(out.codes, arrays["eval_quantized"])


# What a quantizer makes of vectors


FACTORIES = {"vq": q.vq, "ema_vq": q.ema_vq}


@cache
def make(name, size=7, width=4, **options):
    """A quantizer whose functions (but for the start) are jitted, and its params and state drawn from one key."""
    init, *functions = FACTORIES[name](size, width, **options)
    return q.Quantizer(init, *map(jax.jit, functions)), *init(jax.random.key(1))


def table(name, params, state):
    return np.asarray(params if name == "vq" else state.codebook)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", FACTORIES)
def test_quantize_gives_nearest_codes_and_losses_for_each_vector(name, metric):
    """NumPy in float64; both losses are the squared distance, of unit vectors for cosine."""
    quantizer, params, state = make(name, metric=metric)
    x = normal(0, 2, 3, 4)
    out = quantizer.quantize(params, state, x)
    prepare = unit if metric == "cosine" else np.asarray
    vectors, codebook = prepare(x.reshape(-1, 4)), prepare(table(name, params, state))
    indices = nearest(vectors, codebook)
    squares = ((vectors - codebook[indices]) ** 2).sum(axis=-1).reshape(2, 3)
    assert out.indices.dtype == jnp.int32 and out.commitment_loss.dtype == out.codebook_loss.dtype == jnp.float32
    np.testing.assert_array_equal(out.indices, indices.reshape(2, 3))
    assert_close(out.codes, codebook[indices].reshape(2, 3, 4))
    assert_close(out.commitment_loss, squares)
    assert_close(out.codebook_loss, squares)
    assert_close(quantizer.lookup(params, state, out.indices), out.codes)


@pytest.mark.parametrize("name", FACTORIES)
def test_codes_are_the_codebooks_rows_to_the_last_bit(name):
    """What carries the gradient (copied for one, rotated for the other) adds zero, however large x is."""
    quantizer, params, state = make(name, metric="euclidean")
    out = quantizer.quantize(params, state, normal(0, 2, 3, 4) * 1000)
    np.testing.assert_array_equal(out.codes, table(name, params, state)[np.asarray(out.indices)])


@pytest.mark.parametrize("name", FACTORIES)
def test_first_codebook_is_normal_with_variance_one_over_width(name):
    """N(0, 1/D): 4,096 x 16 numbers, whose mean and mean square lie within 5 standard errors of 0 and 1/16."""
    _, params, state = make(name, size=4096, width=16)
    codebook = table(name, params, state)
    assert codebook.shape == (4096, 16) and codebook.dtype == np.float32
    assert abs(codebook.mean()) < 5 * 0.25 / 256
    assert abs((codebook**2).mean() * 16 - 1) < 5 * np.sqrt(2) / 256


def test_first_averages():
    """As if each code were the average of `initial_count` vectors; unit codes for cosine."""
    _, params, state = make("ema_vq", metric="cosine", initial_count=2.5)
    assert params == ()
    assert_close(np.linalg.norm(state.codebook, axis=-1), np.ones(7))
    assert_close(state.counts, np.full(7, 2.5))
    assert_close(state.sums, 2.5 * np.asarray(state.codebook))
    assert_states_close(q.initial_averages(state.codebook, 2.5), state)


def test_vq_has_no_state():
    quantizer, params, state = make("vq")
    x = normal(0, 5, 4)
    assert state == ()
    assert quantizer.update(jax.random.key(0), params, state, x, np.zeros(5, np.int32)) == ()


@pytest.mark.parametrize("name", FACTORIES)
def test_block_size_is_passed_on(name):
    """The scores of one block of codes are seen in the program, and those of all codes are not."""
    quantizer, params, state = make(name, block_size=3)
    program = str(jax.make_jaxpr(quantizer.quantize)(params, state, normal(0, 6, 4)))
    assert "f32[3,6]" in program and not {"f32[6,7]", "f32[7,6]"} & set(re.findall(r"f32\[[\d,]*\]", program))


# Gradients


def codes_jacobian(quantizer, params, state, x):
    return jax.jit(jax.jacrev(lambda x: quantizer.quantize(params, state, x).codes))(x)


rotate = jax.jit(q.rotate)
rotate_jacobian = jax.jit(jax.jacrev(q.rotate))


@pytest.mark.parametrize("name", FACTORIES)
def test_straight_through_copies_the_gradient(name):
    """d codes / dx is the identity."""
    np.testing.assert_array_equal(codes_jacobian(*make(name, gradient="straight_through"), normal(2, 4)), np.eye(4))


def test_rotation_turns_the_gradient():
    """d codes / dx is the Jacobian of `rotate` for the nearest code (NumPy); `ema_vq`'s is among the golden values."""
    quantizer, params, state = make("vq", gradient="rotation")
    x, codebook = normal(2, 4), np.asarray(params)
    expected = rotate_jacobian(x, codebook[nearest(x[None], codebook)[0]])
    assert_close(codes_jacobian(quantizer, params, state, x), expected)
    assert np.abs(np.asarray(expected) - np.eye(4)).max() > 0.1


def test_the_outputs_gradient_passes_the_codes_by():
    """It goes to x alone: exactly zero for the codebook, whichever the way."""
    x, weights = normal(2, 6, 4), normal(3, 6, 4)
    quantizers = [make("vq", gradient=gradient)[0] for gradient in ("straight_through", "rotation")]

    def total(params):
        return sum((weights * quantizer.quantize(params, (), x).codes).sum() for quantizer in quantizers)

    assert not np.asarray(jax.jit(jax.grad(total))(make("vq")[1])).any()


def losses_gradient(quantizer, params, state, x):
    """Gradients wrt (params, state, x) of both losses, summed with a weight for each vector."""
    weights = np.arange(1, len(x) + 1, dtype=np.float32)

    def total(args, loss):
        return (weights * getattr(quantizer.quantize(*args), loss)).sum()

    both = jax.jit(lambda args: [jax.grad(total)(args, loss) for loss in ("commitment_loss", "codebook_loss")])
    return weights, *both((params, state, x))


def test_losses_move_one_side_only():
    """By hand: `2 w (x - c)` for x from one, its negative summed over a code's vectors from the other, zeros else."""
    quantizer, params, state = make("vq")
    x = normal(4, 6, 4)
    indices = nearest(x, np.asarray(params))
    weights, commitment, codebook = losses_gradient(quantizer, params, state, x)
    pull = 2 * weights[:, None] * (x - np.asarray(params)[indices])
    expected = np.zeros((7, 4))
    np.add.at(expected, indices, -pull)
    assert_close(commitment[2], pull)
    assert not np.asarray(commitment[0]).any()
    assert_close(codebook[0], expected)
    assert not np.asarray(codebook[2]).any()


def test_losses_of_directions_move_one_side_only():
    """Central differences in NumPy of the squared distance of unit vectors, the choice of codes held."""
    quantizer, params, state = make("vq", metric="cosine")
    x, codebook = normal(4, 6, 4), np.asarray(params)
    indices = nearest(unit(x), unit(codebook))
    weights, commitment, codebook_loss = losses_gradient(quantizer, params, state, x)

    def total(x, codebook):
        return (weights * ((unit(x) - unit(codebook)[indices]) ** 2).sum(axis=-1)).sum()

    assert_close(commitment[2], numerical_gradient(lambda x: total(x, codebook), x), 1e-4)
    assert not np.asarray(commitment[0]).any()
    assert_close(codebook_loss[0], numerical_gradient(lambda codebook: total(x, codebook), codebook), 1e-4)
    assert not np.asarray(codebook_loss[2]).any()


def test_averaged_codes_get_no_gradient():
    """Only the commitment loss moves anything, and it moves x: `2 w (x - c)` by hand."""
    quantizer, params, state = make("ema_vq")
    x = normal(4, 6, 4)
    weights, commitment, codebook = losses_gradient(quantizer, params, state, x)
    codes = np.asarray(state.codebook)[nearest(x, np.asarray(state.codebook))]
    assert_close(commitment[2], 2 * weights[:, None] * (x - codes))
    for leaf in jax.tree.leaves((commitment[1], codebook)):
        assert not np.asarray(leaf).any()


def test_update_gives_no_gradient():
    quantizer, params, state = make("ema_vq")
    key, indices = jax.random.key(0), np.zeros(5, np.int32)
    total = jax.grad(lambda x: quantizer.update(key, params, state, x, indices).codebook.sum() + x.sum())
    np.testing.assert_array_equal(jax.jit(total)(normal(4, 5, 4)), np.ones((5, 4)))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_zero_vector_has_finite_gradients_for_cosine(name):
    """As padding is: a vector without direction must not make NaN of the whole gradient."""
    quantizer, params, state = make(name, metric="cosine")
    x = np.concatenate([np.zeros((1, 4)), normal(5, 5, 4)]).astype(np.float32)

    def total(params, x):
        out = quantizer.quantize(params, state, x)
        return (out.codes + out.commitment_loss[:, None] + out.codebook_loss[:, None]).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)):
        assert np.isfinite(np.asarray(leaf)).all()


# The rotation


PAIRS = {
    "any": (normal(6, 4), 3 * normal(7, 4)),
    "same direction": (normal(6, 4), 2.5 * normal(6, 4)),
    "right angle": (np.float32([2, 0, 0, 0]), np.float32([0, 3, 0, 0])),
    "nearly opposite": (np.float32([2, 0, 0, 0]), np.float32([-3, 0.5, 0, 0])),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_rotate_carries_a_vector_to_its_code(pair):
    """The value is the code; J is the quotient of lengths times a rotation: J'J = s^2 I, det J = s^D, J x = code."""
    x, code = PAIRS[pair]
    scale = np.linalg.norm(code) / np.linalg.norm(x)
    jacobian = np.asarray(rotate_jacobian(x, code), np.float64)
    assert_close(rotate(x, code), code)
    assert_close(jacobian.T @ jacobian, scale**2 * np.eye(4))
    assert_close(jacobian @ x, code)
    assert_close(np.linalg.det(jacobian), scale**4, 1e-4)


def test_rotate_leaves_what_is_at_right_angles_to_the_plane():
    """The rotation is in the plane of x and the code: other directions are only scaled (the paper, section 4.2)."""
    x, code = np.float32([2, 0, 0, 0]), np.float32([1, 1, 0, 0])
    jacobian = np.asarray(rotate_jacobian(x, code))
    assert_close(jacobian[2:], np.eye(4)[2:] * np.sqrt(2) / 2)


def test_rotate_to_the_opposite_keeps_lengths():
    """No plane is given; the Jacobian is orthogonal times the quotient of lengths all the same."""
    x, code = np.float32([2, 0, 0, 0]), np.float32([-4, 0, 0, 0])
    jacobian = np.asarray(rotate_jacobian(x, code))
    assert_close(rotate(x, code), code)
    assert_close(jacobian.T @ jacobian, 4 * np.eye(4))


def test_rotate_of_long_vectors_of_float16_has_a_gradient():
    x, code = jnp.full((1, 512), 12, jnp.float16), jnp.full((1, 512), 11, jnp.float16)
    gradient = jax.grad(lambda x: rotate(x, code).sum().astype(jnp.float32))(x)
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient.astype(jnp.float32), 11 / 12, rtol=1e-2)


def test_rotate_works_row_by_row_and_gives_codes_no_gradient():
    """The gradient to x is the row's Jacobian, transposed, times the incoming one; that to the codes exactly zero."""
    x, codes, weights = normal(8, 2, 3, 4), normal(9, 2, 3, 4), normal(10, 2, 3, 4)
    total = jax.value_and_grad(lambda x, codes: (weights * q.rotate(x, codes)).sum(), argnums=(0, 1))
    value, (to_x, to_codes) = jax.jit(total)(x, codes)
    assert_close(value, (weights * codes).sum())
    for row in np.ndindex(2, 3):
        assert_close(to_x[row], np.asarray(rotate_jacobian(x[row], codes[row])).T @ weights[row])
    assert not np.asarray(to_codes).any()


# Moving averages


def full_step(quantizer, key, state, x, axis_name=None):
    """Search and update, as a training step has them: the indices and the next state."""
    indices = quantizer.quantize((), state, x).indices
    return indices, quantizer.update(key, (), state, x, indices, axis_name=axis_name)


THRESHOLD = 0.9


@cache
def ema_step(metric="euclidean", reset_count=None):
    """A quantizer that replaces dead codes, and its jitted step."""
    options = {"decay": 0.7, "epsilon": 1e-3, "dead_threshold": THRESHOLD}
    quantizer = q.ema_vq(12, 3, metric=metric, reset_count=reset_count, **options)
    return quantizer, jax.jit(partial(full_step, quantizer))


class PlainAverages:
    """The averages in float64 NumPy; dead codes are replaced by the rows it is told."""

    def __init__(self, state, decay, epsilon, cosine=False):
        self.codebook, self.counts, self.sums = (np.asarray(field, np.float64) for field in state)
        self.decay, self.epsilon, self.cosine = decay, epsilon, cosine

    def update(self, x, indices):
        x = unit(x) if self.cosine else x
        size = len(self.counts)
        sums = np.zeros_like(self.sums)
        np.add.at(sums, indices, x)
        self.counts = self.decay * self.counts + (1 - self.decay) * np.bincount(indices, minlength=size)
        self.sums = self.decay * self.sums + (1 - self.decay) * sums
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + size * self.epsilon) * total
        self.codebook = self.sums / smoothed[:, None]
        if self.cosine:
            self.codebook = unit(self.codebook)
        return x

    def replace(self, code, row, count):
        self.codebook[code], self.counts[code], self.sums[code] = row, count, row * count


def source_rows(codes, x):
    """For each code, the row of x [N, D] that it is."""
    found = (np.abs(np.asarray(codes)[:, None] - x).max(axis=-1) < 1e-6).nonzero()
    np.testing.assert_array_equal(found[0], np.arange(len(codes)))  # one row for each, no more
    return found[1]


@pytest.mark.parametrize(("metric", "reset_count"), [("euclidean", None), ("cosine", 3.0)])
def test_ema_vq_equals_plain_numpy_over_steps(metric, reset_count):
    """Dead codes come from NumPy's counts; their new vectors are distinct rows of the batch, read off the result."""
    quantizer, step = ema_step(metric, reset_count)
    _, state = quantizer.init(jax.random.key(2))
    plain, replacements = PlainAverages(state, 0.7, 1e-3, cosine=metric == "cosine"), 0
    for t in range(5):
        x = normal(20 + t, 16, 3)
        indices, state = step(jax.random.key(t), state, x)
        indices = np.asarray(indices)
        rows = plain.update(x, indices)
        dead = np.flatnonzero(plain.counts < THRESHOLD)
        sources = source_rows(np.asarray(state.codebook)[dead], rows)
        assert len(set(sources.tolist())) == len(dead)
        for code, source in zip(dead, sources, strict=True):
            plain.replace(code, rows[source], THRESHOLD if reset_count is None else reset_count)
        assert_states_close(state, plain)
        replacements += len(dead)
    assert 2 < replacements < 40  # some codes died and some lived


def test_nothing_is_replaced_without_a_threshold():
    """Codes that nothing chooses for 10 steps keep the direction of their sums (NumPy)."""
    quantizer = q.ema_vq(12, 3)
    params, state = quantizer.init(jax.random.key(2))
    plain = PlainAverages(state, 0.8, 1e-5)
    update = jax.jit(quantizer.update)
    x, indices = normal(30, 8, 3), np.arange(8) % 3
    for t in range(10):
        state = update(jax.random.key(t), params, state, x, indices)
        plain.update(x, indices)
    assert (plain.counts[3:] < 0.2).all()
    assert_states_close(state, plain)


draws = jax.jit(jax.vmap(q.draw_replacements, in_axes=(0, None, None)))
KEYS = 400


def drawn_from(x, dead):
    """What each of 400 keys draws: (rows [400, K, D], replaced [400, K])."""
    return (np.asarray(part) for part in draws(jax.random.split(jax.random.key(3), KEYS), x, dead))


def test_a_new_vector_for_every_dead_code():
    """16 rows for 10 dead codes: each gets one, no row goes to two, and a row comes in 5 of 8 draws.

    That is 250 of 400 times, give or take 5 standard deviations of 9.7 (binomial).
    """
    x, dead = normal(31, 16, 3), np.isin(np.arange(24), np.arange(3, 23, 2))
    rows, replaced = drawn_from(x, dead)
    assert (replaced == dead).all()
    sources = source_rows(rows[:, dead].reshape(-1, 3), x).reshape(KEYS, 10)
    assert all(len(set(draw)) == 10 for draw in sources.tolist())
    assert (np.abs(np.bincount(sources.ravel(), minlength=16) - 250) < 5 * 9.7).all()


def test_more_dead_codes_than_vectors():
    """16 rows for 22 dead codes: 16 are served, each with a row of its own, and none waits for ever.

    Each of the 22 is served in 8 of 11 draws: 291 of 400, give or take 5 standard deviations of 8.9 (binomial).
    """
    x, dead = normal(31, 16, 3), ~np.isin(np.arange(24), [2, 7])
    rows, replaced = drawn_from(x, dead)
    assert (replaced.sum(axis=-1) == 16).all() and not replaced[:, ~dead].any()
    sources = source_rows(rows[replaced], x).reshape(KEYS, 16)
    assert (np.sort(sources) == np.arange(16)).all()
    assert (np.abs(replaced.sum(axis=0)[dead] - 291) < 5 * 8.9).all()


def test_no_dead_code():
    """Nothing is replaced, and `replace_codes` gives the state back as it was."""
    rows, replaced = drawn_from(normal(31, 16, 3), np.zeros(24, bool))
    assert not replaced.any()
    state = q.initial_averages(jnp.asarray(normal(33, 24, 3)), 1.0)
    for before, after in zip(state, q.replace_codes(state, rows[0], replaced[0], 2.0), strict=True):
        np.testing.assert_array_equal(after, before)


def test_dead_codes_of_a_small_batch_are_all_replaced_over_steps():
    """By hand: three rows a step for 10 dead codes. Code 10's count stays at the threshold exactly, which is alive."""
    quantizer = q.ema_vq(12, 3, decay=0.5, dead_threshold=1.0, reset_count=100.0)
    params, state = quantizer.init(jax.random.key(5))
    update, replaced = jax.jit(quantizer.update), []
    for t in range(5):
        state = update(jax.random.key(t), params, state, normal(40 + t, 3, 3), np.asarray([11, 11, 10]))
        replaced.append(np.flatnonzero(np.asarray(state.counts) > 3).tolist())  # 100 halves to 6.25 in four steps
    assert [len(codes) for codes in replaced] == [3, 6, 9, 10, 10]
    assert replaced[-1] == list(range(10))


def test_epsilon_zero_makes_a_code_the_average_of_what_chose_it():
    """Without an initial count: by hand, the mean of the vectors after the first step; the others as they were."""
    quantizer = q.ema_vq(4, 3, epsilon=0.0, initial_count=0.0)
    params, state = quantizer.init(jax.random.key(6))
    x, indices = normal(50, 5, 3), np.asarray([1, 1, 1, 3, 3])
    after = jax.jit(quantizer.update)(jax.random.key(0), params, state, x, indices)
    assert_close(after.codebook[1], x[:3].mean(axis=0), 1e-6)
    assert_close(after.codebook[3], x[3:].mean(axis=0), 1e-6)
    np.testing.assert_array_equal(after.codebook[::2], state.codebook[::2])


@pytest.mark.parametrize(("metric", "initial_count"), [("euclidean", 0.0), ("euclidean", 1.0), ("cosine", 1.0)])
def test_epsilon_zero_keeps_codes_that_nothing_chose(metric, initial_count):
    """Through 1,000 steps, in which their averages sink below the smallest float32."""
    quantizer = q.ema_vq(4, 3, epsilon=0.0, initial_count=initial_count, metric=metric)
    params, state = quantizer.init(jax.random.key(6))
    x, indices = normal(50, 5, 3), np.asarray([1, 1, 1, 3, 3])

    @jax.jit
    def steps(state):
        one = lambda state, key: (quantizer.update(key, params, state, x, indices), None)  # noqa: E731
        return jax.lax.scan(one, state, jax.random.split(jax.random.key(0), 1000))[0]

    after = steps(state)
    assert not np.asarray(after.counts)[::2].any()
    if metric == "euclidean":
        np.testing.assert_array_equal(after.codebook[::2], state.codebook[::2])
    else:  # lengths may be rounded anew
        assert_close(after.codebook[::2], state.codebook[::2], 1e-6)
    assert np.isfinite(np.asarray(after.codebook)).all()


def test_averages_that_never_move_leave_every_code_in_place():
    state = q.initial_averages(jnp.asarray(normal(51, 4, 3)), 0.0)
    after = q.update_averages(state, jnp.asarray(normal(52, 2, 3)), jnp.array([0, 1]), decay=1.0, epsilon=0.0)
    np.testing.assert_array_equal(after.codebook, state.codebook)


@pytest.mark.parametrize("make", [lambda: q.vq(4, 3), lambda: q.ema_vq(4, 3, dead_threshold=1.0)])
def test_no_vectors_at_all_replace_no_code(make):
    quantizer, none = make(), jnp.zeros((0, 3))
    params, state = quantizer.init(jax.random.key(0))
    after = quantizer.update(jax.random.key(1), params, state, none, jnp.zeros(0, jnp.int32))
    placed = quantizer.place(jax.random.key(1), params, state, none)
    for own in ((params, after), placed):
        codes = quantizer.lookup(*own, jnp.arange(4))
        assert_close(codes, quantizer.lookup(params, state, jnp.arange(4)), 1e-6)


def test_no_vectors_at_all_leave_every_code_in_place():
    """Zero counts everywhere, so that the smoothed counts are 0 / 0 without an epsilon."""
    state = q.initial_averages(jnp.asarray(normal(51, 4, 3)), 0.0)
    for epsilon in (0.0, 1e-5):
        update = jax.jit(partial(q.update_averages, decay=0.5, epsilon=epsilon))
        after = update(state, jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32))
        np.testing.assert_array_equal(after.codebook, state.codebook)


# Statistics


def test_usage_counts_choices():
    """NumPy's bincount, whatever the axes of the indices."""
    indices = np.random.default_rng(60).integers(0, 5, size=(2, 3, 4)).astype(np.int32)
    counts = jax.jit(q.usage, static_argnums=1)(indices, 6)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.bincount(indices.ravel(), minlength=6))
    np.testing.assert_array_equal(q.usage(np.zeros((0,), np.int32), 3), [0, 0, 0])


COUNTS = np.asarray([[1, 1, 1, 1], [3, 0, 5, 0], [0, 7, 0, 0], [0, 0, 0, 0], [100_000_000, 1, 0, 2]], np.int32)


def plain_perplexity(counts):
    """Exp of the entropy, code by code in Python's floats."""
    shares = [float(count) / float(sum(counts)) for count in counts if count > 0]
    return float(np.exp(-sum(share * np.log(share) for share in shares))) if shares else 0.0


def statistics(counts):
    return q.utilisation(counts), q.perplexity(counts), q.dead_codes(counts)


@pytest.mark.parametrize("mapped", [jax.jit(statistics), jax.jit(jax.vmap(statistics))])
def test_statistics_of_counts(mapped):
    """Plain NumPy, one row at a time; empty counts give zeros."""
    used, perplexity, dead = mapped(COUNTS)
    assert_close(used, (COUNTS > 0).mean(axis=-1), 1e-6)
    assert_close(perplexity, [plain_perplexity(row) for row in COUNTS])
    np.testing.assert_array_equal(dead, [0, 2, 3, 4, 1])  # by hand
    assert used.dtype == perplexity.dtype == jnp.float32 and dead.dtype == jnp.int32


def test_statistics_have_one_number_a_codebook():
    flat, stacked = jax.jit(statistics)(COUNTS[:4]), jax.jit(statistics)(COUNTS[:4].reshape(2, 2, 4))
    for one, other in zip(flat, stacked, strict=True):
        np.testing.assert_array_equal(np.asarray(one).reshape(2, 2), other)


def test_perplexity_of_more_choices_than_an_int32_counts():
    assert_close(q.perplexity(jnp.full(4, 2**30, jnp.int32)), 4.0)
    assert_close(q.perplexity(jnp.array([2**31 - 1, 5], jnp.int32)), 1.0)


@pytest.mark.parametrize("scale", [0.05, 0.3, 10.0])
def test_perplexity_of_averaged_counts_knows_no_scale(scale):
    """The state's counts are fractions: multiplied by any number they have the same perplexity."""
    counts = np.float32([3, 1, 0, 4])
    assert_close(q.perplexity(counts * np.float32(scale)), plain_perplexity(counts))


# Many devices, many seeds


@pytest.fixture(scope="module")
def one_device():
    """A step that replaces 3 or more codes, its arguments, and what one device makes of the whole batch of 16."""
    quantizer, step = ema_step()
    _, state = quantizer.init(jax.random.key(7))
    key, x = jax.random.key(8), normal(70, 16, 3)
    indices, expected = step(key, state, x)
    assert (np.asarray(expected.counts) == np.float32(THRESHOLD)).sum() >= 3
    return partial(full_step, quantizer), (key, state, x), indices, expected


def test_update_in_pmap_equals_one_device(one_device):
    step, (key, state, x), indices, expected = one_device
    step = jax.pmap(partial(step, axis_name="devices"), axis_name="devices", in_axes=(None, None, 0))
    chosen, result = jax.device_get(step(key, state, x.reshape(8, 2, 3)))
    np.testing.assert_array_equal(chosen.ravel(), indices)
    for device in (0, 7):
        assert_states_close(jax.tree.map(lambda leaf, device=device: leaf[device], result), expected)


def test_update_in_shard_map_equals_one_device(one_device):
    step, arguments, indices, expected = one_device
    specs = {"in_specs": (P(), P(), P("devices")), "out_specs": (P("devices"), P())}
    step = jax.jit(jax.shard_map(partial(step, axis_name="devices"), mesh=host_mesh(), **specs))
    chosen, result = step(*arguments)
    np.testing.assert_array_equal(chosen, indices)
    assert_states_close(result, expected)


def test_update_of_a_sharded_batch_equals_one_device(one_device):
    """No axis name: the compiler splits the program by the batch's sharding."""
    step, (key, state, x), indices, expected = one_device
    x = jax.device_put(x, NamedSharding(host_mesh(), P("devices")))
    assert x.addressable_shards[0].data.shape == (2, 3)
    chosen, result = jax.jit(step)(key, state, x)
    np.testing.assert_array_equal(chosen, indices)
    assert_states_close(result, expected)


def test_more_dead_codes_than_vectors_over_devices():
    """One vector on each of 8 devices for 12 dead codes: each of the 8 goes to one code, the same on every device."""
    x = normal(71, 8, 3)
    drawing = partial(q.draw_replacements, axis_name="devices")
    drawing = jax.vmap(drawing, in_axes=(None, 0, None), axis_name="devices")
    rows, replaced = map(np.asarray, jax.jit(drawing)(jax.random.key(9), x[:, None], np.ones(12, bool)))
    assert (rows == rows[0]).all() and (replaced == replaced[0]).all()
    assert sorted(source_rows(rows[0][replaced[0]], x).tolist()) == list(range(8))


def test_usage_over_devices():
    indices = np.random.default_rng(61).integers(0, 5, size=(8, 6)).astype(np.int32)
    counts = jax.pmap(partial(q.usage, codebook_size=5, axis_name="devices"), axis_name="devices")(indices)
    np.testing.assert_array_equal(counts, np.tile(np.bincount(indices.ravel(), minlength=5), (8, 1)))


def test_vmap_over_seeds_equals_seed_by_seed():
    """A start and a step; the draw of replacements is mapped over keys above."""
    quantizer, _, _ = make("ema_vq")

    def run(key, x):
        first, second = jax.random.split(key)
        params, state = quantizer.init(first)
        return state, quantizer.update(second, params, state, x, quantizer.quantize(params, state, x).indices)

    keys, x = jax.random.split(jax.random.key(10), 3), normal(72, 2, 3, 4)
    together = jax.device_get(jax.jit(jax.vmap(run, in_axes=(0, None)))(keys, x))
    for seed, key in enumerate(keys):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        jax.tree.map(assert_close, one, jax.device_get(run(key, x)))


# Dtypes, compilations


@pytest.mark.parametrize("name", FACTORIES)
def test_bfloat16_vectors(name):
    """Codes come in x's dtype, the rows rounded; losses and state stay float32, the state what NumPy makes of x."""
    quantizer, params, state = make(name)
    x = jnp.asarray(normal(80, 10, 4), jnp.bfloat16)
    out = quantizer.quantize(params, state, x)
    codebook = table(name, params, state)
    indices = nearest(np.asarray(x, np.float64), codebook)
    np.testing.assert_array_equal(out.indices, indices)
    assert out.codes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.codes, jnp.asarray(codebook[indices], jnp.bfloat16))
    assert out.commitment_loss.dtype == out.codebook_loss.dtype == jnp.float32
    squares = ((np.asarray(x, np.float64) - np.asarray(out.codes, np.float64)) ** 2).sum(axis=-1)
    assert_close(out.commitment_loss, squares)
    after = quantizer.update(jax.random.key(0), params, state, x, out.indices)
    if name == "ema_vq":
        assert all(leaf.dtype == jnp.float32 for leaf in after)
        plain = PlainAverages(state, 0.8, 1e-5)
        plain.update(np.asarray(x, np.float64), indices)
        assert_states_close(after, plain)


def test_bfloat16_directions_are_averaged_in_float32():
    """Scaled to unit length in NumPy's float64: rounding the unit vectors to bfloat16 would show."""
    quantizer, params, state = make("ema_vq", metric="cosine")
    x, indices = jnp.asarray(normal(81, 10, 4), jnp.bfloat16), np.arange(10) % 7
    plain = PlainAverages(state, 0.8, 1e-5, cosine=True)
    plain.update(np.asarray(x, np.float64), indices)
    assert_states_close(quantizer.update(jax.random.key(0), params, state, x, indices), plain)


def test_second_call_compiles_nothing():
    quantizer, _, state = make("ema_vq", dead_threshold=0.9)

    @jax.jit
    def compiled_step(key, state, x):
        return full_step(quantizer, key, state, x)

    with count_compilations(["compiled_step"]) as counts:
        for t in range(3):
            _, state = compiled_step(jax.random.key(t), state, normal(90 + t, 9, 4))
    assert counts == {"compiled_step": 1}


# Bad arguments


SHARED = [
    ({"codebook_size": 0}, r"codebook_size: got 0; pass 1 or more"),
    ({"width": 0}, r"width: got 0; pass 1 or more"),
    ({"metric": "cosin"}, r"metric: got 'cosin'; choose one of 'euclidean', 'cosine'"),
    ({"gradient": "rotate"}, r"gradient: got 'rotate'; choose one of 'straight_through', 'rotation'"),
    ({"block_size": 0}, r"block_size: got 0; pass 1 or more"),
]
AVERAGES = [
    ({"decay": 1.5}, r"decay: got 1\.5; pass a number from 0 to 1"),
    ({"decay": -0.1}, r"decay: got -0\.1; pass a number from 0 to 1"),
    ({"decay": float("nan")}, r"decay: got nan; pass a number from 0 to 1"),
    ({"epsilon": -1e-5}, r"epsilon: got -1e-05; pass 0 or more"),
    ({"initial_count": -1.0}, r"initial_count: got -1\.0; pass 0 or more"),
    ({"dead_threshold": -0.5}, r"dead_threshold: got -0\.5; pass 0 or more"),
    ({"reset_count": -2.0}, r"reset_count: got -2\.0; pass 0 or more"),
]


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [(factory, *case) for factory in (q.vq, q.ema_vq) for case in SHARED] + [(q.ema_vq, *case) for case in AVERAGES],
)
def test_bad_options(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"codebook_size": 4, "width": 3, **options})


@pytest.mark.parametrize("name", FACTORIES)
def test_vectors_of_another_width(name):
    quantizer, params, state = make(name)
    with pytest.raises(ValueError, match=r"x: got shape \(5, 3\); its last axis must be 4.*codebook"):
        quantizer.quantize(params, state, np.zeros((5, 3), np.float32))


def test_update_with_vectors_of_another_width():
    quantizer, params, state = make("ema_vq")
    with pytest.raises(ValueError, match=r"x: got shape \(4, 5\); its last axis must be 4.*codebook"):
        quantizer.update(jax.random.key(0), params, state, np.zeros((4, 5), np.float32), np.zeros(4, np.int32))


def test_usage_of_no_codes():
    with pytest.raises(ValueError, match=r"codebook_size: got 0; pass 1 or more"):
        q.usage(np.zeros(3, np.int32), 0)


def test_cosine_quantizers_search_as_the_cosine_metric_does():
    """A zero code has cosine 0: it loses to any code on x's side and wins against one on the other (by hand)."""
    codebook = jnp.asarray([[0.0, 0.0], [1.0, 2.0], [-1.0, 0.0]])
    quantizer = q.vq(3, 2, metric="cosine")
    found = quantizer.quantize(codebook, (), jnp.asarray([[1.0, 0.0], [0.1, -1.0]]))
    np.testing.assert_array_equal(found.indices, [1, 0])
