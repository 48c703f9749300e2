"""From the denoising autoencoder to generative models.

The best denoiser of Gaussian noise is y + σ²∇log p̂(y), with p̂ the density of
the noisy data: denoising is learning a density.

https://kexue.fm/archives/7038
"""

from blogkeras.denoising.energy import (
    QuadraticHead,
    mlp_log_density,
    residual_log_density,
)
from blogkeras.denoising.estimator import (
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
)
from blogkeras.denoising.samplers import (
    Samples,
    annealed_langevin,
    hmc,
    langevin,
    mala,
)

__all__ = [
    "DenoisingAutoencoder",
    "DenoisingDensityEstimator",
    "QuadraticHead",
    "Samples",
    "annealed_langevin",
    "hmc",
    "langevin",
    "mala",
    "mlp_log_density",
    "residual_log_density",
]
