"""The objectives of training, one file each; a new one is a file and a line here (docs/objectives.md)."""

from typing import Any

from latent_ae.objectives.alignment import Alignment
from latent_ae.objectives.alpha import Alpha
from latent_ae.objectives.bands import BandViews
from latent_ae.objectives.base import Objective
from latent_ae.objectives.channel_masking import ChannelMasking
from latent_ae.objectives.code_averages import CodeAverages
from latent_ae.objectives.code_entropy import CodeEntropy
from latent_ae.objectives.code_gradient import CodeGradient
from latent_ae.objectives.code_relaxation import CodeRelaxation
from latent_ae.objectives.codebook import Codebook
from latent_ae.objectives.convnext import ConvNeXtLoss
from latent_ae.objectives.density import DensityObjective
from latent_ae.objectives.dino import DinoLoss
from latent_ae.objectives.distillation import Distillation
from latent_ae.objectives.equivariance import Equivariance
from latent_ae.objectives.flow_matching import FlowMatching
from latent_ae.objectives.fsq import FSQ
from latent_ae.objectives.gan import GAN
from latent_ae.objectives.kl import KL
from latent_ae.objectives.latent_noise import LatentNoise
from latent_ae.objectives.reconstruction import Reconstruction
from latent_ae.objectives.semi_supervised import SemiSupervised
from latent_ae.objectives.spectral import Spectral
from latent_ae.objectives.total_correlation import TotalCorrelation
from latent_ae.objectives.unit_codes import UnitCodes

OBJECTIVES: tuple[type[Objective[Any]], ...] = (
    LatentNoise,
    ChannelMasking,
    Equivariance,
    FlowMatching,
    Reconstruction,
    Alpha,
    BandViews,
    ConvNeXtLoss,
    DinoLoss,
    CodeRelaxation,
    FSQ,
    CodeGradient,
    CodeAverages,
    Codebook,
    CodeEntropy,
    UnitCodes,
    KL,
    Spectral,
    Distillation,
    TotalCorrelation,
    SemiSupervised,
    DensityObjective,
    Alignment,
    GAN,
)
"""The objectives in the order in which they act: those that change latents come first, and reconstruction comes before
the objectives that are balanced against its gradient, with the other losses of the image right behind it. Codes are
averaged first, then dead ones restart, then all are normalised."""
