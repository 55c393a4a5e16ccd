"""How far one waveform is from another: spectrograms, multi-scale losses, and the measures that codecs report.

Waveforms are [..., samples] of a float dtype, full scale being +-1; arithmetic is in float32. Losses and measures come
back unreduced, one number a clip, [...].

Frames. Frame f is centred at sample f * hop, and what a window covers before the first and after the last sample is
zero, as by default in librosa and SciPy. So a clip has samples // hop + 1 frames, every sample counts, and a clip may
be shorter than a window. `torch.stft` mirrors the clip at its ends instead, of which only frames there take notice.

Masks. Clips of several lengths stand in one array if `mask` [..., samples] is true where a sample belongs to its clip,
whose samples come first. What is outside is taken as zero, and a frame counts if the clip cut to its length would have
it too. Results are then those of the cut clip, to rounding, whatever stands outside, and no gradient goes there.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcl.typing import Array, ArrayLike, bad_argument, check_between, check_choice, check_count

_FLOOR = 1e-5  # -100 dB of full scale
_STOI_SAMPLES, _STOI_RATE = 4096, 10_000  # Taal et al. 2011: more than 31 frames of 256, each half over the next
_PESQ_MODES = {8000: "nb", 16000: "wb"}  # ITU-T P.862.1 and P.862.2


def stft_magnitudes(audio: Array, *, window: int, hop: int) -> Array:
    """Magnitudes of the short-time Fourier transform with a periodic Hann window, unscaled, as `torch.stft` has them.

    Where a magnitude is zero, so is its gradient.

    Args:
        audio: [..., samples].
        window: samples a frame, an even number; also the transform's length.
        hop: samples from frame to frame, at most `window`. Frames are put together from pieces as long as the greatest
            common divisor of both, which should be large, as it is of 200 and 80.

    Returns:
        [..., samples // hop + 1, window // 2 + 1] float32.

    Raises:
        ValueError: audio that is not of a float dtype, or without samples; a window or hop out of range.
    """
    audio = _as_float32("audio", audio)
    _check_window(window)
    check_between("hop", hop, 1, window)
    piece = math.gcd(window, hop)
    frames, apart = audio.shape[-1] // hop + 1, hop // piece
    padded = jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(window // 2, window // 2)])
    padded = padded[..., : padded.shape[-1] // piece * piece]
    pieces = padded.reshape(*audio.shape[:-1], -1, piece)
    # Slices rather than a gather, whose gradient would be a scatter.
    parts = [pieces[..., i : i + apart * (frames - 1) + 1 : apart, :] for i in range(window // piece)]
    # JAX takes zero as the gradient of |z| at z = 0.
    return jnp.abs(jnp.fft.rfft(jnp.concatenate(parts, axis=-1) * _hann(window)))


def frame_mask(mask: ArrayLike, hop: int) -> Array:
    """Which frames of a masked clip count, [..., samples // hop + 1] bool: those that it has when cut to its length.

    In a mask [..., samples] that begins with n true samples these are frames 0 to n // hop, so frame f > 0 is one of
    them if sample f * hop - 1 is true; frame 0 is if sample 0 is.
    """
    mask = jnp.asarray(mask, bool)
    return jnp.concatenate([mask[..., :1], mask[..., hop - 1 :: hop]], axis=-1)


def mel_filterbank(
    sample_rate: float, window: int, bands: int, *, low: float = 0.0, high: float | None = None
) -> np.ndarray:
    """Weights [F, M] float32 that sum the F = window // 2 + 1 bins of a spectrum into M bands of equal width in mel.

    The scale is HTK's, mel = 2595 log10(1 + f / 700) (Young et al., The HTK Book, section 5.4). Bands are triangles
    over frequency, of height 1, each from the centre of the one below to that of the one above, as in torchaudio;
    librosa's default is Slaney's scale, and triangles of area 1.

    Args:
        sample_rate: Hz.
        window: samples a frame, an even number.
        bands: M.
        low: Hz, where the first band begins.
        high: Hz, where the last band ends; half the sample rate if None.

    Raises:
        ValueError: an argument out of range, or so many bands that one of them has no bin.
    """
    _check_window(window)
    check_count("bands", bands, 1)
    nyquist = sample_rate / 2
    high = nyquist if high is None else high
    if not 0 <= low < high <= nyquist:
        raise bad_argument("low, high", f"{low}, {high}", f"pass 0 <= low < high <= {nyquist}, half the sample rate")
    low_mel, high_mel = (2595 * math.log10(1 + frequency / 700) for frequency in (low, high))
    edges = 700 * (10 ** (np.linspace(low_mel, high_mel, bands + 2) / 2595) - 1)
    start, centre, end = edges[:-2], edges[1:-1], edges[2:]
    bins = np.linspace(0, nyquist, window // 2 + 1)[:, None]
    weights = np.minimum((bins - start) / (centre - start), (end - bins) / (end - centre)).clip(0)
    if not weights.any(axis=0).all():
        raise bad_argument(
            "bands", f"{bands} with a window of {window} samples at {sample_rate} Hz",
            "some have no bin: pass fewer bands or a longer window",
        )  # fmt: skip
    return weights.astype(np.float32)


def log_mel(audio: Array, sample_rate: float, *, window: int, hop: int, bands: int, floor: float = _FLOOR) -> Array:
    """Log-mel spectrogram [..., samples // hop + 1, bands] float32: the natural logarithm of magnitudes, not powers.

    It is log(mel + floor) of what `mel_filterbank` makes of `stft_magnitudes`, with their arguments and errors.

    Args:
        audio: [..., samples].
        sample_rate: Hz.
        window: samples a frame.
        hop: samples from frame to frame.
        bands: how many.
        floor: what silence has in place of 0.
    """
    filters = mel_filterbank(sample_rate, window, bands)
    return jnp.log(_sum_bands(stft_magnitudes(audio, window=window, hop=hop), filters) + floor)


def multi_scale_stft_loss(
    reference: Array,
    estimate: Array,
    *,
    windows: Sequence[int] = (128, 256, 512),
    mask: ArrayLike | None = None,
    floor: float = _FLOOR,
) -> Array:
    """Multi-resolution STFT loss of Parallel WaveGAN (Yamamoto et al. 2020), [...].

    The mean over windows of the spectral convergence `|S(reference) - S(estimate)|_F / |S(reference)|_F`, norms being
    over a clip, and of the mean absolute difference of the logarithms of S, which is `stft_magnitudes` at a hop of a
    quarter window. The authors' windows at 24 kHz are 10, 25 and 50 ms at a hop of about a fifth, zero-padded to the
    transform's length; the default here is 16, 32 and 64 ms at 8 kHz.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        windows: samples, each a multiple of 4.
        mask: [..., samples], see the module's docstring; None if all count. A clip without samples has loss 0.
        floor: what is added to S before the logarithm, and the least root mean square of S(reference) to divide by.

    Raises:
        ValueError: shapes that differ, no window, or as `stft_magnitudes`.
    """

    def at_scale(s: Array, t: Array, counted: Array | None, window: int) -> Array:
        norm, difference = (_root(_mean(jnp.square(x), counted)) for x in (s, s - t))
        log_difference = _mean(jnp.abs(jnp.log(s + floor) - jnp.log(t + floor)), counted)
        return difference / jnp.maximum(norm, floor) + log_difference

    scales = _scales(reference, estimate, windows, mask)
    return jnp.stack([at_scale(*scale) for scale in scales]).mean(axis=0)


def multi_scale_mel_loss(
    reference: Array,
    estimate: Array,
    sample_rate: float,
    *,
    windows: Sequence[int] = (32, 64, 128, 256, 512),
    bands: Sequence[int] = (4, 8, 16, 32, 64),
    mask: ArrayLike | None = None,
    floor: float = _FLOOR,
) -> Array:
    """Multi-scale mel-spectrogram loss of EnCodec (Défossez et al. 2022, section 3.4), [...].

    The mean over windows of `mean |M(reference) - M(estimate)| + mean (log M(reference) - log M(estimate))^2`, M being
    mel magnitudes at a hop of a quarter window, divided by the root of the window's energy so that noise has the same
    magnitude at every scale.

    The paper has norms, and no logarithm; means, and the logarithm in the second term, are as in the authors' code,
    which has powers in place of magnitudes and log10. The authors' 64 bands at each window from 32 to 2,048 samples at
    24 kHz mostly have no bin in the short ones, so here bands grow with the window. Defaults are 4 to 64 ms at 8 kHz.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        sample_rate: Hz.
        windows: samples, each a multiple of 4.
        bands: of `mel_filterbank`, one number a window.
        mask: as in `multi_scale_stft_loss`.
        floor: what is added to M before the logarithm.

    Raises:
        ValueError: shapes that differ, no window, not as many `bands` as `windows`, or as `log_mel`.
    """
    if len(bands) != len(windows):
        raise bad_argument("bands", f"{len(bands)} numbers", f"pass one a window, {len(windows)} of them")

    def at_scale(s: Array, t: Array, counted: Array | None, window: int, bands: int) -> Array:
        filters = mel_filterbank(sample_rate, window, bands) / np.linalg.norm(_hann(window))
        m, n = _sum_bands(s, filters), _sum_bands(t, filters)
        log_difference = jnp.log(m + floor) - jnp.log(n + floor)
        return _mean(jnp.abs(m - n), counted) + _mean(jnp.square(log_difference), counted)

    scales = zip(_scales(reference, estimate, windows, mask), bands, strict=True)
    return jnp.stack([at_scale(*scale, count) for scale, count in scales]).mean(axis=0)


def mel_distance(
    reference: Array,
    estimate: Array,
    sample_rate: float,
    *,
    window: int = 512,
    hop: int = 128,
    bands: int = 64,
    mask: ArrayLike | None = None,
) -> Array:
    """Mean absolute difference of the `log_mel` of two waveforms, [...]; 1 is 8.7 dB.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        sample_rate: Hz; the other defaults are for 8 to 24 kHz.
        window: samples a frame.
        hop: samples from frame to frame.
        bands: how many.
        mask: [..., samples], see the module's docstring. A clip without samples has distance NaN.

    Raises:
        ValueError: shapes that differ, or as `log_mel`.
    """
    reference, estimate = _as_pair(reference, estimate, mask)
    s, t = (log_mel(audio, sample_rate, window=window, hop=hop, bands=bands) for audio in (reference, estimate))
    if mask is None:
        return _mean(jnp.abs(s - t), None)
    return jnp.where(jnp.asarray(mask, bool).any(-1), _mean(jnp.abs(s - t), frame_mask(mask, hop)), jnp.nan)


def si_sdr(reference: Array, estimate: Array, *, mask: ArrayLike | None = None) -> Array:
    """Scale-invariant signal-to-distortion ratio in dB, [...]: the higher the better (Le Roux et al. 2019).

    Both waveforms first have their mean taken off. The estimate is split into the multiple of the reference nearest to
    it and the rest, and the ratio is `10 log10(|multiple|^2 / |rest|^2)`. Without a rest it is infinite, though
    rounding leaves one at some 140 dB. NaN if either waveform is silent.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        mask: [..., samples], see the module's docstring.

    Raises:
        ValueError: shapes that differ, or audio as in `stft_magnitudes`.
    """
    inside = jnp.ones(reference.shape, bool) if mask is None else jnp.asarray(mask, bool)
    target, estimate = (
        jnp.where(inside, audio - audio.sum(-1, keepdims=True) / inside.sum(-1, keepdims=True), 0)
        for audio in _as_pair(reference, estimate, mask)
    )
    target *= jnp.sum(target * estimate, -1, keepdims=True) / jnp.sum(jnp.square(target), -1, keepdims=True)
    return 10 * jnp.log10(jnp.sum(jnp.square(target), -1) / jnp.sum(jnp.square(estimate - target), -1))


def stoi(reference: ArrayLike, estimate: ArrayLike, sample_rate: int, *, mask: ArrayLike | None = None) -> np.ndarray:
    """Short-time objective intelligibility (Taal et al. 2011) by the package pystoi, [...] float64; 1 is the best.

    Runs on the host, clip by clip. NaN where it is not defined: the clip has no more than 0.41 s, or has not once
    frames that are 40 dB or more below the reference's loudest are left out.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        sample_rate: Hz; both are resampled to 10 kHz.
        mask: [..., samples], see the module's docstring.

    Raises:
        ImportError: pystoi is not installed.
        ValueError: shapes that differ.
    """
    try:
        from pystoi import stoi as measure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('stoi needs pystoi: pip install "jaxcl[audio]"') from error

    def score(clean: np.ndarray, degraded: np.ndarray) -> float:
        if len(clean) * _STOI_RATE > _STOI_SAMPLES * sample_rate:  # pystoi breaks off at less than a frame
            with warnings.catch_warnings(), contextlib.suppress(RuntimeWarning):
                warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
                return float(measure(clean, degraded, sample_rate))
        return math.nan

    return _by_clip(score, reference, estimate, mask)


def pesq(reference: ArrayLike, estimate: ArrayLike, sample_rate: int, *, mask: ArrayLike | None = None) -> np.ndarray:
    """Perceptual evaluation of speech quality by the package pesq, [...] float64: an opinion score, 1 to about 4.6.

    Narrow band (ITU-T P.862.1) at 8 kHz and wide band (P.862.2) at 16 kHz, which do not compare. Runs on the host, clip
    by clip. NaN where it is not defined: the clip has less than 0.25 s, no speech is found in it, or either waveform
    is silent or not finite.

    Args:
        reference: [..., samples].
        estimate: the same shape.
        sample_rate: 8000 or 16000 Hz.
        mask: [..., samples], see the module's docstring.

    Raises:
        ImportError: pesq is not installed.
        ValueError: another sample rate, or shapes that differ.
    """
    try:
        import pesq as package  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('pesq needs the package pesq: pip install "jaxcl[audio]"') from error
    check_choice("sample_rate", sample_rate, _PESQ_MODES)

    def score(clean: np.ndarray, degraded: np.ndarray) -> float:
        if all(audio.any() and np.isfinite(audio).all() for audio in (clean, degraded)):
            with contextlib.suppress(package.BufferTooShortError, package.NoUtterancesError):
                return float(package.pesq(sample_rate, clean, degraded, _PESQ_MODES[sample_rate]))
        return math.nan

    return _by_clip(score, reference, estimate, mask)


def _by_clip(
    score: Callable[..., float], reference: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None
) -> np.ndarray:
    """Scores [...] float64 of two clips [samples] each, on the host and without what the mask leaves out."""
    _check_shapes(reference, estimate, mask)
    inside = np.ones(reference.shape, bool) if mask is None else np.asarray(mask, bool)
    pair = [np.asarray(audio, np.float64) for audio in (reference, estimate)]
    scores = [score(*(audio[clip][inside[clip]] for audio in pair)) for clip in np.ndindex(reference.shape[:-1])]
    return np.reshape(np.asarray(scores, np.float64), reference.shape[:-1])


def _scales(
    reference: Array, estimate: Array, windows: Sequence[int], mask: ArrayLike | None
) -> list[tuple[Array, Array, Array | None, int]]:
    """For each window both clips' magnitudes [..., frames, bins], which frames count, and the window."""
    reference, estimate = _as_pair(reference, estimate, mask)
    if not windows or any(window < 4 or window % 4 for window in windows):
        raise bad_argument("windows", tuple(windows), "pass multiples of 4: a hop is a quarter window")
    scales = []
    for window in windows:
        s, t = (stft_magnitudes(audio, window=window, hop=window // 4) for audio in (reference, estimate))
        scales.append((s, t, None if mask is None else frame_mask(mask, window // 4), window))
    return scales


def _as_pair(reference: Array, estimate: Array, mask: ArrayLike | None) -> tuple[Array, Array]:
    """Both waveforms [..., samples] in float32, zero outside the mask."""
    _check_shapes(reference, estimate, mask)
    reference, estimate = _as_float32("reference", reference), _as_float32("estimate", estimate)
    if mask is None:
        return reference, estimate
    return jnp.where(jnp.asarray(mask, bool), reference, 0), jnp.where(jnp.asarray(mask, bool), estimate, 0)


def _as_float32(argument: str, audio: Array) -> Array:
    if not audio.ndim or not audio.shape[-1]:
        raise bad_argument(argument, f"shape {tuple(audio.shape)}", "pass [..., samples], one sample or more")
    if not jnp.issubdtype(audio.dtype, jnp.floating):
        raise bad_argument(argument, f"dtype {audio.dtype}", "pass floats: divide 16-bit samples by 32768")
    return jnp.asarray(audio, jnp.float32)


def _check_shapes(reference: ArrayLike, estimate: ArrayLike, mask: ArrayLike | None) -> None:
    for name, array in (("estimate", estimate), ("mask", mask)):
        if array is not None and array.shape != reference.shape:
            raise bad_argument(
                name, f"shape {tuple(array.shape)}", f"pass {tuple(reference.shape)}, as `reference` has"
            )


def _check_window(window: int) -> None:
    if window < 2 or window % 2:
        raise bad_argument("window", window, "pass an even number of samples")


def _hann(window: int) -> np.ndarray:
    """[window] float32, periodic."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)


def _sum_bands(magnitudes: Array, filters: np.ndarray) -> Array:
    """Mel magnitudes [..., frames, bands] of magnitudes [..., frames, bins] and filters [bins, bands]."""
    return jnp.matmul(magnitudes, filters, precision=lax.Precision.HIGHEST)


def _mean(values: Array, counted: Array | None) -> Array:
    """Mean [...] of values [..., frames, bins] over the frames that are counted [..., frames]; 0 if none is."""
    means = values.mean(axis=-1)
    if counted is None:
        return means.mean(axis=-1)
    return jnp.where(counted, means, 0).sum(axis=-1) / jnp.maximum(counted.sum(axis=-1), 1)


def _root(x: Array) -> Array:
    """Square root of x [...], whose gradient is zero where x is."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
