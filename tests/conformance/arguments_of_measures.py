"""Arguments of HSIC and of transport."""

import numpy as np
from keras import layers
from wrong_values import (
    FREE,
    INF,
    NAN,
    VECTORS,
    Kind,
    X,
    Y,
    boolean,
    choice,
    integer,
    kernel,
    layer,
    number,
    row,
    seed,
    sequential,
    verbose,
)

import blogkeras

ESTIMATOR = choice()
MASK = Kind("mask", np.ones(3, bool), none=True)
DATA = {"x": X, "y": Y}
DATA_KINDS = {
    "x": Kind("text", np.array(3.0), np.full((8, 2), NAN)),
    "y": Kind("text", np.array(3.0), Y[:5], np.full((8, 2), NAN)),
    "kernel_x": kernel(),
    "kernel_y": kernel(),
}
for function in (blogkeras.hsic, blogkeras.cka):
    row(function, DATA, {**DATA_KINDS, "estimator": ESTIMATOR, "mask": MASK})
row(
    blogkeras.nhsic,
    DATA,
    {**DATA_KINDS, "epsilon": number(above=0), "mask": MASK},
)
row(
    blogkeras.block_hsic,
    {**DATA, "block_size": 4},
    {**DATA_KINDS, "block_size": integer(2), "estimator": ESTIMATOR},
)
row(
    blogkeras.fourier_hsic,
    DATA,
    {**DATA_KINDS, "num_features": integer(1), "seed": seed()},
)
row(
    blogkeras.hsic_test,
    {**DATA, "num_permutations": 3},
    {
        **DATA_KINDS,
        "null": choice(),
        "num_permutations": integer(1),
        "approximation": choice(none=True),
        "size": integer(1, none=True),
        "seed": seed(),
        "verbose": verbose(),
    },
)
LISTS = {
    "variables": Kind(
        X, [X], 3, "text", [X, Y[:5]], [X, np.full((8, 2), NAN)], [X, 3.0]
    ),
    "kernels": Kind(
        "gaussian", 3, [None], [None, 3], blogkeras.LinearKernel(), none=True
    ),
}
row(blogkeras.dhsic, {"variables": [X, Y]}, {**LISTS, "mask": MASK})
row(
    blogkeras.dhsic_test,
    {"variables": [X, Y], "num_permutations": 3},
    {
        **LISTS,
        "num_permutations": integer(1),
        "seed": seed(),
        "verbose": verbose(),
    },
)
row(
    blogkeras.HSICLasso,
    {"seed": 0},
    {
        "n_features_to_select": Kind(
            0, 9, 1.5, -0.5, True, "4", NAN, [2], none=True, hint="int | float"
        ),
        "target": choice(),
        "kernel_x": kernel(),
        "kernel_y": kernel(),
        "block_size": integer(2, none=True),
        "num_shuffles": integer(1),
        "seed": seed(),
        "verbose": verbose(),
    },
    lambda result: result.fit(X, Y[:, 0]),
)
row(
    blogkeras.kci_test,
    {**DATA, "z": X[:, :1]},
    {
        **DATA_KINDS,
        "z": DATA_KINDS["y"],
        "kernel_z": kernel(),
        "null": choice(),
        "epsilon": number(above=0),
        "num_draws": integer(1),
        "seed": seed(),
    },
)
GRAM = X @ X.T
row(
    blogkeras.hsic_from_kernels,
    {"kernel_x": GRAM, "kernel_y": GRAM},
    {
        "kernel_x": Kind("text", GRAM[:3], GRAM[:3, :3], 1.0),
        "kernel_y": Kind("text", GRAM[:3], GRAM[:3, :3], 1.0),
        "estimator": ESTIMATOR,
        "mask": MASK,
    },
)
row(
    blogkeras.median_bandwidth,
    {"x": X},
    {"x": Kind("text", np.full((3, 2), NAN)), "mask": MASK},
)
row(
    blogkeras.compare_layers,
    {"model_a": sequential, "model_b": sequential, "data": X},
    {
        "model_a": layer(),
        "model_b": layer(),
        "data": FREE,
        "kernel": kernel(),
        "batch_size": integer(1),
        "path": FREE,
        "verbose": verbose(),
    },
)
for cls in (blogkeras.CosineKernel, blogkeras.DeltaKernel):
    row(cls, {}, {})
