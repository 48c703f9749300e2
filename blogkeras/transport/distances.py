"""The distances of post 7388 as functions."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_choice,
    check_finite,
    renamed_argument,
    renamed_value,
)
from blogkeras.loops import ProgramCache
from blogkeras.transport import exact, measures
from blogkeras.transport.checks import (
    check_mass,
    check_problem,
    check_settings,
    check_shape,
    check_words,
)
from blogkeras.transport.entropic import (
    approximate,
    as_tensor,
    length_classes,
    pad_axis,
)
from blogkeras.typing import Tensor

SOLVERS = ("exact", "sinkhorn", "relaxed")
_BLOCK = 2**17  # numbers in a block of vectors in NumPy
_programs = ProgramCache(size=16)


def wasserstein_distance(
    p: Tensor,
    q: Tensor,
    D: Tensor,
    solver: str = "exact",
    regularization: float | None = None,
    tolerance: float = 1e-3,
) -> Tensor:
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
        regularization: Float, or `None` for what `sinkhorn` chooses. Of
            `"sinkhorn"`, relative to max|D|.
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
    method = Solver(solver, regularization, tolerance)
    p, q, D = (_array(a, method.name) for a in (p, q, D))
    check_problem(p, q, D)
    check_finite("D", D)
    return method.distance(p, q, D)


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
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
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
    method = Solver(solver, regularization, tolerance)
    texts = Texts.checked(x, y, mask, cost, weights, importance, method.name)
    if method.name == "exact":
        return _exact_distance(texts)
    # On TensorFlow a tape may be recording, which cannot differentiate a
    # compiled program.
    if backend.BACKEND == "jax" and method.name == "sinkhorn":
        return _compiled_distance(texts, method)
    return method.distance(*texts.problem(ops))


def _compiled_distance(texts, solver):
    """From vectors to the distance in one program for a class of lengths."""
    if not texts.is_concrete():
        return solver.distance(*texts.problem(ops))
    texts = texts.padded()
    arrays = texts.arrays()
    key = (
        tuple(None if a is None else (a.shape, str(a.dtype)) for a in arrays),
        (texts.cost, texts.weights, solver),
    )

    def distance(*arrays):
        return solver.distance(*texts.with_arrays(arrays).problem(ops))

    return _programs.get(key, lambda: backend.jit(distance))(*arrays)


def _exact_distance(texts):
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
        distances[block] = exact.solve(*some.problem(np))[0]
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
) -> Tensor:
    """Word rotator's distance (WRD) between two sequences of vectors.

        WRD = min_γ Σ γᵢⱼ (1 − cos(wᵢ, w'ⱼ))
        with  Σⱼ γᵢⱼ = ‖wᵢ‖/Z,  Σᵢ γᵢⱼ = ‖w'ⱼ‖/Z'

    The norm of a word vector is taken for the word's importance and its
    direction for the meaning. WRD is between 0 and 2. It is
    `word_mover_distance` with other defaults. An empty sequence has distance 1
    to a text.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
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
        x, y, mask, cost, weights, importance, solver, regularization, tolerance
    )


def word_rotator_similarity(
    x: Tensor, y: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """1 − WRD, between −1 and 1: how alike two sequences of vectors are.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
        y: `(m, dim)` or `(..., m, dim)`.
        mask: `None` or pair `(x_mask, y_mask)` of `None` or booleans `(..., n)`
            and `(..., m)`, true for words that count.
        **options: `cost`, `weights`, `importance`, `solver`, `regularization`
            and `tolerance` of `word_rotator_distance`.

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
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
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
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
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
    p, q, D = (_array(a, "exact") for a in (p, q, D))
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
) -> Tensor:
    """The optimal plan of a distance: the mass moved between each two words.

    Args:
        x: `(n, dim)` or `(..., n, dim)`, word vectors, finite.
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
    method = Solver(solver)
    if method.name == "relaxed":
        raise ValueError(
            "The relaxed problem has no plan with both marginals. Expected "
            '`solver` to be "exact" or "sinkhorn". Received: '
            f"solver={method.name!r}"
        )
    texts = Texts.checked(x, y, mask, cost, weights, importance, method.name)
    xp = np if method.name == "exact" else ops
    return method.plan(*texts.problem(xp))[0]


@dataclasses.dataclass(frozen=True)
class Solver:
    """The checked settings of a solver.

    Attributes:
        name: `"exact"`, `"sinkhorn"` or `"relaxed"`.
        regularization: Of `"sinkhorn"`.
        tolerance: Of `"sinkhorn"`.
    """

    name: str
    regularization: float | None = None
    tolerance: float = 1e-3

    def __post_init__(self):
        check_choice("solver", self.name, SOLVERS)
        regularization, tolerance, _ = check_settings(
            self.regularization, self.tolerance
        )
        # Convert to plain floats, so that equal settings are equal keys.
        object.__setattr__(self, "regularization", regularization)
        object.__setattr__(self, "tolerance", tolerance)

    def distance(self, p, q, D):
        """`(...)`: NumPy from NumPy where exact, else a tensor."""
        if self.name == "exact" and isinstance(D, np.ndarray):
            lead = D.shape[:-2]
            flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
            return exact.solve(*flat)[0].reshape(lead)[()]
        return self.differentiable_distance(p, q, D)

    def differentiable_distance(self, p, q, D):
        """The distance as a tensor with a gradient, as the layers need it."""
        if self.name == "relaxed":
            return ops.maximum(*measures.relaxed(ops, p, q, D))
        if self.name == "exact" and not backend.is_concrete(D):
            _refuse()
        plan, potentials = self.plan(p, q, D)
        return envelope(plan, potentials, p, q, D)

    def plan(self, p, q, D):
        """`(plan, (f, g))`."""
        if self.name == "sinkhorn":
            solution = approximate(p, q, D, self.regularization, self.tolerance)
            return solution.plan, solution.potentials
        p, q, D = (_array(a, "exact") for a in (p, q, D))
        lead = D.shape[:-2]
        flat = [a.reshape((-1, *a.shape[len(lead) :])) for a in (p, q, D)]
        _, *solution = exact.solve(*flat, duals=True)
        plan, f, g = (a.reshape((*lead, *a.shape[1:])) for a in solution)
        return plan, (f, g)


def envelope(plan, potentials, p, q, D):
    """⟨plan, D⟩, with the gradient of the optimum by `D`, `p` and `q`.

    At the optimum the plan and the potentials may be treated as constants: the
    derivative by D is the plan, the derivatives by p and q are the potentials.
    """
    plan, f, g = (
        ops.stop_gradient(ops.cast(a, D.dtype)) for a in (plan, *potentials)
    )
    return (
        ops.sum(plan * D, axis=(-2, -1))
        + ops.sum(f * (p - ops.stop_gradient(p)), axis=-1)
        + ops.sum(g * (q - ops.stop_gradient(q)), axis=-1)
    )


@dataclasses.dataclass(frozen=True)
class Texts:
    """Two sequences of word vectors, with the options of their problem.

    Attributes:
        x: `(..., n, dim)`.
        y: `(..., m, dim)`.
        x_mask: `(..., n)`, boolean, or `None`.
        y_mask: `(..., m)`, likewise.
        x_mass: `(..., n)`, for `weights` "importance" and "given"; or `None`.
        y_mass: `(..., m)`, likewise.
        cost: One of `measures.COSTS`.
        weights: One of `measures.WEIGHTS`, or "given".
    """

    x: object
    y: object
    x_mask: object
    y_mask: object
    x_mass: object
    y_mass: object
    cost: str
    weights: str

    @classmethod
    def checked(cls, x, y, mask, cost, weights, importance, solver):
        """Arrays that fit, in NumPy for the exact solver, else tensors."""
        weights = renamed_value("weights", weights, measures.OLD_WEIGHTS)
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
        given = importance if kind == "importance" else weights
        if kind == "importance" and importance is None:
            raise ValueError(
                'Expected `importance` with weights="importance": a pair of '
                "arrays, one number for each word, such as those of "
                "`inverse_document_frequency`. Received: importance=None"
            )
        if kind in ("uniform", "norm"):
            given = (None, None)
        pairs = {
            "mask": (None, None) if mask is None else mask,
            "importance": given,
        }
        for name, pair in pairs.items():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(
                    f"Expected `{name}` to be a pair, one for each text. "
                    f"Received: {name}={pair!r}"
                )
        masks, masses = [], []
        for name, z, z_mask, mass in zip(
            "xy", (x, y), pairs["mask"], given, strict=True
        ):
            if z_mask is not None:
                z_mask = _array(z_mask, solver, "bool")
                check_shape(f"mask of {name}", z_mask, z)
            if mass is not None:
                mass = _array(mass, solver)
                check_shape(f"weights of {name}", mass, z)
                check_mass(f"weights of {name}", mass, z_mask, kind == "given")
            check_words(name, z, z_mask)
            masks.append(z_mask)
            masses.append(mass)
        return cls(x, y, *masks, *masses, cost, kind)

    def arrays(self):
        return (
            self.x,
            self.y,
            self.x_mask,
            self.y_mask,
            self.x_mass,
            self.y_mass,
        )

    def with_arrays(self, arrays):
        return Texts(*arrays, self.cost, self.weights)

    def is_concrete(self):
        return all(a is None or backend.is_concrete(a) for a in self.arrays())

    def padded(self):
        """The same texts, padded with masked words to classes of lengths."""
        n, m = self.x.shape[-2], self.y.shape[-2]
        sizes = length_classes(n, m)
        parts = []
        for z, mask, mass, size in zip(
            (self.x, self.y),
            (self.x_mask, self.y_mask),
            (self.x_mass, self.y_mass),
            sizes,
            strict=True,
        ):
            if mask is None:
                mask = ops.ones(z.shape[:-1], "bool")
            if mass is not None:
                mass = pad_axis(mass, -1, size)
            parts.append(
                (pad_axis(z, -2, size), pad_axis(mask, -1, size), mass)
            )
        (x, x_mask, x_mass), (y, y_mask, y_mass) = parts
        return self.with_arrays((x, y, x_mask, y_mask, x_mass, y_mass))

    def measures(self, xp):
        """`((p, x), (q, y))`: masses, and vectors that are zero if masked."""
        return tuple(
            measures.mass_and_vectors(
                xp, z, mask, self.cost, self.weights, mass
            )
            for z, mask, mass in (
                (self.x, self.x_mask, self.x_mass),
                (self.y, self.y_mask, self.y_mass),
            )
        )

    def problem(self, xp):
        """`(p, q, D)`."""
        (p, x), (q, y) = self.measures(xp)
        return p, q, measures.cost_matrix(xp, x, y, self.cost)


def _array(x, solver, dtype=None):
    """NumPy float64 for the exact solver, else a tensor."""
    x = as_numbers(x)
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
