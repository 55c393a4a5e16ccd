"""Losses of an autoencoder by networks: a discriminator's, and distances between features."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcl.nearest import normalise, squared_distances
from jaxcl.typing import Array, PyTree, bad_argument, check_at_least, check_rank


def discriminator_hinge_loss(real: Array, fake: Array) -> Array:
    """What a discriminator minimises (Lim & Ye 2017): max(0, 1 - real) + max(0, 1 + fake), a mean over patches.

    VQGAN's code (Esser et al. 2021) has half of it. It is for the discriminator's parameters alone.

    Args:
        real: logits of images, [B, ...], any axes of patches.
        fake: logits of reconstructions, [B, ...], of the same shape.

    Returns:
        [B] float32.

    Raises:
        ValueError: shapes that differ.
    """
    _check_alike("fake", fake, "real", real)
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return _mean_patch(jax.nn.relu(1 - real) + jax.nn.relu(1 + fake))


def generator_hinge_loss(fake: Array) -> Array:
    """What a decoder minimises against a discriminator with the hinge loss: -fake, a mean over patches.

    Args:
        fake: logits of reconstructions, [B, ...], any axes of patches.

    Returns:
        [B] float32.
    """
    return -_mean_patch(fake.astype(jnp.float32))


def adaptive_weight(
    reconstruction_gradient: PyTree, adversarial_gradient: PyTree, *, limit: float = 1e4, epsilon: float = 1e-4
) -> Array:
    """What the adversarial loss is multiplied by to pull as hard as the reconstruction (Esser et al. 2021, eq. 7).

    The lengths' quotient |g_rec| / (|g_adv| + epsilon), at most `limit`, a constant to gradients. Both are gradients
    of mean losses in the weights of the decoder's last layer, and the reconstruction's includes that of the perceptual
    loss. The authors' code multiplies the result by a weight of its own, and by 0 in the first steps. Its epsilon and
    limit are the defaults here; the paper has 1e-6 and no limit.

    Args:
        reconstruction_gradient: any pytree of arrays.
        adversarial_gradient: any pytree of arrays.
        limit: the largest weight.
        epsilon: what keeps the quotient finite.

    Returns:
        [] float32.

    Raises:
        ValueError: a limit or an epsilon below 0.
    """
    check_at_least("limit", limit, 0)
    check_at_least("epsilon", epsilon, 0)
    reconstruction, adversarial = (
        _length(lax.stop_gradient(gradient)) for gradient in (reconstruction_gradient, adversarial_gradient)
    )
    return jnp.minimum(reconstruction / (adversarial + epsilon), limit)


def perceptual_loss(features: Callable[[Array], Sequence[Array]], a: Array, b: Array) -> Array:
    """Squared distance of two images in a network's features (Zhang et al. 2018, eq. 1, with all weights 1).

    Each position's feature vector is scaled to unit length; squared differences are summed over channels, averaged
    over positions, and summed over maps. So a map's share lies in [0, 4].

    It is LPIPS in that. It is not in the weights: LPIPS weighs channels by what was learned from human judgements, and
    its numbers are of five layers of AlexNet or VGG trained on ImageNet (or SqueezeNet) after inputs were scaled as
    those networks want them. Here `features` does all that or not; with those networks it is the paper's uncalibrated
    baseline. Vectors shorter than 1e-6 are divided by that, where LPIPS adds 1e-10 to the length.

    Args:
        features: images [B, H, W, C] -> feature maps [B, h, w, c], each of its own size.
        a: images, [B, H, W, C].
        b: images to compare with, [B, H, W, C]. Gradients flow into both, and into what `features` closes over.

    Returns:
        [B] float32.

    Raises:
        ValueError: shapes that differ, images or maps without four axes, or no map.
    """
    check_rank("a", a, 4)
    _check_alike("b", b, "a", a)
    maps = features(a), features(b)
    if not len(maps[0]):
        raise bad_argument("features", "no map", "return one feature map [B, h, w, c] or more")
    loss = jnp.zeros(len(a))
    for both in zip(*maps, strict=True):
        check_rank("features", both[0], 4)
        unit_a, unit_b = (normalise(feature.astype(jnp.float32)) for feature in both)
        loss += squared_distances(unit_a, unit_b).mean(axis=(1, 2))
    return loss


def _mean_patch(values: Array) -> Array:
    """[B] of [B, ...]."""
    return values.reshape(len(values), -1).mean(axis=1)


def _length(tree: PyTree) -> Array:
    """[] float32, the Euclidean length of all leaves as one vector."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _check_alike(name: str, array: Array, other_name: str, other: Array) -> None:
    if array.shape != other.shape:
        raise bad_argument(name, f"shape {tuple(array.shape)}", f"pass that of {other_name}, {tuple(other.shape)}")
