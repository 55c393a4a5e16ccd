"""SimVQ on speech, beside VQ: spoken digits through a SEANet tokenizer, and whether they are still understood.

Every row of the table is trained with the same encoder, decoder, steps and data order; only the quantizer differs.
Utilisation and perplexity are those of one pass over the training set. On the test set: mel distance, SI-SDR, STOI and
PESQ (where pystoi and pesq are installed; many clips are too short for them, and the share that is not stands beside),
and kept accuracy, which is that of a digit classifier, trained on original training clips, on the reconstructions over
that on the originals.

python -m experiments.simvq_audio
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.card import Card
from experiments.common import parse_command, run_command
from experiments.tokenizers import Material, TokenizerConfig, run
from jaxcl import data, nets, reconstruction, report
from jaxcl.continual import Examples
from jaxcl.data.packs import Clips
from jaxcl.typing import Array, ArrayLike, PyTree, check_at_least

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("1 min", "that it runs"),
    "--preset cpu": Card("29 min", "SimVQ: 99.9 % of 4,096 codes in use, STOI 0.830; VQ: 17.9 %, STOI 0.812"),
    "--preset paper": Card("not measured; it takes an accelerator", "SimVQ: all codes used"),
}

MEASURED_AT_ONCE = 50  # clips
SHOWN = {"window": 256, "hop": 64, "bands": 40}  # of the spectrograms


@dataclasses.dataclass(frozen=True)
class Config(TokenizerConfig):
    """Settings of the audio experiment; the defaults shown are those of the preset."""

    data: str = "fsdd"
    """fsdd: the Free Spoken Digit Dataset, a pack in the folder that JAXCL_DATA names."""
    seconds: float = 0.64
    """Clips are cut or padded to this length; padding is masked."""
    channels: int = 16
    """Of SEANet's first layer; each stride doubles them."""
    strides: tuple[int, ...] = (2, 4, 5)
    """Of SEANet: the product is the samples of a token."""
    dilations: tuple[int, ...] = (1, 3)
    """Of SEANet's residual units, one each before every stride."""
    classifier_steps: int = 1000
    """Training steps of the digit classifier."""


def preset(name: Any, data: str) -> Config:
    """The settings of a preset."""
    config = Config(preset=name, data=data, out=Path("runs/simvq_audio"), seeds=1, rows=("vq:4096", "simvq:4096"))
    if name == "smoke":
        return dataclasses.replace(
            config, rows=("vq:64", "simvq:64"), steps=6, limit=64, channels=4, dilations=(1,), classifier_steps=20,
            examples=3,
        )  # fmt: skip
    if name == "paper":
        # Zhu et al. 2025, section 5: codes of width 512 in batches of 64, 500,000 steps of Adam at 1e-4. They have 75
        # tokens a second of speech at 24 kHz; these clips have 8 kHz, of which --strides makes 200 a second.
        return dataclasses.replace(
            config, rows=("vq:4096", "simvq:4096", "simvq:65536", "simvq:262144"), steps=500_000, batch_size=64,
            learning_rate=1e-4, quantizer_rate=1.0, commitment_weight=0.25, basis_decay=0.0, width=512, channels=32,
            dilations=(1, 3, 9),
        )  # fmt: skip
    return config


def padded(clips: Clips, samples: int) -> np.ndarray:
    """Clips [N, samples] int16, cut, or padded with zeros; a clip's own peak is made full scale less one."""
    whole = np.zeros((len(clips.audio), samples), np.int16)
    for row, clip in zip(whole, clips.audio, strict=True):
        kept = clip[:samples].astype(np.float64)
        # Speakers differ tenfold in level. Zeros inside a clip become 1, so that zeros at the end tell its length.
        scaled = np.rint(kept * (32766 / max(np.abs(kept).max(initial=0), 1)))
        row[: len(kept)] = np.where(scaled == 0, 1, scaled)
    return whole


