"""Spectrograms, losses and measures of waveforms against SciPy, plain NumPy and the packages that define them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from helpers import assert_close, numerical_gradient

from jaxcl.reconstruction import audio

RATE = 8000
STFT_WINDOWS = (8, 16)
MEL_WINDOWS, MEL_BANDS = (32, 64), (4, 8)

COMPARISONS = {
    "stft loss": lambda a, b, mask=None: audio.multi_scale_stft_loss(a, b, windows=STFT_WINDOWS, mask=mask),
    "mel loss": lambda a, b, mask=None: audio.multi_scale_mel_loss(
        a, b, RATE, windows=MEL_WINDOWS, bands=MEL_BANDS, mask=mask
    ),
    "mel distance": lambda a, b, mask=None: audio.mel_distance(a, b, RATE, window=64, hop=24, bands=8, mask=mask),
    "si-sdr": lambda a, b, mask=None: audio.si_sdr(a, b, mask=mask),
}
each_comparison = pytest.mark.parametrize("name", COMPARISONS)


def noise(seed, *shape):
    return (0.1 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# Plain NumPy, in float64, one clip


def magnitudes(x, window, hop):
    """The sum that defines a Fourier transform, over each frame's samples that exist."""
    frames = []
    for centre in range(0, len(x) + 1, hop):
        times = [t for t in range(centre - window // 2, centre + window // 2) if 0 <= t < len(x)]
        offsets = np.array(times) - centre + window // 2
        weighted = np.sin(np.pi * offsets / window) ** 2 * np.float64(x[times])
        frames.append(np.abs(np.exp(-2j * np.pi * np.outer(np.arange(window // 2 + 1), offsets) / window) @ weighted))
    return np.array(frames)


def triangles(rate, window, bands, low, high):
    """Bands one by one, bin by bin."""

    def mel(frequency):
        return 2595 * np.log10(1 + frequency / 700)

    def hertz(mels):
        return 700 * (10 ** (mels / 2595) - 1)

    weights = np.zeros((window // 2 + 1, bands))
    step = (mel(high) - mel(low)) / (bands + 1)
    for band in range(bands):
        start, centre, end = (hertz(mel(low) + step * (band + i)) for i in range(3))
        for number in range(window // 2 + 1):
            frequency = number * rate / window
            if start < frequency <= centre:
                weights[number, band] = (frequency - start) / (centre - start)
            elif centre < frequency < end:
                weights[number, band] = (end - frequency) / (end - centre)
    return weights


def stft_loss(a, b):
    terms = []
    for window in STFT_WINDOWS:
        s, t = magnitudes(a, window, window // 4), magnitudes(b, window, window // 4)
        terms.append(np.linalg.norm(s - t) / np.linalg.norm(s) + np.abs(np.log(s + 1e-5) - np.log(t + 1e-5)).mean())
    return np.mean(terms)


def mel_loss(a, b):
    terms = []
    for window, bands in zip(MEL_WINDOWS, MEL_BANDS, strict=True):
        scale = np.sqrt((scipy.signal.get_window("hann", window) ** 2).sum())
        filters = triangles(RATE, window, bands, 0, RATE / 2) / scale
        s, t = magnitudes(a, window, window // 4) @ filters, magnitudes(b, window, window // 4) @ filters
        terms.append(np.abs(s - t).mean() + ((np.log(s + 1e-5) - np.log(t + 1e-5)) ** 2).mean())
    return np.mean(terms)


def mel_distance(a, b):
    s, t = (np.log(magnitudes(x, 64, 24) @ triangles(RATE, 64, 8, 0, RATE / 2) + 1e-5) for x in (a, b))
    return np.abs(s - t).mean()


def si_sdr(a, b):
    """By least squares: the reference with its best factor, and an offset that is in neither part."""
    a, b = np.float64(a) - np.mean(a, dtype=np.float64), np.float64(b) - np.mean(b, dtype=np.float64)
    factor = np.linalg.lstsq(a[:, None], b, rcond=None)[0][0]
    return 20 * np.log10(np.linalg.norm(factor * a) / np.linalg.norm(b - factor * a))


REFERENCES = {"stft loss": stft_loss, "mel loss": mel_loss, "mel distance": mel_distance, "si-sdr": si_sdr}


# Spectrograms


@pytest.mark.parametrize(("window", "hop", "samples"), [(64, 16, 1000), (64, 64, 640), (200, 80, 777), (10, 7, 23)])
def test_magnitudes_are_scipys(window, hop, samples):
    x = noise(0, 2, 3, samples)
    transform = scipy.signal.stft(x, nperseg=window, noverlap=window - hop, boundary="zeros", padded=False)[2]
    expected = np.abs(transform).swapaxes(-1, -2) * scipy.signal.get_window("hann", window).sum()
    for wrap in (jax.jit, lambda f: jax.jit(jax.vmap(f))):
        actual = wrap(lambda x: audio.stft_magnitudes(x, window=window, hop=hop))(x)
        assert actual.dtype == jnp.float32
        assert actual.shape == (2, 3, samples // hop + 1, window // 2 + 1)
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("samples", [1, 3, 5, 16])
def test_a_clip_may_be_shorter_than_a_window(samples):
    x = noise(1, samples)
    assert_close(audio.stft_magnitudes(x, window=16, hop=4), magnitudes(x, 16, 4), 1e-6)


def test_the_gradient_of_magnitudes():
    x, weights = noise(2, 12), noise(3, 4, 5)
    grad = jax.jit(jax.grad(lambda x: (weights * audio.stft_magnitudes(x, window=8, hop=4)).sum()))(x)
    assert_close(grad, numerical_gradient(lambda x: (weights * magnitudes(x, 8, 4)).sum(), x), 1e-5)


@pytest.mark.parametrize(
    ("rate", "window", "bands", "options"),
    [(8000, 256, 20, {}), (16000, 512, 40, {"low": 80.0, "high": 7600.0}), (24000, 64, 5, {}), (8000, 4, 1, {})],
)
def test_bands_are_triangles_of_equal_width_in_mel(rate, window, bands, options):
    expected = triangles(rate, window, bands, options.get("low", 0), options.get("high", rate / 2))
    weights = audio.mel_filterbank(rate, window, bands, **options)
    assert weights.dtype == np.float32
    assert_close(weights, expected, 1e-6)


def test_log_mel_is_the_logarithm_of_band_magnitudes():
    x = noise(4, 2, 500)
    x[1] = 0
    mel = magnitudes(x[0], 128, 50) @ triangles(RATE, 128, 16, 0, RATE / 2)
    actual = jax.jit(lambda x: audio.log_mel(x, RATE, window=128, hop=50, bands=16, floor=1e-3))(x)
    assert_close(actual[0], np.log(mel + 1e-3), 1e-5)
    assert_close(actual[1], np.full(mel.shape, np.log(1e-3)), 1e-6)


def test_a_tone_is_as_loud_as_its_amplitude():
    """Half the window's sum for amplitude 1, at its own bin."""
    x = 0.3 * np.sin(2 * np.pi * 1000 / RATE * np.arange(4000)).astype(np.float32)
    middle = audio.stft_magnitudes(x, window=256, hop=64)[30]
    assert int(jnp.argmax(middle)) == 32
    assert_close(middle[32], 0.3 * 128 / 2, 1e-4)


# Losses and measures


@each_comparison
def test_comparisons_are_their_formulas(name):
    a, b = noise(5, 2, 3, 130), noise(6, 2, 3, 130)
    b += 0.7 * a
    expected = np.array(
        [[REFERENCES[name](*pair) for pair in zip(*row, strict=True)] for row in zip(a, b, strict=True)]
    )
    for wrap in (lambda f: f, lambda f: jax.jit(jax.vmap(jax.vmap(f)))):
        actual = wrap(COMPARISONS[name])(a, b)
        assert actual.dtype == jnp.float32
        assert_close(actual, expected, 1e-5)


@each_comparison
def test_their_gradients(name):
    a, b = noise(7, 40), noise(8, 40)
    grad = jax.jit(jax.grad(COMPARISONS[name], argnums=1))(a, b)
    assert_close(grad, numerical_gradient(lambda b: REFERENCES[name](a, b), b, 1e-6), 2e-4)


@each_comparison
def test_bfloat16_is_worked_out_in_float32(name):
    a, b = (jnp.asarray(noise(seed, 100), jnp.bfloat16) for seed in (9, 10))
    actual = jax.jit(COMPARISONS[name])(a, b)
    assert actual.dtype == jnp.float32
    assert_close(actual, REFERENCES[name](*(np.asarray(clip, np.float64) for clip in (a, b))), 1e-5)


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "si-sdr"])
def test_gradients_are_finite_at_silence_and_where_nothing_differs(name):
    a, silence = noise(11, 130), np.zeros(130, np.float32)
    compare = jax.jit(jax.value_and_grad(COMPARISONS[name], argnums=(0, 1)))
    for pair in [(a, silence), (silence, a), (silence, silence), (a, a)]:
        value, grads = compare(*pair)
        assert np.isfinite(value) and np.isfinite(grads).all()
        assert (value == 0) == (pair[0] is pair[1])


def test_the_gradient_of_magnitudes_is_zero_at_silence():
    grad = jax.jit(jax.grad(lambda x: audio.stft_magnitudes(x, window=16, hop=4).sum()))(np.zeros(50, np.float32))
    np.testing.assert_array_equal(grad, np.zeros(50))


@each_comparison
def test_a_masked_clip_is_the_cut_clip(name):
    """Whatever stands outside, also where the cut falls on a frame's edge or leaves less than a window."""
    lengths = np.array([3, 7, 8, 9, 31, 32, 48, 100, 129, 130])
    a, b = noise(12, len(lengths), 130), noise(13, len(lengths), 130)
    mask = np.arange(130) < lengths[:, None]
    outside = np.where(mask, 0, np.nan)

    def compare(a, b, mask):
        return jax.value_and_grad(lambda *pair: COMPARISONS[name](*pair, mask=mask), argnums=(0, 1))(a, b)

    values, grads = jax.jit(jax.vmap(compare))(a + outside, b + outside, mask)
    grads = np.array(grads)
    for number, length in enumerate(lengths):
        expected = REFERENCES[name](a[number, :length], b[number, :length])
        assert_close(values[number], expected, 1e-4)
        assert not grads[:, number, length:].any()
        if length in (9, 100):
            cut = jax.jit(jax.grad(COMPARISONS[name], argnums=(0, 1)))(a[number, :length], b[number, :length])
            assert_close(grads[:, number, :length], cut, 1e-4)


def test_which_frames_a_mask_leaves():
    for samples in (1, 7, 8, 9):
        lengths = np.arange(1, samples + 1)[:, None]
        frames = np.asarray(audio.frame_mask(np.arange(samples) < lengths, 4))
        np.testing.assert_array_equal(frames, np.arange(samples // 4 + 1) <= lengths // 4)


def test_a_clip_without_samples_has_no_loss_and_no_measure():
    a, b = noise(14, 130), noise(15, 130)
    nothing = np.zeros(130, bool)
    for name, compare in COMPARISONS.items():
        value = jax.jit(compare)(a, b, nothing)
        assert value == 0 if name.endswith("loss") else np.isnan(value)


def test_si_sdr_does_not_ask_how_loud():
    a, b = noise(16, 500), noise(17, 500)
    pairs = [(a, b), (a, 30 * b), (a, -0.01 * b), (7 * a, b), (a + 0.5, b - 0.2)]
    values = audio.si_sdr(*(jnp.stack(clips) for clips in zip(*pairs, strict=True)))
    assert_close(values, np.full(len(pairs), si_sdr(a, b)), 1e-4)


def test_si_sdr_of_a_known_ratio():
    """Sines of different whole numbers of periods are orthogonal and have no mean."""
    time = 2 * np.pi * np.arange(1000, dtype=np.float64) / 1000
    signal, error = np.sin(5 * time), np.cos(11 * time)
    for ratio in (-20.0, 0.0, 35.0):
        assert_close(audio.si_sdr(jnp.asarray(signal), jnp.asarray(signal + error * 10 ** (-ratio / 20))), ratio, 1e-4)
    assert audio.si_sdr(jnp.asarray(signal), jnp.asarray(0.3 * signal)) > 120
    for pair in [(signal, 0 * signal), (0 * signal, signal)]:
        assert np.isnan(audio.si_sdr(*map(jnp.asarray, pair)))


# Intelligibility and quality


def speech(seed, *shape, rate=RATE):
    """Noise whose loudness comes and goes as syllables do, and a worse copy."""
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=shape) * (0.51 + 0.5 * np.sin(2 * np.pi * 3 * np.arange(shape[-1]) / rate))
    return np.float32(0.1 * clean), np.float32(0.1 * clean + 0.03 * rng.normal(size=shape))


def test_stoi_is_pystois():
    package = pytest.importorskip("pystoi")
    clean, degraded = speech(0, 2, 2, 8000)
    scores = audio.stoi(jnp.asarray(clean), degraded, RATE)
    assert scores.shape == (2, 2) and scores.dtype == np.float64
    expected = [package.stoi(*map(np.float64, pair), RATE) for pair in zip(clean[1], degraded[1], strict=True)]
    np.testing.assert_allclose(scores[1], expected, rtol=1e-12)
    assert ((scores > 0.5) & (scores < 0.99)).all()
    assert audio.stoi(clean, clean, RATE) == pytest.approx(np.ones((2, 2)))
    assert audio.stoi(clean[0, 0], degraded[0, 0], RATE).shape == ()


def test_pesq_is_the_packages():
    package = pytest.importorskip("pesq")
    for rate, mode in [(8000, "nb"), (16000, "wb")]:
        clean, degraded = speech(1, 2, rate, rate=rate)
        scores = audio.pesq(jnp.asarray(clean), degraded, rate)
        assert scores.shape == (2,) and scores.dtype == np.float64
        np.testing.assert_allclose(scores[1], package.pesq(rate, clean[1], degraded[1], mode), rtol=1e-6)
        assert (audio.pesq(clean, clean, rate) > scores).all()
    assert audio.pesq(clean[0], clean[0], rate).shape == ()


@pytest.mark.parametrize(("name", "shortest"), [("stoi", 3277), ("pesq", 2000)])
def test_a_clip_too_short_or_silent_has_no_score(name, shortest):
    pytest.importorskip({"stoi": "pystoi"}.get(name, name))
    measure = getattr(audio, name)
    clean, degraded = speech(2, 4, 6000)
    clean = clean + np.float32(0.2 * np.sin(0.5 * np.arange(6000)))  # so that no frame is quiet
    mask = np.arange(6000) < np.array([[shortest], [shortest - 1], [100], [1]])
    scores = measure(clean, degraded, RATE, mask=mask)
    np.testing.assert_array_equal(np.isnan(scores), [False, True, True, True])
    assert scores[0] == measure(clean[0, :shortest], degraded[0, :shortest], RATE)
    mostly_silent = clean[0].copy()
    mostly_silent[1000:] = 0
    assert np.isnan(
        audio.stoi(mostly_silent, degraded[0], RATE) if name == "stoi" else measure(0 * clean[0], clean[0], RATE)
    )


def test_pesq_of_a_decoder_that_has_gone_wrong():
    pytest.importorskip("pesq")
    clean = speech(3, 4000)[0]
    for wrong in (0 * clean, np.where(np.arange(4000) == 5, np.nan, clean)):
        assert np.isnan(audio.pesq(clean, wrong, RATE))


@pytest.mark.parametrize(("name", "package"), [("stoi", "pystoi"), ("pesq", "pesq")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{name} needs .*{package}: pip install "jaxcl\[audio\]"'):
        getattr(audio, name)(*speech(4, 4000), RATE)


# Bad arguments

X = np.zeros((2, 100), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audio.stft_magnitudes(X, window=7, hop=2), "window: got 7; pass an even number of samples"),
        (lambda: audio.stft_magnitudes(X, window=0, hop=0), "window: got 0; pass an even number of samples"),
        (lambda: audio.stft_magnitudes(X, window=8, hop=9), "hop: got 9; pass a number from 1 to 8"),
        (lambda: audio.stft_magnitudes(X, window=8, hop=0), "hop: got 0; pass a number from 1 to 8"),
        (
            lambda: audio.stft_magnitudes(np.zeros(9, np.int16), window=8, hop=2),
            "audio: got dtype int16; pass floats: divide 16-bit samples by 32768",
        ),
        (lambda: audio.stft_magnitudes(X[:, :0], window=8, hop=2), "audio: got shape (2, 0); pass [..., samples]"),
        (lambda: audio.stft_magnitudes(X[0, 0], window=8, hop=2), "audio: got shape (); pass [..., samples]"),
        (lambda: audio.mel_filterbank(RATE, 9, 4), "window: got 9"),
        (lambda: audio.mel_filterbank(RATE, 8, 0), "bands: got 0; pass 1 or more"),
        (lambda: audio.mel_filterbank(RATE, 32, 64), "bands: got 64 with a window of 32 samples at 8000 Hz; some have"),
        (lambda: audio.mel_filterbank(RATE, 32, 4, low=-1.0), "low, high: got -1.0, 4000.0; pass 0 <= low < high <="),
        (lambda: audio.mel_filterbank(RATE, 32, 4, high=4001.0), "low, high: got 0.0, 4001.0"),
        (lambda: audio.multi_scale_stft_loss(X, X, windows=(8, 6)), "windows: got (8, 6); pass multiples of 4"),
        (lambda: audio.multi_scale_stft_loss(X, X, windows=()), "windows: got (); pass multiples of 4"),
        (lambda: audio.multi_scale_mel_loss(X, X, RATE, bands=(4,)), "bands: got 1 numbers; pass one a window, 5 of"),
        (lambda: audio.multi_scale_stft_loss(X, X[:1]), "estimate: got shape (1, 100); pass (2, 100)"),
        (lambda: audio.mel_distance(X, X, RATE, mask=X[0]), "mask: got shape (100,); pass (2, 100)"),
        (lambda: audio.si_sdr(X, X[:, :9]), "estimate: got shape (2, 9); pass (2, 100)"),
        (lambda: audio.si_sdr(X, X.astype(int)), "estimate: got dtype int64"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_bad_arguments_of_host_measures_are_named():
    pytest.importorskip("pesq")
    with pytest.raises(ValueError, match="sample_rate: got 44100; choose one of 8000, 16000"):
        audio.pesq(X, X, 44100)
    with pytest.raises(ValueError, match=r"estimate: got shape \(100,\); pass \(2, 100\)"):
        audio.pesq(X, X[0], RATE)
