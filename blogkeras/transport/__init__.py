"""EMD, WMD and WRD between sequences of vectors (post 7388).

从EMD、WMD到WRD：文本向量序列的相似度计算, https://kexue.fm/archives/7388
"""

from blogkeras.transport.alignment import plot_alignment
from blogkeras.transport.classifier import TransportClassifier
from blogkeras.transport.distances import (
    relaxed_wasserstein_distances,
    transport_plan,
    wasserstein_distance,
    word_centroid_distance,
    word_mover_distance,
    word_rotator_bound,
    word_rotator_distance,
    word_rotator_similarity,
)
from blogkeras.transport.entropic import SinkhornSolution, sinkhorn
from blogkeras.transport.index import SearchResult, TransportIndex
from blogkeras.transport.layers import WordMoverDistance, WordRotatorDistance
from blogkeras.transport.pairwise import pairwise_distances
from blogkeras.transport.weighting import (
    all_but_the_top,
    common_components,
    inverse_document_frequency,
    remove_components,
    sif_weights,
    usif_weights,
)

__all__ = [
    "SinkhornSolution",
    "SearchResult",
    "TransportClassifier",
    "TransportIndex",
    "WordMoverDistance",
    "WordRotatorDistance",
    "all_but_the_top",
    "common_components",
    "inverse_document_frequency",
    "pairwise_distances",
    "plot_alignment",
    "relaxed_wasserstein_distances",
    "remove_components",
    "sif_weights",
    "sinkhorn",
    "transport_plan",
    "usif_weights",
    "wasserstein_distance",
    "word_centroid_distance",
    "word_mover_distance",
    "word_rotator_bound",
    "word_rotator_distance",
    "word_rotator_similarity",
]
