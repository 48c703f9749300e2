"""ALBERT and ELECTRA: https://kexue.fm/archives/7846"""

from blogkeras.pretraining.electra import ElectraPretrainer
from blogkeras.pretraining.masking import TokenMasking

__all__ = ["ElectraPretrainer", "TokenMasking"]
