"""SimVQ on images, beside the quantizers its paper compares with: who uses its codes, and what pictures look like.

Every row of the table is trained with the same encoder, decoder, steps and data order; only the quantizer differs.
Utilisation and perplexity are those of one pass over the training set; PSNR, SSIM and the Frechet distance (over
EfficientNet-Lite0's features, where JAXCL_DATA names the folder with its weights) those of the test set.

python -m experiments.simvq_image --data cifar10
python -m experiments.simvq_image --data folder:PATH --size 64 --network conv
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.card import Card
from experiments.common import parse_command, run_command
from experiments.images import NAMES, load_images
from experiments.tokenizers import Material, TokenizerConfig, run
from jaxcl import nets, reconstruction, report
from jaxcl.tokenizer import Adversary, Network
from jaxcl.typing import Array, PyTree, bad_argument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = {
    "--preset smoke": Card("30 s", "that it runs"),
    "--preset cpu": Card("1 min", "digits: SimVQ 26.7 dB, 71 % of 1,024 codes; FSQ 27.0 dB, 89 %; VQ 21.3 dB, 3.5 %"),
    "--preset cpu --data cifar10": Card(
        "53 min", "SimVQ: 99.95 % of 65,536 codes in use, 95 % of 262,144; VQ: 0.03 %, 5 dB less; EMA VQ best at 8,192"
    ),
    "--preset paper --data folder:PATH": Card("not measured; it takes an accelerator", "SimVQ: all codes used"),
}

CPU_ROWS = (
    *(f"{method}:8192" for method in ("vq", "ema_vq", "factorised_vq", "fsq", "lfq", "simvq")),
    "vq:65536", "simvq:65536", "simvq:262144",
)  # fmt: skip
MEASURED_AT_ONCE = 250  # images
SMALLEST_FOR_FEATURES = 32  # pixels: the network makes images so many times smaller


@dataclasses.dataclass(frozen=True)
class Config(TokenizerConfig):
    """Settings of the image experiment; the defaults shown are those of the preset."""

    data: str = "digits"
    """digits (of scikit-learn), mnist, cifar10 or cifar100 (in the folder that JAXCL_DATA names), tinyimagenet:PATH (as
    it is distributed), folder:PATH (images in PATH/train/CLASS and PATH/test/CLASS), or tfds:NAME."""
    size: int = 32
    """Height and width to which the images of a folder are brought."""
    network: Literal["patch", "conv"] = "patch"
    """Encoder and decoder: patch is made of matrix products, fast on CPU; conv are VQGAN's."""
    patch: int = 4
    """Pixels of a patch's side, or how much smaller the features of conv are: a power of two."""
    hidden: int = 256
    """Width of the patch network between its blocks, or twice conv's channels at full resolution."""
    blocks: int = 1
    """Blocks of the patch network, or of conv at each resolution."""
    perceptual_weight: float = 0.0
    """Of the perceptual loss over EfficientNet-Lite0's features; 0 leaves it out."""
    adversarial_start: int | None = None
    """The step from which on a discriminator is played against; None for none."""


def preset(name: Any, data: str) -> Config:
    """The settings of a preset."""
    kind = data.partition(":")[0]
    small = kind == "digits"
    config = Config(
        preset=name, data=data, out=Path("runs/simvq_image"), seeds=1, patch=2 if small else 4,
        hidden=64 if small else 128, rows=("vq:1024", "fsq:1024", "simvq:1024") if small else CPU_ROWS,
    )  # fmt: skip
    if small:
        # Patches of four pixels, many of them alike; chosen on validation (seed 0), where VQ too does better with it.
        config = dataclasses.replace(config, commitment_weight=3.0, basis_decay=0.0)
    if name == "smoke":
        return dataclasses.replace(config, rows=("vq:64", "simvq:64"), steps=20, limit=200, hidden=32, blocks=1)
    if name == "paper":
        # Zhu et al. 2025, section 5: 128 x 128 images made eight times smaller, codes of width 128, Adam at 1e-4, 50
        # epochs of ImageNet in batches of 256. Data sets of small images keep their size.
        if kind == "folder":
            config = dataclasses.replace(config, size=128, patch=8)
        return dataclasses.replace(
            config, network="conv", blocks=2, hidden=256, width=128, quantizer_rate=1.0, learning_rate=1e-4,
            commitment_weight=0.25, basis_decay=0.0, steps=250_000, batch_size=256,
            rows=tuple(f"{method}:{codes}" for codes in (1024, 8192, 65536, 262144) for method in ("vq", "simvq")),
            perceptual_weight=1.0, adversarial_start=50_000,
        )  # fmt: skip
    return config


