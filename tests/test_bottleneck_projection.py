"""The learned projection: heads of unit variance inside the subspace that features vary in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxcl import bottleneck as bn

pytestmark = pytest.mark.core

LAYER = bn.discrete_key_value_bottleneck(12, 3, codebooks=7, pairs=5, key_width=4)


def uneven_features(examples=4000):
    """Six directions whose standard deviations go from 30 to 0.3, turned, and next to nothing in the others."""
    rng = np.random.default_rng(0)
    spread = np.array([30, 10, 3, 1, 0.6, 0.3, *[1e-4] * 6])
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    return (rng.normal(size=(examples, 12)) * spread @ turn + 5).astype(np.float32), turn


def test_heads_have_variance_one_in_all_directions():
    features, turn = uneven_features()
    _, state = LAYER.init(jax.random.key(0))
    learned = bn.learn_projection(jax.random.key(1), state, jnp.asarray(features), share=0.99999)
    heads = np.asarray(LAYER.heads(learned, features))
    assert_close(heads.std(axis=1), np.ones((7, 4)), 1e-3)
    # Nothing is read from the six directions in which features do not vary.
    assert np.abs(np.einsum("ed,cdw->cew", turn[6:], learned.projection)).max() < 1e-3
    assert np.abs(np.corrcoef(heads.swapaxes(1, 2).reshape(28, -1))).mean() < 0.5
    before = np.asarray(LAYER.heads(state, features)).std(axis=1)
    assert before.max() / before.min() > 5  # the random projection's follow the widest direction


def test_the_share_decides_how_many_directions_count():
    """The widest direction has 89 % of the variance, the two widest 99 %: heads lie on a line, then in a plane."""
    features, _ = uneven_features()
    _, state = LAYER.init(jax.random.key(0))
    for share, directions in ((0.5, 1), (0.95, 2), (0.995, 3)):
        learned = bn.learn_projection(jax.random.key(1), state, jnp.asarray(features), share=share)
        columns = np.asarray(learned.projection).swapaxes(0, 1).reshape(12, -1)
        assert np.linalg.matrix_rank(columns, tol=1e-4 * np.linalg.norm(columns)) == directions


def test_features_that_are_not_finite_do_not_count():
    features, _ = uneven_features()
    _, state = LAYER.init(jax.random.key(0))
    expected = bn.learn_projection(jax.random.key(1), state, jnp.asarray(features[1:]))
    spoilt = jnp.asarray(features).at[0, 3].set(jnp.nan)
    assert_close(bn.learn_projection(jax.random.key(1), state, spoilt).projection, expected.projection, 1e-4)
    assert not bn.learn_projection(jax.random.key(1), state, jnp.ones((9, 12))).projection.any()


def test_bad_arguments_are_named():
    _, state = LAYER.init(jax.random.key(0))
    features = jnp.ones((3, 12))
    with pytest.raises(ValueError, match="state: got one of a bottleneck that cuts features"):
        bn.learn_projection(jax.random.key(0), state._replace(projection=None), features)
    with pytest.raises(ValueError, match="features: got shape"):
        bn.learn_projection(jax.random.key(0), state, features[:, :5])
    with pytest.raises(ValueError, match="share: got 0"):
        bn.learn_projection(jax.random.key(0), state, features, share=0)