for cls in (blogkeras.LinearKernel, blogkeras.PrecomputedKernel):
    row(cls, {}, {})
BANDWIDTH = number(above=0, none=True)
row(
    blogkeras.GaussianKernel,
    {"form": "blog"},
    {"bandwidth": BANDWIDTH, "form": choice(), "per_dimension": boolean()},
)
row(blogkeras.LaplacianKernel, {}, {"bandwidth": BANDWIDTH})
row(
    blogkeras.PolynomialKernel,
    {},
    {"degree": integer(1), "scale": number(above=0), "offset": number(0)},
)
row(
    blogkeras.HSICLoss,
    {},
    {
        "kernel_true": kernel(),
        "kernel_pred": kernel(),
        "estimator": ESTIMATOR,
        "maximize": boolean(),
        "name": FREE,
        "dtype": FREE,
    },
)
row(
    blogkeras.CKA,
    {},
    {
        "kernel_true": kernel(),
        "kernel_pred": kernel(),
        "name": FREE,
        "dtype": FREE,
    },
)
row(
    blogkeras.HSICRegularization,
    {"rate": 0.1},
    {
        "rate": number(),
        "kernel_x": kernel(),
        "kernel_y": kernel(),
        "estimator": ESTIMATOR,
        "kwargs": FREE,
    },
    lambda result: result([X, Y]),
)
row(
    blogkeras.HSICBottleneck,
    {"layers": lambda: [layers.Dense(3)], "num_classes": 3},
    {
        "layers": Kind("dense", [], ["dense"], [3], 3),
        "num_classes": integer(2),
        "readout": Kind("bogus", 3, True),
        "bandwidth": number(above=0),
        "label_weight": number(0),
        "epsilon": number(above=0),
        "kwargs": FREE,
    },
)
COST, WEIGHTS, SOLVER = choice(), choice(), choice()
SETTINGS = {
    "solver": SOLVER,
    "regularization": number(above=0, none=True),
    "tolerance": number(above=0),
}
WORDS = {
    "x": Kind("text", np.ones(3), np.full((3, 4), NAN)),
    "y": Kind("text", np.ones(3), np.full((3, 4), NAN), np.ones((3, 5))),
    "mask": FREE,
}
# The weights of the rows are not "importance".
IMPORTANCE = Kind(3, (None, None), (np.ones(4), np.ones(2)), none=True)
WORD_OPTIONS = {"cost": COST, "weights": WEIGHTS, "importance": IMPORTANCE}
P = np.full(3, 1 / 3)
D = np.abs(np.random.default_rng(1).normal(size=(3, 3)))
PROBLEM = {
    "p": Kind("text", P[:2], 2 * P, -P, np.full(3, NAN)),
    "q": Kind("text", P[:2], 2 * P, -P, np.full(3, NAN)),
    "D": Kind("text", D[:2], np.full((3, 3), NAN), np.full((3, 3), INF)),
}
BOTH = {"x": VECTORS, "y": VECTORS[:2]}
BATCH = np.stack([VECTORS[:2], VECTORS[1:3]])
PROBLEMS = {
    "unbalanced": number(above=0, none=True),
    "partial": number(above=0, maximum=1, none=True),
    "debiased": boolean(),
}
for function in (
    blogkeras.word_mover_distance,
    blogkeras.word_rotator_distance,
):
    row(function, BOTH, {**WORDS, **WORD_OPTIONS, **SETTINGS, **PROBLEMS})
