"""What holds for distances between texts and for transport problems."""

import dataclasses
import functools
import itertools

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from keras import ops
from property_table import holds_for
from strategies import (
    FLOATS,
    HALVES,
    INTEGERS,
    SEEDS,
    arrays,
    close,
    distributions,
    mask_of,
    number,
    refuses,
    stacks,
)

import blogkeras

DISTANCES = ("word_mover_distance", "word_rotator_distance")
BOUNDS = ("word_centroid_distance", "word_rotator_bound")
OF_TEXTS = (*DISTANCES, *BOUNDS, "word_rotator_similarity")
WITH_MASK = (*OF_TEXTS, "transport_plan")
COSTS = st.sampled_from(["euclidean", "cosine", "rms"])
WEIGHTS = st.sampled_from(["uniform", "norm"])
KINDS_OF_MASKS = ("all", "none", "ragged", "any")


@dataclasses.dataclass
class Pair:
    """Two texts with masks (or none), and the size of their vectors."""

    x: np.ndarray
    y: np.ndarray
    mask: tuple

    @property
    def scale(self):
        """The size of what a distance is rounded relative to."""
        sizes = [np.abs(a.astype("float64")).max(initial=0) for a in self]
        return 10 * max(1e-280, *sizes)

    def __iter__(self):
        return iter((self.x, self.y))


@st.composite
def pairs(draw, dtypes=("float64",), largest=1e30, masked=True, least=0):
    """Two texts of a few lengths, with vectors of one dimension."""
    dim = draw(st.sampled_from([3, 1, 8]))
    lengths = st.sampled_from([n for n in (3, 1, 5, 0) if n >= least])
    dtype = draw(st.sampled_from(dtypes))
    x, y = (
        draw(arrays((draw(lengths), dim), largest, (dtype,))) for _ in range(2)
    )
    mask = (None, None)
    if masked:
        mask = tuple(
            mask_of(draw(st.sampled_from(KINDS_OF_MASKS)), draw(SEEDS), (n,))
            if n and draw(st.booleans())
            else None
            for n in (len(x), len(y))
        )
    return Pair(x, y, mask)


def limit(function, scale):
    """Distances are rounded relative to the vectors; cosines to 1."""
    free_of_scale = function.__name__ in (
        "word_rotator_distance",
        "word_rotator_similarity",
        "word_rotator_bound",
        "transport_plan",
    )
    return 1.0 if free_of_scale else scale


@holds_for(*OF_TEXTS)
def is_one_finite_number(function, pair=pairs(dtypes=FLOATS + INTEGERS)):
    value = number(function(pair.x, pair.y, pair.mask))
    assert value.shape == ()
    if "similarity" in function.__name__:
        assert -1 - 1e-9 <= value <= 1 + 1e-9
    else:
        assert value >= 0
    if function.__name__ == "word_rotator_distance":
        assert value <= 2 + 1e-9


@holds_for(*OF_TEXTS)
def is_symmetric(function, pair=pairs()):
    there = function(pair.x, pair.y, pair.mask)
    back = function(pair.y, pair.x, pair.mask[::-1])
    close(there, back, 1e-9, limit(function, pair.scale))


@holds_for(*OF_TEXTS)
def order_of_words_has_no_influence(function, pair=pairs(), seed=SEEDS):
    order = np.random.default_rng(seed).permutation(len(pair.x))
    mask = [m if m is None else m[order] for m in pair.mask[:1]]
    close(
        function(pair.x[order], pair.y, (*mask, pair.mask[1])),
        function(pair.x, pair.y, pair.mask),
        1e-9,
        limit(function, pair.scale),
    )


@holds_for(*WITH_MASK)
def words_under_the_mask_have_no_influence(function, pair=pairs()):
    texts = [pair.x.copy(), pair.y.copy()]
    keep = []
    for text, mask in zip(texts, pair.mask, strict=True):
        mask = np.ones(len(text), bool) if mask is None else mask
        text[~mask] = np.nan
        keep.append(mask)
    value = number(function(*texts, pair.mask))
    within = limit(function, pair.scale)
    close(value, function(pair.x, pair.y, pair.mask), 0, within)
    if function.__name__ == "transport_plan":
        # The mass of a text without a word stands in the first place.
        assume(all(text[m].any() for text, m in zip(pair, keep, strict=True)))
        assert not value[~keep[0]].any()
        assert not value[:, ~keep[1]].any()
        value = value[keep[0]][:, keep[1]]
    expected = function(*(t[m] for t, m in zip(texts, keep, strict=True)))
    if function.__name__ == "transport_plan":
        # There may be several optimal plans: compare what each word sends.
        value, expected = value.sum(1), expected.sum(1)
    close(value, expected, 1e-9, within)


