"""BERT-of-Theseus (post 7575): compression by replacing modules."""

from blogkeras.compression import CompressionReport, compression_report
from blogkeras.graph import Segment, cut_model, keep_blocks, spaced_blocks
from blogkeras.theseus.bert import bert_of_theseus
from blogkeras.theseus.depths import compare_depths
from blogkeras.theseus.distillation import Distillation
from blogkeras.theseus.model import Theseus
from blogkeras.theseus.replacement import ModuleReplacement
from blogkeras.theseus.schedules import CosineReplacement, LinearReplacement

__all__ = [
    "CompressionReport",
    "CosineReplacement",
    "Distillation",
    "LinearReplacement",
    "ModuleReplacement",
    "Segment",
    "Theseus",
    "bert_of_theseus",
    "compare_depths",
    "compression_report",
    "cut_model",
    "keep_blocks",
    "spaced_blocks",
]
