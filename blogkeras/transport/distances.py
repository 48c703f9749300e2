"""The distances of post 7388 as functions."""

import functools
import math

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.transport import exact, measures
from blogkeras.transport.checks import (
    as_numpy,
    check_finite,
    check_mass,
    check_problem,
    check_settings,
    check_shape,
)
from blogkeras.transport.entropic import approximate, as_tensor

SOLVERS = ("exact", "sinkhorn", "relaxed")
_BLOCK = 2**17  # numbers of vectors at work at a time in NumPy


def wasserstein_distance(
    p, q, D, solver="exact", regularization=0.005, tolerance=1e-3
):
    """Earth mover's distance: the least cost of turning `p` into `q`.

        min_γ Σ γᵢⱼ Dᵢⱼ   with  Σⱼ γᵢⱼ = pᵢ,  Σᵢ γᵢⱼ = qⱼ,  γ ≥ 0

    Args:
        p: `(..., m)`, nonnegative, sum 1.
        q: `(..., n)`, nonnegative, sum 1.
        D: `(..., m, n)`, finite costs of any sign.
        solver: `"exact"`: the network simplex of POT, in NumPy float64; for use
            outside of compiled functions. `"sinkhorn"`: an upper bound, see
            `sinkhorn`; compiled, in batches, with a gradient: that of `D` is
            the plan, that of `p` and `q` the potentials. `"relaxed"`: a lower
            bound (RWMD), the larger of `relaxed_wasserstein_distances`.
        regularization: Float. Of `"sinkhorn"`, relative to max|D|.
        tolerance: Float. Marginal error of `"sinkhorn"`.

    Returns:
        `(...)`: NumPy float64 from `"exact"`, else a tensor.

    Raises:
        ValueError: on shapes that do not fit and, outside of compiled
            functions, on negative or unnormalized weights and on values that
            are not finite.

    Example:

    >>> float(wasserstein_distance([1.0, 0.0], [0.5, 0.5], [[0, 2], [2, 0]]))
    1.0

    Reference:
        [blog post](https://kexue.fm/archives/7388)

    Departs from the post: the post's linear program is the same problem,
    solved by `scipy.optimize.linprog`.
    """
    _check_solver(solver)
    check_settings(regularization, tolerance)
    p, q, D = (_array(a, solver) for a in (p, q, D))
    check_problem(p, q, D)
    check_finite("D", D)
    return _distance(p, q, D, solver, regularization, tolerance)


def word_mover_distance(
    x,
    y,
    mask=None,
    cost="euclidean",
    weights="uniform",
    idf=None,
    solver="exact",
    regularization=0.005,
    tolerance=1e-3,
):
    """Word mover's distance (WMD) between two sequences of vectors.

        WMD = min_γ Σ γᵢⱼ ‖wᵢ − w'ⱼ‖   with  Σⱼ γᵢⱼ = 1/n,  Σᵢ γᵢⱼ = 1/n'

    `cost` and `weights` span its relatives: `"cosine"` with `"norm"` is
    `word_rotator_distance`, `"cosine"` with `"uniform"` is WMD on normalized
    vectors, `"idf"` weighs words by their rarity.

    An empty or fully masked sequence counts as one zero vector: its distance to
    a text is the mean norm of the text's words, or 1 under `"cosine"`, and 0 to
    another empty sequence.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count. Values under it have no
            influence.
        cost: `"euclidean"`; `"cosine"`, 1 − cos, where a zero vector has no
            mass; `"rms"`, Euclidean divided by √dim.
        weights: `"uniform"`; `"norm"`, ‖wᵢ‖/Z; `"idf"`, the `idf` of the words,
            divided by their sum; or a pair of arrays `(..., n)`, `(..., m)`,
            nonnegative, each of sum 1 (0 for an empty sequence).
        idf: Pair `(..., n)`, `(..., m)` for `weights="idf"`, nonnegative: see
            `inverse_document_frequency`, or any other importance of words.
        solver: See `wasserstein_distance`.
        regularization: See there.
        tolerance: See there.

    Returns:
        `(...)`: NumPy float64 from `solver="exact"`, else a float32 tensor.

    Example:

    >>> x, y = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> round(float(word_mover_distance(x, y)), 4)  # (1 + sqrt(2)) / 2
    1.2071

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf);
        [blog post](https://kexue.fm/archives/7388)

    Departs from the post: the post's formula has the Euclidean distance, which
    is the default; its code takes the root of the *mean* over dimensions, which
    is `cost="rms"`.
    """
    _check_solver(solver)
    check_settings(regularization, tolerance)
    *texts, kind = _checked(x, y, mask, cost, weights, idf, solver)
    settings = (cost, kind, solver, regularization, tolerance)
    # On TensorFlow a tape may be watching, which cannot look inside.
    if solver == "sinkhorn" and backend.BACKEND == "jax":
        return _compiled(*settings)(*texts)
    return _distance_of_words(*texts, *settings)


@functools.cache
def _compiled(*settings):
    return backend.jit(lambda *texts: _distance_of_words(*texts, *settings))