@holds_for(*WITH_MASK)
def a_mask_of_ones_is_none(function, pair=pairs(masked=False)):
    ones = tuple(np.ones(len(text), bool) for text in pair)
    value = function(pair.x, pair.y, ones)
    np.testing.assert_array_equal(value, function(pair.x, pair.y))


@holds_for(*WITH_MASK)
def dtypes_only_round(function, pair=pairs(dtypes=FLOATS + INTEGERS)):
    exact = function(*(t.astype("float64") for t in pair), pair.mask)
    np.testing.assert_array_equal(function(pair.x, pair.y, pair.mask), exact)
    tensors = (ops.convert_to_tensor(text) for text in pair)
    if pair.x.dtype != "float64":
        np.testing.assert_array_equal(function(*tensors, pair.mask), exact)


@holds_for(*WITH_MASK)
def pairs_of_a_batch_are_independent(
    function,
    x=stacks(3, (4, 3), dtypes=("float64",)),
    y=stacks(3, (2, 3), dtypes=("float64",)),
    seed=SEEDS,
):
    mask = tuple(mask_of("any", seed, t.shape[:-1]) for t in (x, y))
    together = number(function(x, y, mask))
    for k in range(3):
        alone = number(function(x[k], y[k], (mask[0][k], mask[1][k])))
        close(together[k], alone, 1e-12, 1 + np.abs(alone).max(initial=0))


@holds_for(*WITH_MASK)
def shapes_that_do_not_agree_are_refused(
    function, pair=pairs(masked=False, least=1), wrong=st.integers(0, 6)
):
    x, y = pair
    mask = None
    match wrong:
        case 0:
            y = y[:, :1].repeat(x.shape[1] + 1, axis=1)
        case 1:
            y = y[0]
        case 2:
            x, y = np.stack([x] * 2), np.stack([y] * 3)
        case 3:
            x, y = x[None], np.stack([y] * 2)
        case 4:
            mask = (np.ones(len(x) + 1, bool), None)
        case 5:
            mask = (None, np.ones((1, len(y)), bool))
        case 6:
            mask = (np.ones(1, bool), None)
            assume(len(x) > 1)
    with refuses():
        function(x, y, mask)


@holds_for(*DISTANCES, "word_rotator_similarity")
def equal_texts_have_distance_0(function, pair=pairs(), seed=SEEDS):
    order = np.random.default_rng(seed).permutation(len(pair.x))
    value = function(pair.x, pair.x[order])
    at = 1.0 if "similarity" in function.__name__ else 0.0
    close(value, np.float64(at), 1e-9, limit(function, pair.scale))


@holds_for("word_mover_distance")
def keeps_the_triangle_inequality(
    function, pair=pairs(masked=False, least=1), seed=SEEDS
):
    z = pair.y[:1] * np.random.default_rng(seed).normal()
    direct = function(pair.x, pair.y)
    by_z = function(pair.x, z) + function(z, pair.y)
    assert direct <= by_z + 1e-9 * pair.scale


@holds_for(*DISTANCES, *BOUNDS)
def follows_the_scale_of_the_vectors(
    function, pair=pairs(), exponent=st.integers(-20, 20)
):
    factor = 2.0**exponent
    value = function(pair.x * factor, pair.y * factor, pair.mask)
    expected = function(pair.x, pair.y, pair.mask)
    if limit(function, 0) != 1:
        expected = expected * factor
    close(value, expected, 1e-9, limit(function, pair.scale * factor))


@holds_for(*DISTANCES, cases=3, short=1, slow_on_jax=True)
def lies_between_its_bounds(
    function,
    x=stacks(3, (3, 3), 1e15),
    y=stacks(3, (2, 3), 1e15),
    cost=COSTS,
    weights=WEIGHTS,
    seed=SEEDS,
):
    mask = tuple(mask_of("any", seed + k, (3, 3 - k)) for k in range(2))
    options = {"mask": mask, "cost": cost, "weights": weights}
    exact = number(function(x, y, **options))
    scale = 1.0 if cost == "cosine" else 10 * largest_of(x, y)
    for solver in ("relaxed", "sinkhorn"):
        value = number(function(x, y, solver=solver, **options))
        assert value.shape == (3,)
        above = value - exact if solver == "sinkhorn" else exact - value
        assert np.all(above >= -1e-5 * scale), (solver, value, exact)
    center = number(blogkeras.word_centroid_distance(x, y, **options))
    assert np.all((0 <= center) & (center <= exact + 1e-9 * scale))


