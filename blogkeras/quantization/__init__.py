"""VQ-VAE (post 6760): vectors and pictures to codes, and back."""

from blogkeras.quantization.autoencoders import (
    blog_autoencoder,
    sonnet_autoencoder,
)
from blogkeras.quantization.code_usage import CodebookUsage, perplexity, usage
from blogkeras.quantization.codebook import VectorQuantizer
from blogkeras.quantization.grouped import GroupedQuantizer
from blogkeras.quantization.lookup_free import LookupFreeQuantizer
from blogkeras.quantization.nearest import nearest_codes
from blogkeras.quantization.prior import CodePrior
from blogkeras.quantization.residual import ResidualVectorQuantizer
from blogkeras.quantization.residual_scalar import (
    ResidualFiniteScalarQuantizer,
)
from blogkeras.quantization.scalar import FiniteScalarQuantizer
from blogkeras.quantization.vqvae import VQVAE

__all__ = [
    "VQVAE",
    "CodePrior",
    "CodebookUsage",
    "FiniteScalarQuantizer",
    "GroupedQuantizer",
    "LookupFreeQuantizer",
    "ResidualFiniteScalarQuantizer",
    "ResidualVectorQuantizer",
    "VectorQuantizer",
    "blog_autoencoder",
    "nearest_codes",
    "perplexity",
    "sonnet_autoencoder",
    "usage",
]
