"""From the denoising autoencoder to generative models.

The best denoiser of Gaussian noise is y + σ²∇log p̂(y), with p̂ the density of
the noisy data: denoising is learning a density.

https://kexue.fm/archives/7038
"""

from blogkeras.denoising import toy_densities
from blogkeras.denoising.annealed import AnnealedScoreMatching
from blogkeras.denoising.chains import Samples
from blogkeras.denoising.energy import (
    QuadraticHead,
    mlp_log_density,
    residual_log_density,
)
from blogkeras.denoising.estimator import (
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
)
from blogkeras.denoising.generator import DenoisingGenerator
from blogkeras.denoising.partition import LogPartition, log_partition
from blogkeras.denoising.samplers import (
    annealed_langevin,
    hmc,
    langevin,
    mala,
)

__all__ = [
    "AnnealedScoreMatching",
    "DenoisingAutoencoder",
    "DenoisingDensityEstimator",
    "DenoisingGenerator",
    "LogPartition",
    "QuadraticHead",
    "Samples",
    "annealed_langevin",
    "hmc",
    "langevin",
    "log_partition",
    "mala",
    "mlp_log_density",
    "residual_log_density",
    "toy_densities",
]