def _distance_of_words(x, y, masks, given, cost, kind, solver, *settings):
    if solver == "exact":
        return _exact_distance_of_words(x, y, masks, given, cost, kind)
    p, q, D = _problem(x, y, masks, given, cost, kind, solver)
    return _distance(p, q, D, solver, *settings)


def _exact_distance_of_words(x, y, masks, given, cost, kind):
    """Block by block: fresh memory for all of a batch costs more than EMD."""
    lead = x.shape[:-2]
    count = math.prod(lead)
    arrays = [
        None if a is None else a.reshape((count, *a.shape[len(lead) :]))
        for a in (x, y, *masks, *given)
    ]
    numbers = (x.shape[-2] + y.shape[-2]) * x.shape[-1]
    size = max(1, _BLOCK // max(1, numbers))
    distances = np.empty(count)
    for first in range(0, count, size):
        block = slice(first, first + size)
        x, y, *others = (None if a is None else a[block] for a in arrays)
        problem = _problem(x, y, others[:2], others[2:], cost, kind, "exact")
        distances[block] = exact.solve(*problem)[0]
    return distances.reshape(lead)[()]


def word_rotator_distance(
    x,
    y,
    mask=None,
    cost="cosine",
    weights="norm",
    idf=None,
    solver="exact",
    regularization=0.005,
    tolerance=1e-3,
):
    """Word rotator's distance (WRD) between two sequences of vectors.

        WRD = min_γ Σ γᵢⱼ (1 − cos(wᵢ, w'ⱼ))
        with  Σⱼ γᵢⱼ = ‖wᵢ‖/Z,  Σᵢ γᵢⱼ = ‖w'ⱼ‖/Z'

    The norm of a word is its importance, its direction its meaning. Between 0
    and 2. It is `word_mover_distance` with other defaults; see there for the
    arguments, for masks and for empty sequences (1 to a text).

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> float(word_rotator_distance(x, y))
    0.5

    Reference:
        [Yokoi et al., 2020](https://arxiv.org/abs/2004.15003);
        [blog post](https://kexue.fm/archives/7388)
    """
    return word_mover_distance(
        x, y, mask, cost, weights, idf, solver, regularization, tolerance
    )


def word_rotator_similarity(x, y, mask=None, **options):
    """1 − WRD, between −1 and 1; see `word_rotator_distance`.

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    return 1 - word_rotator_distance(x, y, mask, **options)


def word_centroid_distance(
    x, y, mask=None, cost="euclidean", weights="uniform", idf=None
):
    """A lower bound of the distance with the same arguments, by mean words.

    Euclidean (WCD): ‖Σ pᵢ wᵢ − Σ qⱼ w'ⱼ‖. Cosine: ½ ‖Σ pᵢ uᵢ − Σ qⱼ u'ⱼ‖² with
    the directions u = w/‖w‖; with `weights="norm"` it is the post's bound
    ½ ‖Σ wᵢ/Z − Σ w'ⱼ/Z'‖² of WRD, which has the name `word_rotator_bound`.

    Args: See `word_mover_distance`.

    Returns:
        `(...)`, NumPy float64.

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf);
        [blog post](https://kexue.fm/archives/7388)
    """
    *texts, kind = _checked(x, y, mask, cost, weights, idf, "exact")
    x, y, p, q = _masses(*texts, cost, kind, "exact")
    return measures.centroid_bound(
        np,
        measures.centroid(np, p, x, cost),
        measures.centroid(np, q, y, cost),
        cost,
    )


def word_rotator_bound(x, y, mask=None):
    """The post's bound WRD ≥ ½ ‖Σ wᵢ/Z − Σ w'ⱼ/Z'‖²; NumPy float64.

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    return word_centroid_distance(x, y, mask, "cosine", "norm")


def relaxed_wasserstein_distances(p, q, D):
    """Two lower bounds (RWMD): one of the two marginals is given up.

        Σᵢ pᵢ minⱼ Dᵢⱼ   and   Σⱼ qⱼ minᵢ Dᵢⱼ

    over places with mass. `solver="relaxed"` is the larger one.

    Args: See `wasserstein_distance`; not checked.

    Returns:
        Pair of `(...)`, NumPy float64.

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf)
    """
    return measures.relaxed(np, *(_array(a, "exact") for a in (p, q, D)))


def transport_plan(
    x, y, mask=None, cost="cosine", weights="norm", idf=None, solver="exact"
):
    """Which word goes where: the plan behind a distance.

    Args: See `word_mover_distance`; the defaults are those of
        `word_rotator_distance`. `solver` is `"exact"` or `"sinkhorn"`.

    Returns:
        `(..., n, m)`; entry (i, j) is the mass that word i of `x` sends to word
        j of `y`. Show it with `plot_alignment`.

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> transport_plan(x, y)
    array([[0.5, 0.5]])

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    _check_solver(solver)
    if solver == "relaxed":
        raise ValueError(
            "The relaxed problem has no plan with both marginals. Use "
            f'solver="exact" or "sinkhorn". Received: solver={solver!r}'
        )
    *texts, kind = _checked(x, y, mask, cost, weights, idf, solver)
    p, q, D = _problem(*texts, cost, kind, solver)
    return _solve(p, q, D, solver)[0]


def envelope(plan, potentials, p, q, D):
    """⟨plan, D⟩, with the gradient of the optimum by `D`, `p` and `q`.

    At the optimum the plan and the potentials may be taken as constant: the
    derivative by D is the plan, by p and q the potentials.
    """
    plan, f, g = (
        ops.stop_gradient(ops.cast(a, D.dtype)) for a in (plan, *potentials)
    )
    return (
        ops.sum(plan * D, axis=(-2, -1))
        + ops.sum(f * (p - ops.stop_gradient(p)), axis=-1)
        + ops.sum(g * (q - ops.stop_gradient(q)), axis=-1)
    )


def distance_of_tensors(p, q, D, solver, regularization, tolerance):
    """The distance as a differentiable tensor, for the layers."""
    if solver == "relaxed":
        return ops.maximum(*measures.relaxed(ops, p, q, D))
    if solver == "exact" and not backend.is_concrete(D):
        _refuse()
    plan, potentials = _solve(p, q, D, solver, regularization, tolerance)
    return envelope(plan, potentials, p, q, D)


def _distance(p, q, D, solver, regularization, tolerance):
    if solver == "exact":
        lead = D.shape[:-2]
        flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
        return exact.solve(*flat)[0].reshape(lead)[()]
    return distance_of_tensors(p, q, D, solver, regularization, tolerance)


def _solve(p, q, D, solver, regularization=0.005, tolerance=1e-3):
    """`(plan, (f, g))`."""
    if solver == "sinkhorn":
        solution = approximate(p, q, D, regularization, tolerance)
        return solution.plan, solution.potentials
    p, q, D = (_array(a, "exact") for a in (p, q, D))
    lead = D.shape[:-2]
    flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
    _, *solution = exact.solve(*flat, duals=True)
    plan, f, g = (a.reshape((*lead, *a.shape[1:])) for a in solution)
    return plan, (f, g)


def _problem(x, y, masks, given, cost, kind, solver):
    """`(p, q, D)` of two sequences."""
    x, y, p, q = _masses(x, y, masks, given, cost, kind, solver)
    xp = np if solver == "exact" else ops
    return p, q, measures.cost_matrix(xp, x, y, cost)


def _masses(x, y, masks, given, cost, kind, solver):
    xp = np if solver == "exact" else ops
    (p, x), (q, y) = (
        measures.mass_and_vectors(xp, z, mask, cost, kind, mass)
        for z, mask, mass in zip((x, y), masks, given, strict=True)
    )
    return x, y, p, q


def _checked(x, y, mask, cost, weights, idf, solver):
    """`(x, y, masks, given, kind)` as arrays that fit."""
    measures.check_options(cost, weights)
    x, y = _array(x, solver), _array(y, solver)
    same = x.shape[:-2] == y.shape[:-2] and x.shape[-1:] == y.shape[-1:]
    if len(x.shape) < 2 or len(x.shape) != len(y.shape) or not same:
        raise ValueError(
            "Expected x (..., n, dim) and y (..., m, dim) with the same "
            f"leading axes. Received: x.shape={tuple(x.shape)}, "
            f"y.shape={tuple(y.shape)}"
        )
    kind = weights if isinstance(weights, str) else "given"
    given = idf if kind == "idf" else weights
    if kind == "idf" and idf is None:
        raise ValueError(
            'weights="idf" needs the idf of the words, idf=(x_idf, y_idf), as '
            "from `inverse_document_frequency`. Received: idf=None"
        )
    if kind in ("uniform", "norm"):
        given = (None, None)
    masks, masses = [], []
    mask = (None, None) if mask is None else mask
    for name, z, z_mask, mass in zip("xy", (x, y), mask, given, strict=True):
        if z_mask is not None:
            z_mask = _array(z_mask, solver, "bool")
            check_shape(f"mask of {name}", z_mask, z)
        if mass is not None:
            mass = _array(mass, solver)
            check_shape(f"weights of {name}", mass, z)
            check_mass(f"weights of {name}", mass, z_mask, kind == "given")
        check_finite(name, z, None if z_mask is None else z_mask[..., None])
        masks.append(z_mask)
        masses.append(mass)
    return x, y, tuple(masks), tuple(masses), kind


def _array(x, solver, dtype=None):
    """NumPy float64 for the exact solver, else a tensor."""
    if solver != "exact":
        return as_tensor(x, dtype)
    if isinstance(x, keras.KerasTensor) or not backend.is_concrete(x):
        # On TensorFlow NumPy arrays are concrete inside a trace.
        if not isinstance(x, (np.ndarray, list, tuple, float, int)):
            _refuse()
    return np.asarray(
        as_numpy(x) if ops.is_tensor(x) else x, dtype or "float64"
    )


def _refuse():
    raise ValueError(
        "The exact solver runs in NumPy, outside of compiled and traced "
        'functions: use solver="sinkhorn" there. Received: solver="exact" '
        "inside a traced function"
    )


def _check_solver(solver):
    if solver not in SOLVERS:
        raise ValueError(
            f"Expected `solver` one of {SOLVERS}. Received: {solver!r}"
        )
