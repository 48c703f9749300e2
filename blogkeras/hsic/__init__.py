"""HSIC (post 6910): the statistic, a test, losses and a training scheme."""

from blogkeras.hsic.bottleneck import HSICBottleneck
from blogkeras.hsic.conditional import kci_test
from blogkeras.hsic.distance_kernels import GaussianKernel, LaplacianKernel
from blogkeras.hsic.fourier import fourier_hsic
from blogkeras.hsic.independence_test import HSICTest, hsic_test
from blogkeras.hsic.joint import dhsic, dhsic_test
from blogkeras.hsic.kernels import (
    CosineKernel,
    DeltaKernel,
    LinearKernel,
    PolynomialKernel,
    PrecomputedKernel,
)
from blogkeras.hsic.lasso import HSICLasso
from blogkeras.hsic.layers import (
    CKA,
    HSICLoss,
    HSICRegularization,
)
from blogkeras.hsic.samples import median_bandwidth
from blogkeras.hsic.similarity import LayerSimilarity, compare_layers
from blogkeras.hsic.statistic import (
    block_hsic,
    cka,
    hsic,
    hsic_from_kernels,
    nhsic,
)

__all__ = [
    "CKA",
    "CosineKernel",
    "DeltaKernel",
    "GaussianKernel",
    "HSICBottleneck",
    "HSICLasso",
    "HSICLoss",
    "HSICRegularization",
    "HSICTest",
    "LaplacianKernel",
    "LayerSimilarity",
    "LinearKernel",
    "PolynomialKernel",
    "PrecomputedKernel",
    "block_hsic",
    "cka",
    "compare_layers",
    "dhsic",
    "dhsic_test",
    "fourier_hsic",
    "hsic",
    "hsic_from_kernels",
    "hsic_test",
    "kci_test",
    "median_bandwidth",
    "nhsic",
]
