"""Entropic transport in batches, with a certificate, in `keras.ops`."""

import functools
from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.transport.checks import (
    check_finite,
    check_problem,
    check_settings,
)

_FACTOR = 4.0  # from one ε to the next
_START = 0.1  # the first ε is at most this
_LOOSE = 0.1  # marginal error at which all but the last ε are left
_STRIDE = 5  # iterations between two looks at the error
_FAR = 1e30


class Solution(NamedTuple):
    """What `sinkhorn` returns; leading axes are those of `p`.

    Attributes:
        distance: `(...,)`. The cost of `plan`.
        lower: `(...,)`. Below the exact distance, certainly.
        upper: `(...,)`. Above the exact distance, certainly: `distance` plus
            what rounding may have cost.
        plan: `(..., n, m)`, with marginals `p` and `q`.
        potentials: Pair `(..., n)`, `(..., m)`: what a little more mass of a
            word costs, up to a constant on each side.
        iterations: Scalar integer, of the whole batch.
    """

    distance: object
    lower: object
    upper: object
    plan: object
    potentials: tuple
    iterations: object


def sinkhorn(
    p, q, D, regularization=0.005, tolerance=1e-3, max_iterations=5000
):
    """Approximate transport with a lower and an upper bound, in batches.

    Minimizes ⟨γ, D⟩ + ε KL(γ ‖ p ⊗ q) over all plans γ from p to q, by
    Sinkhorn's iteration. ε falls by steps to its last value; within a step the
    iteration runs on exp((f + g − D)/ε) with the potentials f and g of the step
    before, and in the log domain where that leaves the range of floats. It
    stops on the marginal error Σᵢ|Σⱼγᵢⱼ − pᵢ|. The plan is then made feasible,
    so that its cost is an upper bound, and the potentials too, so that
    Σ p f + Σ q g is a lower bound: `lower <= exact <= upper` for these `p`, `q`
    and `D` as they are in floating point, however early it stops.

    Outside of a compiled function the solver is compiled by itself, once for
    each shape.

    Args:
        p: `(..., n)`, nonnegative, sum 1. Zeros are words that do not count.
        q: `(..., m)`, likewise.
        D: `(..., n, m)`, finite; float64 stays float64 where the backend has
            it, everything else is computed in float32.
        regularization: Float > 0. The last ε, in units of max|D| of each
            problem. Below 0.001 float32 has too few digits.
        tolerance: Float > 0. The marginal error to stop at.
        max_iterations: Integer. Of each ε.

    Raises:
        ValueError: as `wasserstein_distance`.

    Returns:
        `Solution`, a named tuple. Nothing in it has a gradient: `distance` of
        `wasserstein_distance(p, q, D, solver="sinkhorn")` has.

    Example:

    >>> solution = sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]])
    >>> solution.lower <= 0 <= solution.upper
    True

    Reference:
        [Cuturi, 2013](https://arxiv.org/abs/1306.0895);
        [Schmitzer, 2019](https://arxiv.org/abs/1610.06519), annealing and
        absorption;
        [Altschuler et al., 2017](https://arxiv.org/abs/1705.09634), the
        feasible plan
    """
    check_settings(regularization, tolerance, max_iterations)
    p, q, D = map(as_tensor, (p, q, D))
    check_problem(p, q, D)
    solution = approximate(p, q, D, regularization, tolerance, max_iterations)
    # One look at the distances tells the same of all the costs.
    check_finite("D (its distances are not)", solution.distance)
    return solution


def approximate(p, q, D, regularization, tolerance, max_iterations=5000):
    """`sinkhorn`, unchecked."""
    settings = (regularization, tolerance, max_iterations)
    if backend.BACKEND == "tensorflow":
        # Here: a tape would follow them into the compiled function.
        p, q, D = map(ops.stop_gradient, (p, q, D))
    # Inside a graph of TensorFlow a compiled function would force XLA on it,
    # which tf.distribute does not bear on CPU.
    if backend.BACKEND == "jax" or backend.is_concrete(D):
        return _compiled(*settings)(p, q, D)
    return _solve_any_rank(p, q, D, *settings)


@functools.cache
def _compiled(*settings):
    return backend.jit(lambda p, q, D: _solve_any_rank(p, q, D, *settings))


