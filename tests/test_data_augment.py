"""Augmentation: what each example becomes, drawn for itself, under jit, vmap and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import host_mesh

from jaxcl import data

SHAPES = [(6, 5, 7, 3), (6, 5, 7), (6, 4, 4, 2, 3)]


def some_images(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(1, 256, shape).astype(dtype)


def crops(image, padding):
    """All crops of one image, {its corner: crop}, by NumPy."""
    height, width = image.shape[:2]
    padded = np.pad(image, [(padding, padding)] * 2 + [(0, 0)] * (image.ndim - 2))
    places = range(2 * padding + 1)
    return {(y, x): padded[y : y + height, x : x + width] for y in places for x in places}


def corner_of(image, crop, padding):
    (corner,) = [corner for corner, known in crops(image, padding).items() if np.array_equal(known, crop)]
    return corner


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, jnp.bfloat16])
def test_a_crop_is_one_of_those_of_the_padded_image(shape, dtype):
    images = some_images(shape, dtype)
    cropped = np.asarray(data.random_crop(jax.random.key(0), images, padding=2))
    assert cropped.dtype == images.dtype and cropped.shape == shape
    corners = {corner_of(image, crop, 2) for image, crop in zip(images, cropped, strict=True)}
    assert len(corners) > 1  # each example has its own draw


def test_all_crops_are_equally_likely():
    image = some_images((3, 3))
    images = np.broadcast_to(image, (3600, 3, 3))
    cropped = np.asarray(data.random_crop(jax.random.key(1), images, padding=1))
    counts = np.array([(cropped == crop).all((1, 2)).sum() for crop in crops(image, 1).values()])
    assert counts.sum() == 3600
    # 400 of each of nine are expected, with a standard deviation of 19.
    assert np.abs(counts - 400).max() < 5 * 19


def test_no_padding_changes_nothing():
    images = some_images((4, 3, 3, 1))
    np.testing.assert_array_equal(data.random_crop(jax.random.key(0), images, padding=0), images)


def test_padding_beyond_the_image_can_leave_only_zeros():
    cropped = np.asarray(data.random_crop(jax.random.key(0), np.ones((200, 2, 2), np.uint8), padding=4))
    assert {int(total) for total in cropped.sum((1, 2))} == {0, 1, 2, 4}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_a_flip_mirrors_the_width_of_some(shape, dtype):
    images = some_images((64, *shape[1:])).astype(dtype)
    images[:, :, 0] = 0  # so that no image is its own mirror image
    flipped = np.asarray(data.random_flip(jax.random.key(0), images))
    assert flipped.dtype == images.dtype
    same = (flipped == images).all(tuple(range(1, images.ndim)))
    np.testing.assert_array_equal(flipped[~same], images[~same][:, :, ::-1])
    assert 16 < same.sum() < 48  # four standard deviations about a half


AUGMENTATIONS = [lambda key, images: data.random_crop(key, images, padding=3), data.random_flip]


@pytest.mark.parametrize("augment", AUGMENTATIONS, ids=["crop", "flip"])
def test_the_key_decides_under_jit_and_vmap_alike(augment):
    images = jnp.asarray(some_images((2, 16, 6, 6, 3)))
    keys = jax.random.split(jax.random.key(3))
    alone = [augment(key, batch) for key, batch in zip(keys, images, strict=True)]
    assert not np.array_equal(alone[0], augment(keys[1], images[0]))
    np.testing.assert_array_equal(jax.jit(augment)(keys[0], images[0]), alone[0])
    np.testing.assert_array_equal(jax.vmap(augment)(keys, images), jnp.stack(alone))


@pytest.mark.parametrize("augment", AUGMENTATIONS, ids=["crop", "flip"])
def test_a_sharded_batch_stays_where_it_is(augment):
    images = some_images((32, 6, 6, 3))
    split = jax.sharding.NamedSharding(host_mesh(), jax.sharding.PartitionSpec("devices"))
    sharded = jax.device_put(images, split)
    key = jax.random.key(4)
    compiled = jax.jit(augment).lower(key, sharded).compile()
    result = compiled(key, sharded)
    assert result.sharding.is_equivalent_to(split, images.ndim)
    np.testing.assert_array_equal(result, augment(key, images))
    exchanges = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not any(exchange in compiled.as_text() for exchange in exchanges)


def test_what_is_no_batch_of_images_is_refused():
    images = np.zeros((4, 5))
    with pytest.raises(ValueError, match=r"images: got shape \(4, 5\); pass an array \[B, H, W, ...\]"):
        data.random_crop(jax.random.key(0), images, padding=1)
    with pytest.raises(ValueError, match=r"images: got shape \(4, 5\); pass an array \[B, H, W, ...\]"):
        data.random_flip(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"padding: got -1; pass 0 or more"):
        data.random_crop(jax.random.key(0), np.zeros((4, 5, 5)), padding=-1)
