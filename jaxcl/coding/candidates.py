"""Shared candidates: draws from N(0, 1) that encoder and decoder make from a seed, and that differ in no bit anywhere.

Words are those of Threefry-2x32 with (seed, block) for key and (candidate, pair of weights) for counter. The decoder
maps a word to a normal variable by operations that IEEE 754 specifies to the last bit, in NumPy's float64; the encoder,
which looks at millions of candidates, by `threefry.normal_of_word`, which is close to it.
"""

import functools
import math
import zlib

import numpy as np

from jaxcl import threefry

_STEPS = 16  # intervals of probability in each octave
_OCTAVES = 32
_ORDER = 16  # of Taylor series from one interval's end to the other
_ROOT_OF_TWO_PI = 2.5066282746310002
_SUM = 0x1AA338B2  # the table's CRC


def chosen_candidates(seed: int, blocks: np.ndarray, indices: np.ndarray, width: int) -> np.ndarray:
    """The candidate of each block: draws from N(0, 1), float32 [M, W].

    Args:
        seed: in [0, 2^32).
        blocks: numbers of blocks uint32 [M].
        indices: of a candidate for each of them, uint32 [M].
        width: W.
    """
    pairs = np.arange(-(-width // 2), dtype=np.uint32)
    key = (np.full((1, 1), seed, np.uint32), np.asarray(blocks, np.uint32)[:, None])
    words = threefry.threefry_2x32(key, (np.asarray(indices, np.uint32)[:, None], pairs[None]))
    return exact_normal_of_word(np.stack(words, axis=-1).reshape(len(blocks), -1)[:, :width])


def exact_normal_of_word(words: np.ndarray) -> np.ndarray:
    """A normal variable float32 [...] of each random word uint32 [...], the same on every machine.

    The lower 31 bits m give the probability (m + 1/2) / 2^32 of what lies beyond it, the uppermost the side. Between
    16 points of every octave of that probability the quantile is a cubic, to within 1e-7.
    """
    significand, exponent = np.frexp((words & 0x7FFFFFFF).astype(np.float64) + 0.5)
    place = (significand - 0.5) * (2 * _STEPS)
    interval = np.minimum(place.astype(np.int64), _STEPS - 1)
    part = place - interval
    constant, linear, square, cubic = np.moveaxis(_table()[exponent * _STEPS + interval], -1, 0)
    value = ((cubic * part + square) * part + linear) * part + constant
    return np.where(words >> 31 == 0, value, -value).astype(np.float32)


@functools.cache
def _table() -> np.ndarray:
    """Coefficients float64 [512, 4] of the cubics, by rising powers of the part of an interval that is passed.

    Quantiles follow from z'' = z z'^2, which they satisfy as a function of probability, from z(1/2) = 0 downwards, each
    end of an interval from the other by a Taylor series: by sums, products and quotients of floats alone.

    Raises:
        RuntimeError: the machine's floats are not those of IEEE 754.
    """
    coefficients = np.zeros((_OCTAVES * _STEPS, 4))
    # Slopes are by part of an interval, towards its lower end.
    upper, slope_up = 0.0, _ROOT_OF_TWO_PI * 2.0**-2 / _STEPS
    for interval in reversed(range(_OCTAVES * _STEPS)):
        lower, slope_down = _taylor(upper, slope_up)
        rise = upper - lower
        square, cubic = 3 * rise + 2 * slope_down + slope_up, -2 * rise - slope_down - slope_up
        coefficients[interval] = lower, -slope_down, square, cubic
        upper, slope_up = lower, slope_down / (1 if interval % _STEPS else 2)  # the next octave is half as wide
    if zlib.crc32(coefficients.astype("<f8").tobytes()) != _SUM:
        raise RuntimeError("this machine's floating point is not that of IEEE 754: nothing can be decoded on it")
    return coefficients


def _taylor(value: float, slope: float) -> tuple[float, float]:
    """Value and slope a unit further of the solution of y'' = y y'^2."""
    values, slopes, squares = [value], [slope], list[float]()
    for power in range(_ORDER):
        values.append(slopes[power] / (power + 1))
        squares.append(_product(slopes, slopes, power))
        slopes.append(_product(values, squares, power) / (power + 1))
    return math.fsum(values), math.fsum(slopes)


def _product(first: list[float], second: list[float], power: int) -> float:
    """The coefficient of a power in the product of two series, rounded once; `sum` depends on the version of Python."""
    return math.fsum(first[lower] * second[power - lower] for lower in range(power + 1))
