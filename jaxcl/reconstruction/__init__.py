"""Losses and metrics that compare what was reconstructed with the original, or what networks make of the two."""

from jaxcl.reconstruction.audio import (
    frame_mask,
    log_mel,
    mel_distance,
    mel_filterbank,
    multi_scale_mel_loss,
    multi_scale_stft_loss,
    pesq,
    si_sdr,
    stft_magnitudes,
    stoi,
)
from jaxcl.reconstruction.frechet import FeatureStatistics, feature_statistics, frechet_distance, merge_statistics
from jaxcl.reconstruction.images import psnr, ssim
from jaxcl.reconstruction.learned import (
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    perceptual_loss,
)

__all__ = [
    "FeatureStatistics",
    "adaptive_weight",
    "discriminator_hinge_loss",
    "feature_statistics",
    "frame_mask",
    "frechet_distance",
    "generator_hinge_loss",
    "log_mel",
    "mel_distance",
    "mel_filterbank",
    "merge_statistics",
    "multi_scale_mel_loss",
    "multi_scale_stft_loss",
    "perceptual_loss",
    "pesq",
    "psnr",
    "si_sdr",
    "ssim",
    "stft_magnitudes",
    "stoi",
]