def largest_of(*texts):
    """The largest number of each pair of texts, `(pairs,)`."""
    sizes = [np.abs(text.astype("float64")).max((1, 2)) for text in texts]
    return np.maximum(*sizes)


@holds_for("word_centroid_distance", "word_rotator_bound")
def is_a_lower_bound(function, pair=pairs()):
    exact = {
        "word_centroid_distance": blogkeras.word_mover_distance,
        "word_rotator_bound": blogkeras.word_rotator_distance,
    }[function.__name__]
    bound = function(pair.x, pair.y, pair.mask)
    limit_of = exact(pair.x, pair.y, pair.mask)
    assert bound <= limit_of + 1e-9 * limit(function, pair.scale)


@holds_for("transport_plan")
def has_both_marginals(function, pair=pairs(), cost=COSTS, weights=WEIGHTS):
    plan = number(
        function(pair.x, pair.y, pair.mask, cost=cost, weights=weights)
    )
    assert plan.min() >= 0
    close(plan.sum(), np.float64(1), 1e-9)
    # A text alone is moved to one zero vector: the row sums are its masses.
    nothing = np.zeros((1, pair.x.shape[1]))
    alone = function(
        pair.x, nothing, (pair.mask[0], None), cost=cost, weights=weights
    )
    close(plan.sum(1), alone[:, 0], 1e-9)


@holds_for("transport_plan", cases=3, short=1)
def plan_of_sinkhorn_has_both_marginals(
    function, x=stacks(3, (3, 3), 1e15), y=stacks(3, (2, 3), 1e15)
):
    plan = number(function(x, y, solver="sinkhorn"))
    exact = function(x, y)
    assert plan.min() >= 0
    close(plan.sum(1), exact.sum(1), 1e-5)
    close(plan.sum(2), exact.sum(2), 1e-5)


@dataclasses.dataclass
class Problem:
    """A transport problem."""

    p: np.ndarray
    q: np.ndarray
    D: np.ndarray

    @property
    def scale(self):
        return max(1e-280, np.abs(self.D).max())

    def __iter__(self):
        return iter((self.p, self.q, self.D))


@st.composite
def problems(draw, largest=1e30):
    n, m = (draw(st.sampled_from([3, 1, 5])) for _ in range(2))
    return Problem(
        draw(distributions((n,))),
        draw(distributions((m,))),
        draw(arrays((n, m), largest, ("float64",))),
    )


@holds_for("wasserstein_distance")
def is_a_mean_of_costs(function, problem=problems()):
    value = number(function(*problem))
    assert value.shape == ()
    _, _, D = problem
    error = 1e-9 * problem.scale
    assert D.min() - error <= value <= D.max() + error
    p, q = problem.p, problem.q
    # Independent words are one of the plans.
    assert value <= p @ D @ q + error


@holds_for("wasserstein_distance")
def both_sides_may_be_exchanged(function, problem=problems()):
    turned = function(problem.q, problem.p, problem.D.T)
    close(turned, function(*problem), 1e-9, problem.scale)


@holds_for("wasserstein_distance")
def is_linear_in_the_costs(function, problem=problems(largest=1e6), seed=SEEDS):
    rng = np.random.default_rng(seed)
    factor, shift = np.exp(rng.normal()), rng.normal()
    value = function(problem.p, problem.q, factor * problem.D + shift)
    expected = factor * function(*problem) + shift
    close(value, expected, 1e-9, 1 + factor * problem.scale)


@holds_for("wasserstein_distance", "relaxed_wasserstein_distances")
def places_without_mass_have_no_influence(
    function, problem=problems(), other=arrays((1, 5), 1e30, ("float64",))
):
    p, q, D = problem
    with_one_more = function(
        np.append(p, 0), q, np.concatenate([D, other[:, : len(q)]])
    )
    largest = max(problem.scale, np.abs(other).max())
    close(with_one_more, function(*problem), 1e-9, largest)


@holds_for("relaxed_wasserstein_distances")
def both_are_lower_bounds(function, problem=problems()):
    exact = blogkeras.wasserstein_distance(*problem)
    for bound in number(function(*problem)):
        assert bound <= exact + 1e-9 * problem.scale