def networks_of(config: Config, channels: int) -> tuple[Network, Network]:
    """Encoder and decoder of images with so many channels."""
    if config.network == "patch":
        return (
            nets.PatchEncoder(config.width, config.patch, config.hidden, config.blocks),
            nets.PatchDecoder(channels, config.patch, config.hidden, config.blocks),
        )
    halvings = config.patch.bit_length() - 1
    if config.patch != 2**halvings:
        raise bad_argument("patch", config.patch, "pass a power of two for --network conv")
    multipliers = tuple(min(2**halving, 4) for halving in range(halvings + 1))
    return (
        nets.ConvEncoder(config.width, config.hidden // 2, multipliers, config.blocks),
        nets.ConvDecoder(channels, config.hidden // 2, multipliers, config.blocks),
    )


def material_of(config: Config) -> Material:
    """What there is to code, as the configuration says."""
    split = load_images(config.data, size=config.size, validation=config.validation, limit=config.limit)
    top = 16.0 if config.data == "digits" else 255.0
    channels = split.train.inputs.shape[3] if len(split.train.inputs.shape) == 4 else 1
    encoder, decoder = networks_of(config, channels)

    @jax.jit
    def prepare(images: Array) -> Array:
        """From -1 to 1, with an axis of channels."""
        return (images[..., None] if images.ndim == 3 else images).astype(jnp.float32) * (2 / top) - 1

    def loss(outputs: Array, inputs: Array, mask: Array | None) -> Array:
        error = jnp.abs(outputs - inputs).mean(axis=(1, 2, 3))  # as VQGAN and SimVQ's authors have it
        if config.perceptual_weight == 0:
            return error
        return error + config.perceptual_weight * reconstruction.perceptual_loss(feature_maps(), outputs, inputs)

    return Material(
        split.train.inputs, split.test.inputs, None, prepare, encoder, decoder, loss, adversary_of(config),
        lambda of: measure(of, len(split.test.inputs)), figures,
    )  # fmt: skip


def adversary_of(config: Config) -> Adversary | None:
    """The discriminator, if there is to be one."""
    if config.adversarial_start is None:
        return None
    return Adversary(
        nets.PatchDiscriminator(), optax.adam(config.learning_rate / 2), lambda path: "output" in path,
        start=config.adversarial_start,
    )  # fmt: skip


@cache
def encoder_weights() -> PyTree | None:
    """The weights of EfficientNet-Lite0, or None where there is no folder of packs, or no safetensors to read them."""
    try:
        return nets.load_efficientnet_lite0()
    except (ImportError, ValueError):
        return None


def encoder_inputs(images: Array) -> Array:
    """Images from -1 to 1, [B, H, W, C], as EfficientNet-Lite0 takes them, at their own size."""
    colours = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    return (127.5 * (jnp.clip(colours, -1, 1) + 1) - 127) / 128


@cache
def features_of() -> Callable[[Array], Array] | None:
    """Features [B, 1280] of images [B, H, W, C] from -1 to 1, or None without weights."""
    weights = encoder_weights()
    if weights is None:
        return None
    net = nets.EfficientNetLite0()
    return jax.jit(lambda images: net.apply(weights, encoder_inputs(images), method="features"))


def feature_maps() -> Callable[[Array], Sequence[Array]]:
    """The outputs of EfficientNet-Lite0's blocks 0, 2, 4 and 10, [B, h, w, c], for the perceptual loss."""
    weights, wanted = encoder_weights(), [f"blocks_{number}" for number in (0, 2, 4, 10)]
    if weights is None:
        raise bad_argument(
            "perceptual_weight", "no weights of EfficientNet-Lite0",
            "set JAXCL_DATA to the folder that holds efficientnet_lite0.safetensors, or pass 0",
        )  # fmt: skip
    net = nets.EfficientNetLite0()

    def maps(images: Array) -> Sequence[Array]:
        _, inner = net.apply(
            weights, encoder_inputs(images), method="features",
            capture_intermediates=lambda module, _: module.name in wanted,
        )  # fmt: skip
        return [inner["intermediates"][name]["__call__"][0] for name in wanted]

    return maps


def measure(of: Callable[[int, int], tuple[Array, Array]], count: int) -> dict[str, float]:
    """PSNR (dB), SSIM and Frechet distance over `count` test images; `of` gives originals and outputs from -1 to 1."""
    features = features_of()
    psnr, ssim = [], []
    sums: list[reconstruction.FeatureStatistics | None] = [None, None]
    for first in range(0, count, MEASURED_AT_ONCE):
        originals, outputs = of(first, first + MEASURED_AT_ONCE)
        outputs = jnp.clip(outputs, -1, 1)
        psnr.append(np.asarray(reconstruction.psnr(outputs, originals, peak=2.0)))
        ssim.append(np.asarray(reconstruction.ssim(outputs, originals, peak=2.0)))
        if features is not None and min(originals.shape[1:3]) >= SMALLEST_FOR_FEATURES:
            for side, images in enumerate((originals, outputs)):
                own = reconstruction.feature_statistics(features(images))
                before = sums[side]
                sums[side] = own if before is None else reconstruction.merge_statistics(before, own)
    result = {"psnr": float(np.concatenate(psnr).mean()), "ssim": float(np.concatenate(ssim).mean())}
    if sums[0] is not None and sums[1] is not None:
        result["frechet"] = reconstruction.frechet_distance(sums[0], sums[1])
    return result


def figures(shown: Mapping[str, np.ndarray]) -> dict[str, "Figure"]:
    """Originals and what each row made of them, images [examples, H, W, C] from -1 to 1."""
    rows = {name: np.clip((images + 1) / 2, 0, 1) for name, images in shown.items()}
    return {"Test images, and what each quantizer leaves of them (first seed)": report.image_rows(rows)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment; returns what is in metrics.json."""
    config = parse_command(preset, data=NAMES, argv=argv, description=__doc__ or "")
    if config.perceptual_weight:
        feature_maps()  # so that missing weights are told at once
    return run(config, "simvq_image", material_of(config))


if __name__ == "__main__":
    run_command(main)