def _solve_any_rank(p, q, D, *settings):
    p, q, D = (ops.stop_gradient(ops.cast(a, D.dtype)) for a in (p, q, D))
    shape = tuple(ops.shape(D)[:-2])
    flat = (
        ops.reshape(a, (-1, *ops.shape(a)[len(shape) :])) for a in (p, q, D)
    )
    *values, iterations = solve(*flat, *settings)
    values = tree.map_structure(
        lambda a: ops.reshape(a, (*shape, *ops.shape(a)[1:])), values
    )
    return Solution(*values, iterations)


def as_tensor(x, dtype=None):
    """A tensor of float32; of float64 only if `x` is a tensor of that."""
    if dtype is None:
        # Half precision has too few digits for marginals, and NumPy's default
        # is float64, which Keras users do not mean.
        wide = "float64" in str(getattr(x, "dtype", ""))
        wide = wide and not isinstance(x, np.ndarray | np.generic)
        dtype = "float64" if wide else "float32"
    return ops.cast(ops.convert_to_tensor(x), dtype)


def solve(p, q, cost, regularization, tolerance, max_iterations):
    """`sinkhorn` of `(batch, n)`, `(batch, m)` and `(batch, n, m)`."""
    p, q = p[:, :, None], q[:, None, :]
    rows, columns = p > 0, q > 0
    support = ops.logical_and(rows, columns)
    zero, one = ops.zeros_like(cost), ops.ones_like(cost)
    magnitude = ops.where(support, ops.abs(cost), zero)
    scale = ops.max(magnitude, axis=(1, 2), keepdims=True)
    scale = ops.where(scale > 0, scale, ops.ones_like(scale))
    cost = cost / scale
    c = ops.where(support, cost, one)

    schedule = [regularization]
    while schedule[0] * _FACTOR <= _START:
        schedule.insert(0, schedule[0] * _FACTOR)
    problem = _Problem(p, q, rows, columns, support, c)
    f, g, error, iterations = _anneal(
        _scale, problem, schedule, tolerance, max_iterations
    )
    # Where a number left the range of floats, and only then, the log domain
    # has iterations to make.
    failed = ops.logical_not(ops.isfinite(error))
    f_log, g_log, _, more = _anneal(
        _log_scale,
        problem,
        schedule,
        tolerance,
        ops.where(ops.any(failed), max_iterations, 0),
    )
    f, g = ops.where(failed, f_log, f), ops.where(failed, g_log, g)

    # No row and no column gets more than its mass; what is then missing is
    # spread over all (Altschuler et al., algorithm 2).
    # Whatever f and g are, the plan stays finite.
    kernel = _kernel(problem, f, g, regularization, largest=80.0)
    row = p / ops.maximum(ops.sum(kernel * q, axis=2, keepdims=True), 1)
    arrived = ops.sum(kernel * row, axis=1, keepdims=True)
    column = q / ops.maximum(arrived, 1)
    missing_p = p - row * ops.sum(kernel * column, axis=2, keepdims=True)
    missing_q = q - column * arrived
    missing_p = ops.maximum(missing_p, 0)
    missing_q = ops.maximum(missing_q, 0)
    missing = ops.maximum(
        ops.sum(missing_p, axis=1, keepdims=True),
        ops.sum(missing_q, axis=2, keepdims=True),
    )
    plan = row * kernel * column
    plan = plan + missing_p * (missing_q / ops.maximum(missing, 1e-30))

    # The largest g with f + g <= c, then the largest f.
    far = _FAR * one
    g_low = ops.min(ops.where(rows, cost - f, far), axis=1, keepdims=True)
    f_low = ops.min(
        ops.where(columns, cost - g_low, far), axis=2, keepdims=True
    )
    lower = ops.sum(p * f_low, axis=(1, 2)) + ops.sum(q * g_low, axis=(1, 2))
    # The iteration says nothing on words without mass.
    f, g = ops.where(rows, f, f_low), ops.where(columns, g, g_low)
    distance = ops.sum(plan * c, axis=(1, 2))
    # A sum of k terms of size at most 1/k is off by at most k units in the
    # last place; masses, and their sums, are off likewise.
    terms = ops.cast(ops.shape(c)[1] + ops.shape(c)[2], c.dtype)
    unit = np.finfo(keras.backend.standardize_dtype(c.dtype)).eps
    slack = 2 * terms * float(unit)
    scale = scale[:, :, 0]
    return Solution(
        distance * scale[:, 0],
        (lower - slack) * scale[:, 0],
        (distance + slack) * scale[:, 0],
        plan,
        (f[:, :, 0] * scale, g[:, 0, :] * scale),
        iterations + more,
    )


