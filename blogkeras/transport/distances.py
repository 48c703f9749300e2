"""The distances of post 7388 as functions."""

import math
from typing import Any

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_finite, renamed_argument
from blogkeras.loops import ProgramCache
from blogkeras.transport import measures
from blogkeras.transport.checks import (
    check_own_costs,
    check_problem,
    widened,
)
from blogkeras.transport.entropic import as_tensor, common_dtype
from blogkeras.transport.problem import Solver, Texts, as_array
from blogkeras.typing import Tensor

_BLOCK = 2**17  # numbers in a block of vectors in NumPy
_programs = ProgramCache(size=16)


def wasserstein_distance(
    p: Tensor,
    q: Tensor,
    D: Tensor,
    solver: str = "exact",
    regularization: float | None = None,
    tolerance: float = 1e-3,
    *,
    unbalanced: float | None = None,
    partial: float | None = None,
    own_costs: Any = None,
) -> Tensor:
    """Earth mover's distance: the least cost of turning `p` into `q`.

        min_γ Σ γᵢⱼ Dᵢⱼ   with  Σⱼ γᵢⱼ = pᵢ,  Σᵢ γᵢⱼ = qⱼ,  γ ≥ 0

    One of three options changes the problem:

        unbalanced=ρ   min_γ Σ γᵢⱼ Dᵢⱼ + ρ KL(γ1 ‖ p) + ρ KL(γᵀ1 ‖ q)
        partial=s      Σⱼ γᵢⱼ ≤ pᵢ,  Σᵢ γᵢⱼ ≤ qⱼ,  Σᵢⱼ γᵢⱼ = s
        own_costs      V(p, q) − ½ V(p, p) − ½ V(q, q),  the debiased Sinkhorn
                       divergence, V the optimum of Σ γᵢⱼ Dᵢⱼ + ε KL(γ ‖ p ⊗ q)

    with KL(r ‖ p) = Σ rᵢ log(rᵢ/pᵢ) − rᵢ + pᵢ.

    Args:
        p: `(..., m)`, nonnegative, sum 1. In half precision, where the sum has
            few digits, it is divided by it.
        q: `(..., n)`, nonnegative, sum 1, likewise.
        D: `(..., m, n)`, finite costs of any sign.
        solver: `"exact"`: the network simplex of POT, in NumPy float64; for use
            outside of compiled functions. `"sinkhorn"`: an upper bound, see
            `sinkhorn`; compiled, in batches, with a gradient: that of `D` is
            the plan, that of `p` and `q` the potentials. `"relaxed"`: a lower
            bound (RWMD), the larger of `relaxed_wasserstein_distances`.
        regularization: Float, or `None` for what `sinkhorn` chooses. Of
            `"sinkhorn"`, relative to max|D|.
        tolerance: Float. Marginal error of `"sinkhorn"`.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Mass may be
            made and lost at this price: no word moves farther than about 2ρ.
            The result is an upper bound. Of `"sinkhorn"`.
        partial: Float within (0, 1], or `None`. The share s of the mass that is
            moved, at the least cost. Of `"exact"` and `"sinkhorn"`.
        own_costs: Pair of the costs within each side, `(..., m, m)` and
            `(..., n, n)`, symmetric, for the debiased divergence; or `None`. It
            is 0 where p and q are the same, for any ε: here relative to the
            largest of all costs, 0.05 by default. Of `"sinkhorn"`.

    Returns:
        `(...)`: NumPy float64 from `"exact"`, else a tensor.

    Raises:
        ValueError: on shapes that do not fit, on more than one of the three
            options, on a solver that has not the option and, outside of
            compiled functions, on negative or unnormalized weights and on
            values that are not finite.

    Example:

    >>> float(wasserstein_distance([1.0, 0.0], [0.5, 0.5], [[0, 2], [2, 0]]))
    1.0

    Reference:
        [blog post](https://kexue.fm/archives/7388);
        [Chizat et al., 2018](https://arxiv.org/abs/1607.05816), unbalanced;
        [Chapel et al., 2020](https://arxiv.org/abs/2002.08276), partial;
        [Feydy et al., 2019](https://arxiv.org/abs/1810.08278), debiased

    Departs from the post: the post's linear program is the same problem,
    solved by `scipy.optimize.linprog`.
    """
    if own_costs is not None and solver != "sinkhorn":
        raise ValueError(
            "Expected no `own_costs`, which are for the debiased divergence of "
            f'solver="sinkhorn". Received: own_costs={own_costs!r}, '
            f"solver={solver!r}"
        )
    method = Solver(
        solver,
        regularization,
        tolerance,
        unbalanced,
        partial,
        own_costs is not None,
    )
    is_pair = isinstance(own_costs, (list, tuple))
    dtype = common_dtype(p, q, D, *(own_costs if is_pair else ()))
    p, q, D = (
        as_array(a, method.name, dtype) for a in (widened(p), widened(q), D)
    )
    check_problem(p, q, D)
    check_finite("D", D)
    if own_costs is None:
        return method.distance(p, q, D)
    own_costs = check_own_costs(
        p, q, own_costs, lambda costs: as_tensor(costs, dtype)
    )
    return method.distance(p, q, D, own_costs)