@holds_for("sinkhorn", "SinkhornSolution", cases=3)
def bounds_enclose_the_exact_distance(
    _,
    p=distributions((3, 3)),
    q=distributions((3, 5)),
    D=stacks(3, (3, 5)),
):
    p, q = p.astype("float32"), q.astype("float32")
    solution = blogkeras.sinkhorn(p, q, D)
    plan = number(solution.plan)
    assert plan.shape == D.shape
    assert plan.min() >= 0
    close(plan.sum(2), p, 1e-5)
    close(plan.sum(1), q, 1e-5)
    # The exact solver scales the masses to sums of 1.
    exact = blogkeras.wasserstein_distance(p, q, D)
    error = 1e-6 * largest_of(D, D)
    assert np.all(number(solution.lower) <= exact + error)
    assert np.all(exact - error <= number(solution.upper))
    assert np.all(number(solution.distance) <= number(solution.upper))
    for potential, mass in zip(solution.potentials, (p, q), strict=True):
        assert number(potential).shape == mass.shape


@holds_for("sinkhorn", "wasserstein_distance", "relaxed_wasserstein_distances")
def problems_that_do_not_fit_are_refused(
    function, problem=problems(), wrong=st.integers(0, 6)
):
    p, q, D = problem
    match wrong:
        case 0:
            p, q, D = np.stack([p] * 2), np.stack([q] * 2), D[None]
        case 1:
            p = np.full(len(p) + 1, 1 / (len(p) + 1))
        case 2:
            D = D[:, :1]
            assume(len(q) > 1)
        case 3:
            q = q[None]
        case 4:
            p = p * 1.01
        case 5:
            D = np.where(D == D.max(), np.nan, D)
        case 6:
            p, D = p[:0], D[:0]
    with refuses():
        function(p, q, D)


@holds_for(
    "WordMoverDistance", "WordRotatorDistance", cases=3, slow_on_jax=True
)
def layer_is_finite_and_ignores_the_mask(
    layer,
    x=stacks(3, (3, 3), 1e12),
    y=stacks(3, (2, 3), 1e12),
    seed=SEEDS,
    kind=st.sampled_from(KINDS_OF_MASKS),
):
    mask = [mask_of(kind, seed + k, t.shape[:-1]) for k, t in enumerate((x, y))]
    distance = layer_of(layer)
    value = number(distance([x, y], mask=mask))
    assert value.shape == (3,)
    scale = 10 * largest_of(x, y)
    scale = np.ones(3) if layer is blogkeras.WordRotatorDistance else scale
    hidden = [
        np.where(m[..., None], t, t[::-1])
        for m, t in zip(mask, (x, y), strict=True)
    ]
    close(distance(hidden, mask=mask), value, 1e-4, scale)
    function = {
        "WordMoverDistance": blogkeras.word_mover_distance,
        "WordRotatorDistance": blogkeras.word_rotator_distance,
    }[layer.__name__]
    exact = function(x, y, tuple(mask))
    assert np.all(value >= exact - 1e-4 * (scale + exact))


@functools.cache
def layer_of(layer, **options):
    return layer(**options)


@holds_for(
    "WordMoverDistance",
    "WordRotatorDistance",
    cases=3,
    short=1,
    slow_on_jax=True,
)
def every_pair_stands_in_its_place(
    layer, x=stacks(3, (3, 3), 1e6), y=stacks(2, (2, 3), 1e6)
):
    matrix = number(layer_of(layer, pairwise=True, solver="relaxed")([x, y]))
    assert matrix.shape == (3, 2)
    aligned = layer_of(layer, solver="relaxed")
    for j in range(2):
        alone = number(aligned([x, np.stack([y[j]] * 3)]))
        scale = 1 + np.abs(x).max() + np.abs(y).max()
        close(matrix[:, j], alone, 1e-3, scale)


@holds_for("WordMoverDistance", "WordRotatorDistance", short=2)
def layer_refuses_inputs_that_do_not_agree(
    layer, x=stacks(3, (3, 3), 1e6), wrong=st.integers(0, 3)
):
    match wrong:
        case 0:
            inputs = [x, x[:2]]
        case 1:
            inputs = [x, x[..., :2]]
        case 2:
            inputs = [x, x[:1]]
        case 3:
            inputs = [x, x[..., 0]]
    with refuses():
        layer()(inputs)