class _Problem(NamedTuple):
    p: object  # (batch, n, 1)
    q: object  # (batch, 1, m)
    rows: object  # where p > 0
    columns: object  # where q > 0
    support: object  # both
    c: object  # (batch, n, m), at most 1, and 1 outside of the support


def _anneal(step, problem, schedule, tolerance, max_iterations):
    """Runs `step` with each ε in turn: `(f, g, error, iterations)`."""
    c = problem.c
    # Every row and every column of the first kernel has a 1.
    f = ops.min(c, axis=2, keepdims=True)
    g = ops.min(c - f, axis=1, keepdims=True)
    count = len(schedule)
    schedule = ops.convert_to_tensor(schedule, c.dtype)

    def stage(index, f, g, error, iterations):
        last = ops.equal(index, count - 1)
        goal = ops.where(last, tolerance, max(tolerance, _LOOSE))
        f, g, error, more = step(
            problem,
            f,
            g,
            ops.take(schedule, index),
            ops.cast(goal, c.dtype),
            max_iterations,
        )
        return index + 1, f, g, error, iterations + more

    return ops.while_loop(
        lambda index, *_: index < count,
        stage,
        (0, f, g, ops.zeros_like(f[:, :1]), 0),
    )[1:]


def _iterate(body, state, goal, max_iterations, like):
    """`body(*state) -> (*state, error)` until all errors are at the goal."""

    def unfinished(iterations, error, *_):
        # One that failed is left to the log domain.
        left = ops.logical_and(ops.isfinite(error), error > goal)
        return ops.logical_and(iterations < max_iterations, ops.any(left))

    def repeat(iterations, error, *state):
        *state, error = body(*state)
        return (iterations + _STRIDE, error, *state)

    first = ops.full_like(like[:, :1], 2)
    iterations, error, *state = ops.while_loop(
        unfinished, repeat, (0, first, *state)
    )
    return state, error, iterations


def _kernel(problem, f, g, epsilon, largest=None):
    exponent = (f + g - problem.c) / epsilon
    if largest is not None:
        exponent = ops.minimum(exponent, largest)
    return ops.where(
        problem.support, ops.exp(exponent), ops.zeros_like(exponent)
    )


def _scale(problem, f, g, epsilon, goal, max_iterations):
    """γ = p K q / (s t), with K fixed: s and t in turn repair rows, columns."""
    p, q, rows, columns, _, c = problem
    kernel = _kernel(problem, f, g, epsilon)
    idle_rows = 1 - ops.cast(rows, c.dtype)
    idle_columns = 1 - ops.cast(columns, c.dtype)

    def turn(column):
        return ops.swapaxes(column, 1, 2)

    def body(s, t):
        for _ in range(_STRIDE):
            before = s
            s = ops.matmul(kernel, turn(q / t)) + idle_rows
            t = ops.matmul(turn(p / s), kernel) + idle_columns
        # The rows, just before the last repair.
        error = ops.sum(p * ops.abs(s / before - 1), axis=1, keepdims=True)
        return s, t, error

    start = (ops.ones_like(f), ops.ones_like(g))
    (s, t), error, iterations = _iterate(body, start, goal, max_iterations, f)
    return (
        f - epsilon * ops.log(s),
        g - epsilon * ops.log(t),
        error,
        iterations,
    )


def _log_scale(problem, f, g, epsilon, goal, max_iterations):
    """The same on f and g themselves: slower, and in range whatever comes."""
    p, q, rows, columns, support, c = problem
    floor = -_FAR * ops.ones_like(c)
    log_p = ops.log(ops.where(rows, p, ops.ones_like(p)))
    log_q = ops.log(ops.where(columns, q, ops.ones_like(q)))

    def transform(potential, log_mass, axis, used):
        z = ops.where(support, (potential - c) / epsilon + log_mass, floor)
        new = -epsilon * ops.logsumexp(z, axis=axis, keepdims=True)
        return ops.where(used, new, ops.zeros_like(new))

    def body(f, g):
        for _ in range(_STRIDE):
            before = f
            f = transform(g, log_q, 2, rows)
            g = transform(f, log_p, 1, columns)
        ratio = ops.exp((before - f) / epsilon)
        error = ops.sum(p * ops.abs(ratio - 1), axis=1, keepdims=True)
        return f, g, error

    (f, g), error, iterations = _iterate(body, (f, g), goal, max_iterations, f)
    return f, g, error, iterations