@renamed_argument("idf", "importance")
def word_mover_distance(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cost: str = "euclidean",
    weights: str = "uniform",
    importance: Tensor | None = None,
    solver: str = "exact",
    regularization: float | None = None,
    tolerance: float = 1e-3,
    *,
    unbalanced: float | None = None,
    partial: float | None = None,
    debiased: bool = False,
) -> Tensor:
    """Word mover's distance (WMD) between two sequences of vectors.

        WMD = min_γ Σ γᵢⱼ ‖wᵢ − w'ⱼ‖   with  Σⱼ γᵢⱼ = 1/n,  Σᵢ γᵢⱼ = 1/n'

    `cost` and `weights` give other distances: `"cosine"` with `"norm"` is
    `word_rotator_distance`, `"cosine"` with `"uniform"` is WMD on normalized
    vectors, `"importance"` weighs words by their rarity, for example.

    An empty or fully masked sequence counts as one zero vector: its distance to
    a text is the mean norm of the text's words, or 1 under `"cosine"`, and 0 to
    another empty sequence.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count. Values under it have no
            influence.
        cost: `"euclidean"`; `"cosine"`, 1 − cos, where a zero vector has no
            mass; `"rms"`, Euclidean divided by √dim.
        weights: `"uniform"`; `"norm"`, ‖wᵢ‖/Z; `"importance"`, the `importance`
            of the words, divided by its sum; or a pair of arrays `(..., n)`,
            `(..., m)`, nonnegative, each of sum 1 (0 for an empty sequence).
        importance: Pair `(..., n)`, `(..., m)` for `weights="importance"`,
            nonnegative, such as `inverse_document_frequency` of the words.
        solver: `"exact"`, the network simplex of POT, for use outside of
            compiled functions; `"sinkhorn"`, an upper bound with a gradient,
            compiled; `"relaxed"`, a lower bound (RWMD).
        regularization: Float > 0 of `"sinkhorn"`, relative to the largest cost,
            or `None` for what `sinkhorn` chooses.
        tolerance: Float > 0. Marginal error of `"sinkhorn"`.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Words may lose
            mass and get more at this price, see `wasserstein_distance`: no word
            moves farther than about 2ρ. Of `"sinkhorn"`.
        partial: Float within (0, 1], or `None`. The share of the mass that is
            moved, at the least cost: the rest of the words does not count. Of
            `"exact"` and `"sinkhorn"`.
        debiased: Boolean. The debiased Sinkhorn divergence, which is 0 between
            equal texts for any regularization, by default 0.05. Of
            `"sinkhorn"`.

    Returns:
        `(...)`: NumPy float64 from `solver="exact"`, else a float32 tensor.

    Raises:
        ValueError: on shapes that do not fit, on negative weights, on values
            that are not finite, and on an unknown `cost`, `weights` or
            `solver`.

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
    method = Solver(
        solver, regularization, tolerance, unbalanced, partial, debiased
    )
    texts = Texts.checked(x, y, mask, cost, weights, importance, method.name)
    if method.name == "exact":
        return _exact_distance(texts, method)
    # On TensorFlow a tape may be recording, which cannot differentiate a
    # compiled program.
    if backend.BACKEND == "jax" and method.name == "sinkhorn":
        return _compiled_distance(texts, method)
    return method.distance(*texts.problem(ops, method.debiased))


def _compiled_distance(texts, solver):
    """From vectors to the distance in one program for a class of lengths."""
    if not texts.is_concrete():
        return solver.distance(*texts.problem(ops, solver.debiased))
    texts = texts.padded()
    arrays = texts.arrays()
    key = (
        tuple(None if a is None else (a.shape, str(a.dtype)) for a in arrays),
        (texts.cost, texts.weights, solver),
    )

    def distance(*arrays):
        problem = texts.with_arrays(arrays).problem(ops, solver.debiased)
        return solver.distance(*problem)

    return _programs.get(key, lambda: backend.jit(distance))(*arrays)


def _exact_distance(texts, solver):
    """Solves in blocks: allocating all costs at once takes longer than EMD."""
    lead = texts.x.shape[:-2]
    count = math.prod(lead)
    flat = texts.with_arrays(
        None if a is None else a.reshape((count, *a.shape[len(lead) :]))
        for a in texts.arrays()
    )
    numbers = (texts.x.shape[-2] + texts.y.shape[-2]) * texts.x.shape[-1]
    size = max(1, _BLOCK // max(1, numbers))
    distances = np.empty(count)
    for first in range(0, count, size):
        block = slice(first, first + size)
        some = flat.with_arrays(
            None if a is None else a[block] for a in flat.arrays()
        )
        distances[block] = solver.distance(*some.problem(np))
    return distances.reshape(lead)[()]


@renamed_argument("idf", "importance")
def word_rotator_distance(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cost: str = "cosine",
    weights: str = "norm",
    importance: Tensor | None = None,
    solver: str = "exact",
    regularization: float | None = None,
    tolerance: float = 1e-3,
    *,
    unbalanced: float | None = None,
    partial: float | None = None,
    debiased: bool = False,
) -> Tensor:
    """Word rotator's distance (WRD) between two sequences of vectors.

        WRD = min_γ Σ γᵢⱼ (1 − cos(wᵢ, w'ⱼ))
        with  Σⱼ γᵢⱼ = ‖wᵢ‖/Z,  Σᵢ γᵢⱼ = ‖w'ⱼ‖/Z'

    The norm of a word vector is taken for the word's importance and its
    direction for the meaning. WRD is between 0 and 2. It is
    `word_mover_distance` with other defaults. An empty sequence has distance 1
    to a text.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.
        cost: `"cosine"`, `"euclidean"` or `"rms"`, Euclidean divided by √dim.
        weights: `"norm"`, ‖wᵢ‖/Z; `"uniform"`; `"importance"`, the `importance`
            of the words, divided by its sum; or a pair of arrays `(..., n)`,
            `(..., m)`, nonnegative, each of sum 1.
        importance: Pair `(..., n)`, `(..., m)` for `weights="importance"`,
            nonnegative.
        solver: `"exact"`, the network simplex of POT, for use outside of
            compiled functions; `"sinkhorn"`, an upper bound with a gradient,
            compiled; `"relaxed"`, a lower bound.
        regularization: Float > 0 of `"sinkhorn"`, relative to the largest cost,
            or `None` for what `sinkhorn` chooses.
        tolerance: Float > 0. Marginal error of `"sinkhorn"`.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Words may lose
            mass and get more at this price, see `wasserstein_distance`: no word
            moves farther than about 2ρ. Of `"sinkhorn"`.
        partial: Float within (0, 1], or `None`. The share of the mass that is
            moved, at the least cost: the rest of the words does not count. Of
            `"exact"` and `"sinkhorn"`.
        debiased: Boolean. The debiased Sinkhorn divergence, which is 0 between
            equal texts for any regularization, by default 0.05. Of
            `"sinkhorn"`.

    Returns:
        `(...)`: NumPy float64 from `solver="exact"`, else a float32 tensor.

    Raises:
        ValueError: on shapes that do not fit, on negative weights, on values
            that are not finite, and on an unknown `cost`, `weights` or
            `solver`.

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> float(word_rotator_distance(x, y))
    0.5

    Reference:
        [Yokoi et al., 2020](https://arxiv.org/abs/2004.15003);
        [blog post](https://kexue.fm/archives/7388)
    """
    return word_mover_distance(
        x,
        y,
        mask,
        cost,
        weights,
        importance,
        solver,
        regularization,
        tolerance,
        unbalanced=unbalanced,
        partial=partial,
        debiased=debiased,
    )


def word_rotator_similarity(
    x: Tensor, y: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """1 − WRD, between −1 and 1: how alike two sequences of vectors are.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.
        **options: `cost`, `weights`, `importance`, `solver`, `regularization`,
            `tolerance`, `unbalanced`, `partial` and `debiased` of
            `word_rotator_distance`.

    Returns:
        `(...)`: NumPy float64 from `solver="exact"`, the default, else a
        float32 tensor.

    Raises:
        ValueError: on shapes that do not fit, on negative weights, on values
            that are not finite, and on an unknown `cost`, `weights` or
            `solver`.

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> float(word_rotator_similarity(x, y))
    0.5

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    return 1 - word_rotator_distance(x, y, mask, **options)


@renamed_argument("idf", "importance")
def word_centroid_distance(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cost: str = "euclidean",
    weights: str = "uniform",
    importance: Tensor | None = None,
) -> Tensor:
    """A lower bound of the distance with the same arguments, by mean words.

    Euclidean (WCD): ‖Σ pᵢ wᵢ − Σ qⱼ w'ⱼ‖. Cosine: ½ ‖Σ pᵢ uᵢ − Σ qⱼ u'ⱼ‖² with
    the directions u = w/‖w‖; with `weights="norm"` it is the post's bound
    ½ ‖Σ wᵢ/Z − Σ w'ⱼ/Z'‖² of WRD, which has the name `word_rotator_bound`.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.
        cost: `"euclidean"`, `"cosine"` or `"rms"`, Euclidean divided by √dim.
        weights: `"uniform"`; `"norm"`, ‖wᵢ‖/Z; `"importance"`, the `importance`
            of the words, divided by its sum; or a pair of arrays `(..., n)`,
            `(..., m)`, nonnegative, each of sum 1.
        importance: Pair `(..., n)`, `(..., m)` for `weights="importance"`,
            nonnegative.

    Returns:
        `(...)`, NumPy float64.

    Raises:
        ValueError: on shapes that do not fit, on negative weights, on values
            that are not finite, and on an unknown `cost` or
            `weights`.

    Example:

    >>> x, y = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.5, 2.0]])
    >>> float(word_centroid_distance(x, y))
    2.0

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf);
        [blog post](https://kexue.fm/archives/7388)
    """
    texts = Texts.checked(x, y, mask, cost, weights, importance, "exact")
    (p, x), (q, y) = texts.measures(np)
    return measures.centroid_bound(
        np,
        measures.centroid(np, p, x, cost),
        measures.centroid(np, q, y, cost),
        cost,
    )


def word_rotator_bound(
    x: Tensor, y: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The post's lower bound of WRD: ½ ‖Σ wᵢ/Z − Σ w'ⱼ/Z'‖².

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.

    Returns:
        `(...)`, NumPy float64.

    Raises:
        ValueError: on shapes that do not fit and on values that are not finite.

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> float(word_rotator_bound(x, y))  # the distance is 0.5
    0.25

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    return word_centroid_distance(x, y, mask, "cosine", "norm")


def relaxed_wasserstein_distances(p: Tensor, q: Tensor, D: Tensor) -> Tensor:
    """Two lower bounds (RWMD), each without one of the two marginals.

        Σᵢ pᵢ minⱼ Dᵢⱼ   and   Σⱼ qⱼ minᵢ Dᵢⱼ

    over words with mass. `solver="relaxed"` is the larger one.

    Args:
        p: `(..., m)`, nonnegative, sum 1.
        q: `(..., n)`, nonnegative, sum 1.
        D: `(..., m, n)`, finite costs of any sign.

    Returns:
        Pair of `(...)`, NumPy float64.

    Raises:
        ValueError: on shapes that do not fit, on negative or unnormalized
            weights and on values that are not finite.

    Example:

    >>> bounds = relaxed_wasserstein_distances([1, 0], [0.5, 0.5], np.eye(2))
    >>> [float(bound) for bound in bounds]  # the distance is 0.5
    [0.0, 0.5]

    Reference:
        [Kusner et al., 2015](http://proceedings.mlr.press/v37/kusnerb15.pdf)
    """
    p, q, D = (
        as_array(a, "exact", "float64") for a in (widened(p), widened(q), D)
    )
    check_problem(p, q, D)
    check_finite("D", D)
    return measures.relaxed(np, p, q, D)


@renamed_argument("idf", "importance")
def transport_plan(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cost: str = "cosine",
    weights: str = "norm",
    importance: Tensor | None = None,
    solver: str = "exact",
    *,
    unbalanced: float | None = None,
    partial: float | None = None,
) -> Tensor:
    """The optimal plan of a distance: the mass moved between each two words.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite. One text
            `(n, dim)` is compared with each of a batch on the other side.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.
        cost: `"cosine"`, `"euclidean"` or `"rms"`, Euclidean divided by √dim.
        weights: `"norm"`, ‖wᵢ‖/Z; `"uniform"`; `"importance"`, the `importance`
            of the words, divided by its sum; or a pair of arrays `(..., n)`,
            `(..., m)`, nonnegative, each of sum 1.
        importance: Pair `(..., n)`, `(..., m)` for `weights="importance"`,
            nonnegative.
        solver: `"exact"`, the network simplex of POT, or `"sinkhorn"`.
        unbalanced: Float ρ > 0 in units of the costs, or `None`. Words may lose
            mass and get more at this price, see `wasserstein_distance`. Of
            `"sinkhorn"`.
        partial: Float within (0, 1], or `None`. The share of the mass that is
            moved, at the least cost.

    Returns:
        `(..., n, m)`; entry (i, j) is the mass that word i of `x` sends to word
        j of `y`. NumPy float64 from `"exact"`, else a tensor. Show it with
        `plot_alignment`.

    Raises:
        ValueError: on shapes that do not fit, on negative weights, on values
            that are not finite, on an unknown `cost` or
            `weights`, and on `solver="relaxed"`, which has no plan.

    Example:

    >>> x, y = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0], [3.0, 0.0]])
    >>> transport_plan(x, y)
    array([[0.5, 0.5]])

    Reference:
        [blog post](https://kexue.fm/archives/7388)
    """
    method = Solver(solver, unbalanced=unbalanced, partial=partial)
    if method.name == "relaxed":
        raise ValueError(
            "The relaxed problem has no plan with both marginals. Expected "
            '`solver` to be "exact" or "sinkhorn". Received: '
            f"solver={method.name!r}"
        )
    texts = Texts.checked(x, y, mask, cost, weights, importance, method.name)
    xp = np if method.name == "exact" else ops
    return method.plan(*texts.problem(xp))[0]
