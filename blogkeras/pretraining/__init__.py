"""ALBERT and ELECTRA (https://kexue.fm/archives/7846)."""

from blogkeras.pretraining.blocks import token_blocks
from blogkeras.pretraining.electra import ElectraPretrainer
from blogkeras.pretraining.language_model import MaskedLanguageModel
from blogkeras.pretraining.learning_rates import layerwise_optimizer
from blogkeras.pretraining.masking import TokenMasking
from blogkeras.pretraining.sharing import (
    factorize_embedding,
    share_layers,
    unshare_layers,
)

__all__ = [
    "ElectraPretrainer",
    "MaskedLanguageModel",
    "TokenMasking",
    "factorize_embedding",
    "layerwise_optimizer",
    "share_layers",
    "token_blocks",
    "unshare_layers",
]
