"""ALBERT and ELECTRA: https://kexue.fm/archives/7846"""

from blogkeras.pretraining.blocks import token_blocks
from blogkeras.pretraining.electra import ElectraPretrainer
from blogkeras.pretraining.language_model import MaskedLanguageModel
from blogkeras.pretraining.masking import TokenMasking

__all__ = [
    "ElectraPretrainer",
    "MaskedLanguageModel",
    "TokenMasking",
    "token_blocks",
]