row(
    blogkeras.pairwise_distances,
    {"x": BATCH},
    {
        "x": Kind("text", 3, [], np.ones(3), [np.ones(3)]),
        "y": Kind("text", 3, [], np.ones((2, 3, 5)), none=True),
        "mask": Kind(True, 3, (None,), none=True),
        **WORD_OPTIONS,
        **SETTINGS,
        **PROBLEMS,
        "verbose": verbose(),
    },
)
row(blogkeras.word_rotator_similarity, BOTH, {**WORDS, "options": FREE})
row(blogkeras.word_rotator_bound, BOTH, WORDS)
row(blogkeras.word_centroid_distance, BOTH, {**WORDS, **WORD_OPTIONS})
row(
    blogkeras.transport_plan,
    BOTH,
    {
        **WORDS,
        **WORD_OPTIONS,
        "solver": SOLVER,
        "unbalanced": number(above=0, none=True),
        "partial": number(above=0, maximum=1, none=True),
    },
)
PQD = {"p": P, "q": P, "D": D}
row(
    blogkeras.wasserstein_distance,
    PQD,
    {
        **PROBLEM,
        **SETTINGS,
        "unbalanced": number(above=0, none=True),
        "partial": number(above=0, maximum=1, none=True),
        "own_costs": Kind(3, "cost", [D], (D, D), none=True),
    },
)
row(blogkeras.relaxed_wasserstein_distances, PQD, PROBLEM)
row(
    blogkeras.sinkhorn,
    PQD,
    {
        **PROBLEM,
        "regularization": number(above=0, none=True),
        "tolerance": number(above=0),
        "max_iterations": integer(1),
    },
)
for cls in (blogkeras.WordMoverDistance, blogkeras.WordRotatorDistance):
    row(
        cls,
        {},
        {
            "cost": COST,
            "weighting": choice(),
            **SETTINGS,
            "pairwise": boolean(),
            **PROBLEMS,
            "kwargs": FREE,
        },
    )
row(
    blogkeras.TransportIndex,
    {"documents": [[0, 1], [2]], "vectors": VECTORS, "verbose": 0},
    {
        "documents": Kind("text", 3, [], [[0.0, 1.5]], [[True, False]], [[9]]),
        "vectors": Kind("text", np.ones(3), np.full((3, 4), NAN), none=True),
        "cost": COST,
        "weights": WEIGHTS,
        "verbose": verbose(),
    },
)

row(
    blogkeras.TransportClassifier,
    {"vectors": VECTORS},
    {
        "k": integer(1),
        "vectors": Kind("text", np.ones(3), np.full((3, 4), NAN)),
        "cost": COST,
        "weights": WEIGHTS,
        "voting": choice(),
        "verbose": verbose(),
    },
    use=lambda classifier: classifier.fit([[0, 1], [2]], [0, 1]),
)
COMPONENTS = integer(0)
for function in (blogkeras.all_but_the_top, blogkeras.common_components):
    row(
        function,
        {"vectors": X, "num_components": 1},
        {
            "vectors": Kind("text", np.ones(3), np.full((3, 4), NAN)),
            "num_components": COMPONENTS,
        },
    )
row(
    blogkeras.remove_components,
    {"vectors": X, "components": X[:1]},
    {
        "vectors": Kind("text", np.full((3, 3), NAN)),
        "components": Kind("text", np.ones((1, 2))),
        "shares": FREE,
    },
)
SHARES = Kind("text", np.array([-1.0, 2.0]), np.array([NAN, 1.0]))
row(
    blogkeras.sif_weights,
    {"probabilities": P},
    {"probabilities": SHARES, "a": number(above=0)},
)
row(
    blogkeras.usif_weights,
    {"probabilities": np.array([0.9, *[0.1 / 99] * 99])},
    {"probabilities": SHARES, "sentence_length": number(above=0)},
)
row(
    blogkeras.inverse_document_frequency,
    {"documents": [[0, 1], [2]], "num_words": 3},
    {
        "documents": Kind("text", 3, [[0.5]], [[9]], [[-1]]),
        "num_words": integer(1),
    },
)
row(
    blogkeras.plot_alignment,
    {"plan": D, "x_words": "abc", "y_words": "def"},
    {
        "plan": Kind("text", D[:2], np.ones(3)),
        "x_words": Kind("ab", 3),
        "y_words": Kind("ab", 3),
        "path": FREE,
        "minimum": number(0),
    },
)