@holds_for("pairwise_distances")
def each_pair_has_its_distance(
    function,
    x=stacks(3, (3, 2), 1e6),
    y=stacks(2, (2, 2), 1e6),
    cost=COSTS,
    weights=WEIGHTS,
):
    options = {"cost": cost, "weights": weights}
    matrix = number(function(x, y, **options))
    own = number(function(x, **options))
    assert own.shape == (3, 3)
    scale = 1 + max(np.abs(x).max(), np.abs(y).max())
    for i, text in enumerate(x):
        alone = blogkeras.word_mover_distance(text, y, **options)
        close(matrix[i], alone, 1e-9, scale)
        alone = blogkeras.word_mover_distance(text, x, **options)
        close(own[i], np.where(np.arange(3) == i, 0, alone), 1e-9, scale)
    close(own, own.T, 0)


@holds_for(*DISTANCES)
def a_part_costs_no_more_than_the_whole(
    function, pair=pairs(largest=1e6), share=st.sampled_from([0.25, 0.5, 1.0])
):
    part, whole = (
        number(function(*pair, pair.mask, partial=s)) for s in (share, 1.0)
    )
    distance = number(function(*pair, pair.mask))
    close(whole, distance, 1e-9, 1 + pair.scale)
    # The dearest share is left out first.
    assert 0 <= part + 1e-9 * pair.scale
    assert part <= share * whole + 1e-9 * (1 + pair.scale)


@st.composite
def libraries(draw):
    """Vectors of words, documents of their ids and a query."""
    vectors = draw(arrays((6, 3), 1e12, FLOATS))
    document = st.lists(st.integers(0, 5), max_size=4)
    documents = draw(st.lists(document, min_size=1, max_size=5))
    return vectors, documents, draw(document)


@holds_for("TransportIndex", "SearchResult")
def finds_what_comparing_with_every_document_finds(
    _,
    library=libraries(),
    cost=COSTS,
    weights=WEIGHTS,
    k=st.integers(1, 6),
):
    vectors, documents, query = library
    index = blogkeras.TransportIndex(documents, vectors, cost, weights, 0)
    result = index.search(query, k)
    count = min(k, len(documents))
    assert len(set(result.indices.tolist())) == count == len(result.distances)
    assert np.all(np.diff(number(result.distances)) >= 0)
    words = vectors.astype(
        "float32" if vectors.dtype != "float64" else "float64"
    )

    def text(ids):
        return words[np.array(ids, int)].astype("float64")

    every = [
        blogkeras.word_mover_distance(
            text(query), text(document), cost=cost, weights=weights
        )
        for document in documents
    ]
    scale = 1.0 if cost == "cosine" else 1e-280 + np.abs(text(range(6))).max()
    close(result.distances, np.sort(every)[:count], 1e-9, scale)
    close(result.distances, np.array(every)[result.indices], 1e-9, scale)
    assert count <= result.num_exact <= len(documents)


@holds_for("TransportClassifier")
def shares_are_those_of_the_nearest_classes(
    cls,
    library=libraries(),
    cost=COSTS,
    weights=WEIGHTS,
    k=st.integers(1, 6),
    voting=st.sampled_from(["uniform", "distance"]),
):
    vectors, documents, query = library
    labels = np.arange(len(documents)) % 2
    classifier = cls(k, vectors, cost, weights, voting).fit(documents, labels)
    shares = number(classifier.predict_proba([query, documents[0]]))
    assert shares.shape == (2, len(set(labels)))
    close(shares.sum(1), [1, 1], 1e-12, 1)
    assert np.all(shares >= 0)
    near = classifier.index.search(query, k).indices
    if voting == "uniform":
        counts = np.bincount(labels[near], minlength=shares.shape[1])
        close(shares[0], counts / len(near), 1e-12, 1)
    predicted = classifier.predict([query])
    assert predicted[0] == np.argmax(shares[0])


@holds_for("inverse_document_frequency")
def is_the_log_of_a_share(function, library=libraries(), seed=SEEDS):
    _, documents, _ = library
    value = number(function(documents, 6))
    assert value.shape == (6,)
    assert np.all((0 <= value) & (value <= np.log(len(documents)) + 1e-12))
    counts = [sum(word in d for d in documents) for word in range(6)]
    expected = [np.log(len(documents) / max(1, c)) for c in counts]
    close(value, np.array(expected), 1e-12)
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [sorted(documents[i]) for i in order]
    close(function(shuffled, 6), value, 0)


@holds_for("sif_weights", "usif_weights")
def rarer_words_weigh_more(function, p=distributions((20,))):
    try:
        weights = number(function(p))
    except ValueError as error:
        # All words or none are frequent.
        assert function is blogkeras.usif_weights
        assert "whole vocabulary" in str(error)  # noqa: PT017
        return
    assert weights.shape == p.shape
    assert np.all((weights > 0) & (weights <= 2))
    assert np.all(np.diff(weights[np.argsort(p)]) <= 0)


