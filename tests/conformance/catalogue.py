"""Every public class by its kind, with arguments and data to try it on.

`test_conformance.py` checks layers, losses and metrics and that no public class
is missing, `test_matrix.py` models and methods, `test_kinds.py` what else there
is; `test_golden_files.py` loads what an earlier version has saved.
"""

import keras
import numpy as np
import toy
import train_steps
from kit import JAX
from train_steps import dense

import blogkeras


def network():
    layers = [dense(name=name) for name in ("first", "middle", "last")]
    return keras.Sequential([keras.Input((3,)), *layers])


# (class, constructor arguments, input array or list of them)
LAYERS = [
    (blogkeras.QuadraticHead, {}, toy.DENSE[:8]),
    (
        blogkeras.TokenMasking,
        {
            "vocabulary_size": toy.VOCABULARY,
            "mask_token": 1,
            "special_tokens": [2, 3],
            "rate": 0.3,
            "unit": "ngram",
            "seed": 0,
        },
        toy.TOKENS[:8],
    ),
    (
        blogkeras.FiniteScalarQuantizer,
        {"levels": [3, 4, 5], "activation": "sigmoid"},
        toy.DENSE[:8],
    ),
    (
        blogkeras.ResidualFiniteScalarQuantizer,
        {
            "num_quantizers": 2,
            "levels": [2, 4, 5],
            "symmetric": True,
            "noise_rate": 0.5,
            "quantizer_dropout": 0.5,
        },
        toy.DENSE[:24].reshape(4, 6, 3),
    ),
    (
        blogkeras.LookupFreeQuantizer,
        {"num_bits": 3, "spherical": True, "temperature": 0.5},
        toy.DENSE[:24].reshape(4, 6, 3),
    ),
    (
        blogkeras.GroupedQuantizer,
        {
            "quantizer": blogkeras.VectorQuantizer(4, gradient="rotation"),
            "groups": 3,
        },
        toy.DENSE[:24].reshape(4, 6, 3),
    ),
    (
        blogkeras.ResidualVectorQuantizer,
        {
            "num_quantizers": 2,
            "num_codes": [4, 5],
            "ema_decay": 0.9,
            "metric": "cosine",
            "codebook_dim": 2,
            "quantizer_dropout": 0.5,
        },
        toy.DENSE[:24].reshape(4, 6, 3),
    ),
    (
        blogkeras.VectorQuantizer,
        {"num_codes": 5, "ema_decay": 0.9, "restart_threshold": 0.1},
        toy.DENSE[:24].reshape(4, 6, 3),
    ),
    (
        blogkeras.HSICRegularization,
        {"rate": 0.5, "kernel_y": blogkeras.LinearKernel()},
        [toy.DENSE[:8], toy.TARGETS[:8]],
    ),
    (
        blogkeras.ModuleReplacement,
        {"predecessor": [dense(4), dense(3, 4)], "successor": dense()},
        toy.DENSE[:8],
    ),
    (
        blogkeras.Segment,
        {"cut": blogkeras.cut_model(network(), "middle")[0].cut, "index": 1},
        toy.DENSE[:8],
    ),
    (
        blogkeras.WordMoverDistance,
        {"regularization": 0.05, "pairwise": True},
        [toy.DENSE[:12].reshape(4, 3, 3), toy.DENSE[12:20].reshape(4, 2, 3)],
    ),
    (
        blogkeras.WordRotatorDistance,
        {"weighting": "importance", "tolerance": 0.01},
        [
            toy.DENSE[:12].reshape(4, 3, 3),
            toy.DENSE[12:20].reshape(4, 2, 3),
            toy.WEIGHTS[:12].reshape(4, 3),
            toy.WEIGHTS[12:20].reshape(4, 2),
        ],
    ),
]
# (class, constructor arguments, y_true, y_pred)
LOSSES = [
    (blogkeras.HSICLoss, {}, toy.DENSE[:8], toy.DENSE[8:16]),
]
# (class, constructor arguments, y_true, y_pred)
METRICS = [
    (blogkeras.CKA, {}, toy.DENSE[:8], toy.DENSE[8:16]),
]
# (function that builds and compiles a model, x, y)
MODELS = [*train_steps.MODELS.values()]
# (class, constructor arguments)
KERNELS = [
    (blogkeras.GaussianKernel, {"bandwidth": 2.0, "form": "blog"}),
    (blogkeras.LaplacianKernel, {"bandwidth": 0.5}),
    (blogkeras.LinearKernel, {}),
    (blogkeras.PolynomialKernel, {"degree": 3, "offset": 0.5}),
    (blogkeras.CosineKernel, {}),
    (blogkeras.DeltaKernel, {}),
    (blogkeras.PrecomputedKernel, {}),
]
# (class, constructor arguments): methods of `adversarial_training`
METHODS = [
    (blogkeras.FGM, {"epsilon": 0.3, "clean_weight": 0.5}),
    (blogkeras.FGSM, {"epsilon": 0.1}),
    (blogkeras.PGD, {"epsilon": 0.3, "steps": 2}),
    (blogkeras.FreeLB, {"epsilon": 0.3, "steps": 2}),
    (blogkeras.GradientPenalty, {"epsilon": 0.3}),
    (blogkeras.NoiseStability, {"epsilon": 0.3}),
    (blogkeras.VirtualAdversarialTraining, {"epsilon": 0.3, "iters": 1}),
    (blogkeras.TRADES, {"epsilon": 0.3, "steps": 1}),
    (blogkeras.SMART, {"epsilon": 0.3, "weight": 2.0}),
    (blogkeras.RDrop, {"epsilon": 0.3}),
    (blogkeras.AdversarialWeightPerturbation, {"epsilon": 0.3}),
]
# (class, constructor arguments), functions of the step with values in [0, 1]
SCHEDULES = [
    (blogkeras.LinearReplacement, {"slope": 0.01, "start": 0.2}),
    (blogkeras.CosineReplacement, {"steps": 50, "start": 0.2}),
]
# (class, constructor arguments, function that makes a model it applies to)
CALLBACKS = [
    (
        blogkeras.CodebookUsage,
        {},
        lambda: compiled(blogkeras.VectorQuantizer(5, ema_decay=0.9)),
    ),
]
# (class, function that makes one around an optimizer)
OPTIMIZERS = [(blogkeras.SkipNonFinite, blogkeras.SkipNonFinite)]
# (class, function that makes one, function of the path that saves it, loads it)
FILES = [
    (
        blogkeras.TransportIndex,
        lambda: blogkeras.TransportIndex(
            [[0, 1], [2], [1, 2]], toy.DENSE[:3], verbose=0
        ),
    ),
]
# (class, constructor arguments, function that makes what it is fitted to)
ESTIMATORS = [
    (
        blogkeras.TransportClassifier,
        {"k": 2, "vectors": None, "voting": "distance"},
        lambda: ([toy.DENSE[:2], toy.DENSE[2:3], toy.DENSE[3:5]], [1, 0, 1]),
    ),
    (
        blogkeras.HSICLasso,
        {"n_features_to_select": 2, "target": "classification"},
        lambda: (toy.DENSE[:8], [1, 0, 1, 1, 0, 2, 0, 2]),
    ),
]
# (class, function that makes one): what functions return
RECORDS = [
    (blogkeras.NVAEConfig, lambda: blogkeras.NVAEConfig((4, 4, 1))),
    (
        blogkeras.Robustness,
        lambda: blogkeras.evaluate_robustness(
            compiled(keras.layers.Dense(3)),
            toy.DENSE[:8],
            toy.DENSE[:8],
            epsilons=[0.0, 0.1],
            verbose=0,
        ),
    ),
    (
        blogkeras.CompressionReport,
        lambda: blogkeras.compression_report(
            {"large": classifier(), "small": classifier()},
            toy.DENSE[:8],
            toy.LABELS[:8],
            batch_size=4,
            rounds=1,
            verbose=0,
        ),
    ),
    (
        blogkeras.SearchResult,
        lambda: FILES[0][1]().search(np.array([0, 2]), k=1),
    ),
    (
        blogkeras.SinkhornSolution,
        lambda: blogkeras.sinkhorn([0.5, 0.5], [1.0], [[0.0], [1.0]]),
    ),
    (
        blogkeras.HSICTest,
        lambda: blogkeras.hsic_test(toy.DENSE[:8, 0], toy.DENSE[:8, 1]),
    ),
    (
        blogkeras.LayerSimilarity,
        lambda: blogkeras.compare_layers(
            classifier(), classifier(), toy.DENSE[:8]
        ),
    ),
    (
        blogkeras.Samples,
        lambda: blogkeras.langevin(standard_normal, toy.DENSE[:8], 2, 0.1),
    ),
    (
        blogkeras.LogPartition,
        lambda: blogkeras.log_partition(
            standard_normal, "quadrature", bounds=[(-8, 8)], num_points=65
        ),
    ),
]
# {layer: (trainable, non-trainable weights, losses, seeds)} after a call
COUNTS = {
    "GroupedQuantizer": (3, 6, 1, 0),
    "HSICRegularization": (0, 0, 1, 0),
    "LookupFreeQuantizer": (0, 2, 1, 0),
    "ModuleReplacement": (2, 6, 0, 0),
    "QuadraticHead": (6, 0, 0, 0),
    "ResidualFiniteScalarQuantizer": (0, 4, 0, 0),
    "ResidualVectorQuantizer": (8, 14, 1, 0),
    "TokenMasking": (0, 2, 0, 0),
    "VectorQuantizer": (0, 6, 1, 0),
    "WordMoverDistance": (0, 0, 0, 0),
    "WordRotatorDistance": (0, 0, 0, 0),
}
# What is newer than the newest golden files, `tests/data`.
NEW = {
    "GroupedQuantizer",
    "LookupFreeQuantizer",
    "ResidualFiniteScalarQuantizer",
}
# Base classes that are not used themselves.
ABSTRACT = [blogkeras.AdversarialMethod]

BY_KIND = [
    *(row[0] for row in KERNELS),
    *(row[0] for row in METHODS),
    *(row[0] for row in SCHEDULES),
    *(row[0] for row in CALLBACKS),
    *(row[0] for row in OPTIMIZERS),
    *(row[0] for row in FILES),
    *(row[0] for row in ESTIMATORS),
    *(row[0] for row in RECORDS),
    *ABSTRACT,
]


def standard_normal(x):
    return -keras.ops.sum(keras.ops.square(x), axis=-1) / 2


def compiled(layer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), layer])
    # Without `jit` each operation of a step is compiled alone on JAX.
    model.compile("sgd", "mse", jit_compile=JAX)
    return model


def classifier():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(3, activation="softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=JAX)
    return model