def clips_of(config: Config) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], int]:
    """((clips [N, samples], digits [N]) to train on, the same to be tested on, samples a second)."""
    train, test = data.fsdd()
    rate, hop = train.sample_rate, int(np.prod(config.strides))
    samples = round(config.seconds * rate / hop) * hop
    check_at_least("seconds", samples, hop)
    parts = [(padded(part, samples), part.labels) for part in (train, test)]
    if config.validation:
        halves = data.hold_out(Examples(*parts[0]), share=0.2)
        parts = [(np.asarray(part.inputs), np.asarray(part.labels)) for part in halves]
    if config.limit is not None:
        check_at_least("limit", config.limit, 1)
        order = np.random.default_rng(0).permutation
        rows = [
            order(len(part[1]))[:count]
            for part, count in zip(parts, (config.limit, -(-config.limit // 5)), strict=True)
        ]
        parts = [(clips[own], digits[own]) for (clips, digits), own in zip(parts, rows, strict=True)]
    return parts[0], parts[1], rate


@jax.jit
def prepare(clips: Array) -> Array:
    """From -1 to 1."""
    return clips.astype(jnp.float32) / 32768


def sample_mask(audio: Array) -> Array:
    """Which samples of clips [B, samples] belong to them: all up to the last that is not zero."""
    return jnp.cumsum(audio[:, ::-1] != 0, axis=1)[:, ::-1] > 0


def material_of(config: Config) -> Material:
    """What there is to code, as the configuration says."""
    (train, train_digits), (test, test_digits), rate = clips_of(config)
    hop = int(np.prod(config.strides))
    classify = classifier(config, train, train_digits, rate)

    def loss(outputs: Array, inputs: Array, _: Array | None) -> Array:
        inside = sample_mask(inputs)
        waveform = jnp.where(inside, jnp.abs(outputs - inputs), 0).sum(axis=1) / jnp.maximum(inside.sum(axis=1), 1)
        return waveform + reconstruction.multi_scale_mel_loss(inputs, outputs, rate, mask=inside)

    def mask(audio: Array) -> Array:
        """Frames that hold at least one sample of the clip."""
        return sample_mask(audio)[:, ::hop]

    def measured(of: Callable[[int, int], tuple[Array, Array]]) -> dict[str, float]:
        return measure(of, classify, test_digits, rate)

    return Material(
        train, test, jax.jit(mask), prepare,
        nets.SEANetEncoder(config.width, config.channels, config.strides, config.dilations),
        nets.SEANetDecoder(config.channels, config.strides, config.dilations),
        loss, None, measured, lambda shown: figures(shown, rate),
    )  # fmt: skip


def spectrograms(audio: Array, rate: int) -> Array:
    """Log-mel [B, frames, bands] of clips [B, samples]."""
    return reconstruction.log_mel(audio, rate, **SHOWN)


def classifier(config: Config, clips: np.ndarray, digits: np.ndarray, rate: int) -> Callable[[Array], Array]:
    """Clips [B, samples] -> digits [B]: an MLP on log-mel spectrograms, trained on originals, shifted a little."""
    network = nets.MLP((128,), 10)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, config.classifier_steps), weight_decay=1e-2)

    def features(audio: Array) -> Array:
        # Means over pairs of frames: half as much to learn from, and a little blind to when a word begins.
        spectrogram = spectrograms(audio, rate)
        frames = spectrogram.shape[1] // 2 * 2
        return spectrogram[:, :frames].reshape(len(audio), frames // 2, -1, spectrogram.shape[2]).mean(axis=2) / 4 + 1

    def logits(params: PyTree, audio: Array) -> Array:
        return jnp.asarray(network.apply(params, features(audio)))

    def objective(params: PyTree, audio: Array, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, audio), labels).mean()

    @jax.jit
    def step(key: Array, params: PyTree, moments: PyTree, audio: Array, labels: Array) -> tuple[PyTree, PyTree]:
        shifts = jax.random.randint(key, (len(audio),), 0, rate // 20)
        shifted = jax.vmap(jnp.roll)(prepare(audio), shifts)
        gradients = jax.grad(objective)(params, shifted, labels)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    params = network.init(jax.random.key(0), features(prepare(jnp.asarray(clips[:1]))))
    moments, rows = tx.init(params), np.random.default_rng(0)
    for number in range(config.classifier_steps):
        own = rows.choice(len(clips), min(64, len(clips)), replace=False)
        params, moments = step(
            jax.random.key(number), params, moments, jnp.asarray(clips[own]), jnp.asarray(digits[own])
        )
    return jax.jit(lambda audio: logits(params, audio).argmax(axis=-1))


def measure(
    of: Callable[[int, int], tuple[Array, Array]], classify: Callable[[Array], Array], digits: np.ndarray, rate: int
) -> dict[str, float]:
    """Means over test clips, of digits [N]; `of` gives originals and outputs [B, samples]."""
    each: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(digits), MEASURED_AT_ONCE):
        originals, outputs = of(first, first + MEASURED_AT_ONCE)
        inside = sample_mask(originals)
        outputs = jnp.where(inside, jnp.clip(outputs, -1, 1), 0)
        own: dict[str, ArrayLike] = {
            "mel_distance": reconstruction.mel_distance(originals, outputs, rate, mask=inside),
            "si_sdr": reconstruction.si_sdr(originals, outputs, mask=inside),
            "right": classify(outputs) == digits[first : first + len(outputs)],
            "right_before": classify(originals) == digits[first : first + len(outputs)],
        }
        for name, package in (("stoi", reconstruction.stoi), ("pesq", reconstruction.pesq)):
            try:
                own[name] = package(originals, outputs, rate, mask=inside)
            except ImportError:
                continue
        for name, values in own.items():
            each.setdefault(name, []).append(np.asarray(values, np.float64))
    means = {name: float(np.nanmean(np.concatenate(values))) for name, values in each.items()}
    for name in ("stoi", "pesq"):
        if name in each:
            means[f"{name}_clips"] = float(np.mean(~np.isnan(np.concatenate(each[name]))))
    right, before = means.pop("right"), means.pop("right_before")
    return means | {"kept_accuracy": right / before if before else float("nan"), "classifier_accuracy": right}


def figures(shown: Mapping[str, np.ndarray], rate: int) -> dict[str, "Figure"]:
    """Spectrograms of originals and of what each row made of them, clips [examples, samples]."""
    inside = np.asarray(sample_mask(jnp.asarray(shown["original"])))  # what comes after a clip means nothing
    rows = {name: np.asarray(spectrograms(jnp.asarray(audio * inside), rate)) for name, audio in shown.items()}
    heard = rows["original"][rows["original"] > rows["original"].min()]  # silence lies far below
    low, high = np.quantile(heard, (0.1, 1.0)) if heard.size else (0.0, 1.0)
    pictures = {name: np.clip((row - low) / (high - low), 0, 1).swapaxes(1, 2)[:, ::-1] for name, row in rows.items()}
    return {
        "Log-mel spectrograms of test clips, and what each quantizer leaves of them (first seed); time to the right": (
            report.image_rows(pictures)
        )
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns what is in metrics.json."""
    config = parse_command(preset, data=("fsdd",), argv=argv, description=__doc__ or "")
    if missing := [name for name in ("pystoi", "pesq") if importlib.util.find_spec(name) is None]:
        print(f'{", ".join(missing)} missing, and what they measure is left out: pip install -e ".[audio]"\n')
    return run(config, "simvq_audio", material_of(config))


if __name__ == "__main__":
    run_command(main)
