"""Eight methods of the blog Scientific Spaces (科学空间) for Keras 3."""

from blogkeras.adversarial import (
    FGM,
    AdversarialMethod,
    GradientPenalty,
    adversarial_training,
    plain_training,
)
from blogkeras.ops import straight_through

__version__ = "0.1.0"

__all__ = [
    "FGM",
    "AdversarialMethod",
    "GradientPenalty",
    "adversarial_training",
    "plain_training",
    "straight_through",
]
