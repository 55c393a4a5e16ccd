"""Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random words without a state.

A word is a function of a key and a counter, in 32-bit integers alone, and so the same on every backend, in NumPy, and
under every setting of JAX, where what `jax.random` gives depends on its implementation and its flags.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.typing import Array, Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
_TAILS = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip
_Words = TypeVar("_Words", np.ndarray, Array)


def threefry_2x32(key: tuple[_Words, _Words], counter: tuple[_Words, _Words]) -> tuple[_Words, _Words]:
    """Two random words [...] of the two words of a key and of a counter, all uint32 [...]; twenty rounds.

    NumPy arrays give NumPy arrays; these need an axis, because NumPy warns where scalars overflow.
    """
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    first, second = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            first = first + second
            second = (second << rotation | second >> (32 - rotation)) ^ first
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + (group + 1)
    return first, second


def normal_of_word(word: Array) -> Array:
    """A normal variable float32 [...] of each random word uint32 [...], at most 6.4 from 0.

    The lower 31 bits give the probability of what lies beyond it, so that tails keep their precision, and the uppermost
    the side. The polynomials are those of Giles (2012, "Approximating the erfinv function"), good to 2e-6, and to 2e-3
    where one draw in ten million lies.
    """
    beyond = (2 * (word & 0x7FFFFFFF) + 1).astype(jnp.float32) * 2.0**-32  # on both sides together
    exponent = -jnp.log(beyond * (2 - beyond))
    central = exponent < 5
    x = jnp.where(central, exponent - 2.5, jnp.sqrt(exponent) - 3)
    value = jnp.zeros_like(x)
    for inner, outer in zip(_CENTRAL, _TAILS, strict=True):
        value = jnp.where(central, inner, outer) + value * x
    value = math.sqrt(2) * value * (1 - beyond)
    return jnp.where(word >> 31 == 0, value, -value)


def exponential_of_word(word: Array) -> Array:
    """A waiting time whose mean is 1, float32 [...] in (0, 17), of each random word uint32 [...].

    Short times keep their precision, down to 1e-10.
    """
    return -jnp.log1p(-jnp.minimum((word.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24))


def standard_normal(key: Key, shape: tuple[int, ...]) -> Array:
    """Draws float32 [...] from N(0, 1); the key is consumed.

    On CPU this is several times as fast as `jax.random.normal`, in which the rounds of threefry are a loop.
    """
    size = math.prod(shape)
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    counters = jnp.arange(-(-size // 2), dtype=jnp.uint32)
    words = threefry_2x32((first, second), (counters, jnp.zeros_like(counters)))
    return jnp.concatenate([normal_of_word(word) for word in words])[:size].reshape(shape)
