"""Methods of the blog Scientific Spaces (科学空间) for Keras 3."""

from blogkeras.adversarial import (
    FGM,
    FGSM,
    PGD,
    AdversarialMethod,
    FreeLB,
    GradientPenalty,
    NoiseStability,
    Robustness,
    VirtualAdversarialTraining,
    adversarial_training,
    evaluate_robustness,
    plain_training,
    virtual_adversarial_training,
)
from blogkeras.ops import straight_through

__version__ = "0.1.0"

__all__ = [
    "FGM",
    "FGSM",
    "PGD",
    "AdversarialMethod",
    "FreeLB",
    "GradientPenalty",
    "NoiseStability",
    "Robustness",
    "VirtualAdversarialTraining",
    "adversarial_training",
    "evaluate_robustness",
    "plain_training",
    "straight_through",
    "virtual_adversarial_training",
]