MATRICES = arrays(
    st.sampled_from([(5, 3), (1, 3), (2, 4), (9, 1)]), 1e30, FLOATS + INTEGERS
)


@holds_for("common_components")
def components_are_orthonormal(
    function, vectors=MATRICES, count=st.integers(0, 4)
):
    count = min(count, vectors.shape[1])
    components, shares = function(vectors, count)
    components, shares = number(components), number(shares)
    assert components.shape == (count, vectors.shape[1])
    unit = 1e-5
    if vectors.dtype.name in HALVES:
        unit = 0.02
    close(components @ components.T, np.eye(count), unit)
    assert shares.shape == (count,)
    assert np.all((shares >= 0) & (shares <= 1 + 1e-12))
    assert np.all(np.diff(shares) <= 0)
    if count and vectors.any():
        close(shares.sum(), np.float64(1), 1e-9)
        # The first direction has the largest share of all directions.
        wide = vectors.astype("float64")
        wide = wide / np.abs(wide).max()
        along = np.square(wide @ components[0]).sum()
        assert along >= (1 - 10 * unit) * np.square(wide).sum(0).max()


@holds_for("all_but_the_top")
def what_is_left_is_centred(
    function, vectors=MATRICES, count=st.integers(0, 4)
):
    count = min(count, vectors.shape[1])
    if vectors.dtype.name in HALVES:
        vectors = vectors / vectors.dtype.type(4)  # differences stay in range
    left = number(function(vectors, count))
    assert left.shape == vectors.shape
    wide = vectors.astype("float64")
    scale = np.abs(wide).max(initial=1e-30)
    unit = {"float16": 0.01, "bfloat16": 0.05}.get(vectors.dtype.name, 1e-4)
    assert np.abs(left.mean(0)).max() <= unit * scale
    # As many dimensions are gone: what is left has a smaller rank.
    values = np.linalg.svd(left / scale, compute_uv=False)
    rank = np.sum(values > 10 * unit)
    assert rank <= vectors.shape[1] - count
    # A projection never makes the distances from the mean larger.
    centred = np.square((wide - wide.mean(0)) / scale).sum()
    assert np.square(left / scale).sum() <= centred * (1 + unit) + unit


@holds_for("remove_components")
def nothing_is_left_along_the_components(
    function, vectors=MATRICES, seed=SEEDS, count=st.integers(0, 2)
):
    dim = vectors.shape[1]
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    components = basis[: min(count, dim)]
    left = number(function(vectors, components))
    assert left.shape == vectors.shape
    unit = {"float16": 0.01, "bfloat16": 0.05}.get(vectors.dtype.name, 1e-5)
    scale = np.abs(vectors.astype("float64")).max(initial=1e-30)
    close(
        left @ components.T, np.zeros((len(left), len(components))), unit, scale
    )
    again = function(left, components)
    close(again, left, unit, scale)
    # Without any share nothing is removed.
    nothing = np.zeros(len(components))
    close(function(vectors, components, nothing), vectors, unit, scale)


@holds_for("remove_components")
def shares_of_another_number_are_refused(
    function, vectors=MATRICES, wrong=st.sampled_from([(1,), (3,), (2, 1), ()])
):
    assume(vectors.shape[1] >= 2)
    components = np.eye(vectors.shape[1])[:2]
    for shares in (np.ones(wrong), np.array([np.nan, 1.0])):
        with refuses():
            function(vectors, components, shares)


@holds_for("plot_alignment")
def every_plan_is_drawn(
    function, plan=arrays((2, 3), 1e30, ("float64", "float32", "int32"))
):
    figure_of = functools.partial(function, x_words="ab", y_words="cde")
    if plan.min() < 0 or not plan.any():
        with refuses():
            figure_of(plan)
        return
    figure = figure_of(plan)
    for line, name in itertools.product(figure.axes[0].lines, "xy"):
        assert np.isfinite(getattr(line, f"get_{name}data")()).all()


@holds_for("plot_alignment")
def a_plan_that_is_not_finite_is_refused(
    function,
    plan=arrays((2, 3), 1e30, ("float64",)),
    place=st.integers(0, 5),
    value=st.sampled_from([np.nan, np.inf]),
):
    plan.reshape(-1)[place] = value
    with refuses():
        function(plan, "ab", "cde")
