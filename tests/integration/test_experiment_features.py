"""Features for experiments: rows stay with their labels, and an encoder that does not fit is named."""

import numpy as np
import pytest

from experiments import features
from jaxcl import data, nets
from jaxcl.continual import Examples


def test_texts_are_encoded_by_length_and_keep_their_labels(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    tokens = np.where(np.arange(8) < lengths[:, None], rng.integers(1, 50, (40, 8)), 0).astype(np.int32)

    def apply(params, batch):
        return batch.astype(np.float32).sum(axis=1, keepdims=True)

    encoder = nets.FrozenEncoder("sums", {}, apply, 10)
    ordered = features._by_length(Examples(tokens, np.arange(40)))
    assert (np.diff((ordered.inputs != 0).sum(axis=1)) >= 0).all()
    encoded = features._encoded(encoder, ordered, tmp_path)
    assert sorted(encoded.labels.tolist()) == list(range(40))
    np.testing.assert_array_equal(encoded.inputs[:, 0], tokens[encoded.labels].sum(axis=1))


def test_pixels_are_cut_as_asked():
    whole = features.load_features("digits")
    assert whole.train.inputs.shape[1] == 64 and float(whole.train.inputs.max()) == 1
    few = features.load_features("digits", limit=100)
    assert [len(part.labels) for part in few] == [100, 20]
    held_out = features.load_features("digits", limit=100, validation=True)
    assert sum(len(part.labels) for part in held_out) == 100
    np.testing.assert_array_equal(few.train.inputs, data.flat_features(data.digits()).train.inputs[:100])


@pytest.mark.parametrize(
    ("name", "encoder"),
    [("agnews", "pixels"), ("digits", "minilm"), ("cifar10", "minilm"), ("mnist", "efficientnet_lite0")],
)
def test_an_encoder_that_does_not_fit_is_refused(name, encoder):
    with pytest.raises(ValueError, match=f"encoder: got .*{encoder}.*; pixels goes with images"):
        features.load_features(name, encoder=encoder)


def test_weights_are_named_for_the_encoders_that_need_them():
    for encoder, weights in (("vit", None), ("efficientnet_lite0", "vit.safetensors")):
        with pytest.raises(ValueError, match=r"weights: got .*; name a safetensors file for vit"):
            features.load_features("cifar10", encoder=encoder, weights=weights)


def test_noise_has_the_values_of_each_place_and_none_of_the_examples():
    whole, noise = (features.load_features("digits", limit=200, noise=noise).train.inputs for noise in (False, True))
    np.testing.assert_array_equal(np.sort(noise, axis=0), np.sort(whole, axis=0))
    assert not (noise[:, None] == whole[None]).all(axis=2).any()
