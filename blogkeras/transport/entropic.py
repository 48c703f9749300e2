"""Entropic transport in batches, with certified bounds, in `keras.ops`."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import as_numbers, as_numpy, check_finite
from blogkeras.loops import ProgramCache
from blogkeras.ops import full_precision_matmul
from blogkeras.transport.checks import check_problem, check_settings, widened
from blogkeras.typing import Tensor

_FACTOR = 4.0  # from one ε to the next
_START = 0.05  # the first ε is at most this
_LOOSE = 0.1  # marginal error at which all but the last ε are left
_DEFAULT = 0.005  # the ε of regularization=None, before it is refined
_REFINEMENTS = 6  # how often it is divided by _FACTOR at most
_APART = 0.05  # bounds that differ by more than this, relatively, ask for it
_CLOSE = 1e-6  # bounds that are as close as this, in units of max|D|, do not
_STRIDE = 5  # iterations between two looks at the error
_PATIENCE = 10  # iterations after which over-relaxation is from 1/2 at 2/3
_SHORT = 8  # words of a text; two such have a program of their own
_BLOCK = 2**15  # costs at work at a time on a CPU
_FAR = 1e30
_programs = ProgramCache(size=16)


class SinkhornSolution(NamedTuple):
    """What `sinkhorn` returns; leading axes are those of `p`.

    Attributes:
        distance: `(...,)`. The cost of `plan`.
        lower: `(...,)`. A certified lower bound of the exact distance.
        upper: `(...,)`. A certified upper bound of the exact distance:
            `distance` plus a bound of the rounding error.
        plan: `(..., n, m)`, with marginals `p` and `q`.
        potentials: Pair `(..., n)`, `(..., m)`: the derivatives of the distance
            by the masses, up to a constant on each side.
        iterations: Scalar integer, of the slowest pair.

    Example:

    >>> solution = sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]])
    >>> np.allclose(ops.sum(solution.plan, axis=-1), [0.5, 0.5])
    True

    Reference:
        [Altschuler et al., 2017](https://arxiv.org/abs/1705.09634), the bounds
    """

    distance: object
    lower: object
    upper: object
    plan: object
    potentials: tuple
    iterations: object


def sinkhorn(
    p: Tensor,
    q: Tensor,
    D: Tensor,
    regularization: float | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 5000,
) -> SinkhornSolution:
    """Approximate transport with a lower and an upper bound, in batches.

    Minimizes ⟨γ, D⟩ + ε KL(γ ‖ p ⊗ q) over all plans γ from p to q, by
    Sinkhorn's iteration, with over-relaxation as long as that reduces the
    error. ε falls by steps to its last value; within a step the iteration runs
    on exp((f + g − D)/ε) with the potentials f and g of the step before, and in
    the log domain where that leaves the range of floats. It stops on the
    marginal error Σᵢ|Σⱼγᵢⱼ − pᵢ|. The plan is then made feasible, so that its
    cost is an upper bound, and the potentials too, so that Σ p f + Σ q g is a
    lower bound: `lower <= exact <= upper` for these `p`, `q` and `D` as they
    are in floating point, however early it stops. On a CPU a large batch is
    solved in blocks that fit into the cache.

    Outside of a compiled function the solver is compiled by itself. That takes
    seconds, so lengths are padded to a few classes: 8 where both are at most
    that, else 16, 32, 64, then multiples of 64, and both sides alike unless one
    is four times as long; texts of any lengths up to 64 share six programs. The
    16 programs used last are kept.

    Args:
        p: `(..., n)`, nonnegative, sum 1. Zeros are words that do not count.
        q: `(..., m)`, likewise.
        D: `(..., n, m)`, finite; float64 stays float64 where the backend has
            it, everything else is computed in float32.
        regularization: Float > 0. The last ε, in units of max|D| of each
            problem, over words with mass. `None`: 0.005; where the two bounds
            then differ by more than 5 % (costs that matter are far below
            max|D|), ε and `tolerance` are divided by 4 up to six times.
        tolerance: Float > 0. The marginal error to stop at.
        max_iterations: Integer. Of each ε.

    Returns:
        `SinkhornSolution`, a named tuple. Nothing in it has a gradient; the
        distance of `wasserstein_distance(p, q, D, solver="sinkhorn")` has.

    Raises:
        ValueError: on shapes that do not fit and, outside of compiled
            functions, on negative or unnormalized weights and on values that
            are not finite.

    Example:

    >>> solution = sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]])
    >>> bool(solution.lower <= 0 <= solution.upper)
    True

    Reference:
        [Cuturi, 2013](https://arxiv.org/abs/1306.0895);
        [Schmitzer, 2019](https://arxiv.org/abs/1610.06519), annealing and
        absorption;
        [Thibault et al., 2021](https://arxiv.org/abs/1711.01851),
        over-relaxation;
        [Altschuler et al., 2017](https://arxiv.org/abs/1705.09634), the
        feasible plan
    """
    settings = check_settings(regularization, tolerance, max_iterations)
    p, q, D = as_tensors(widened(p), widened(q), D)
    check_problem(p, q, D)
    check_finite("D", D)
    return approximate(p, q, D, *settings)


def approximate(p, q, D, regularization, tolerance, max_iterations=5000):
    """`sinkhorn`, unchecked."""
    settings = (regularization, tolerance, max_iterations)
    if backend.BACKEND == "tensorflow":
        # Stop the gradient outside of the compiled function, into which a
        # tape would follow the tensors.
        p, q, D = map(ops.stop_gradient, (p, q, D))
    # Inside a graph of TensorFlow a compiled function would need XLA, with
    # which tf.distribute fails on a CPU.
    if not backend.is_concrete(D):
        return _solve_any_rank(p, q, D, *settings)
    if 0 in D.shape[:-2]:
        nothing = ops.zeros(D.shape[:-2], D.dtype)
        plan, potentials = ops.zeros_like(D), (0 * p, 0 * q)
        return SinkhornSolution(*3 * [nothing], plan, potentials, 0)
    *_lead, n, m = D.shape
    rows, columns = length_classes(n, m)
    p = pad_axis(p, -1, rows)
    q = pad_axis(q, -1, columns)
    D = pad_axis(pad_axis(D, -2, rows), -1, columns)
    program = _programs.get(
        (tuple(D.shape), str(D.dtype), settings),
        lambda: backend.jit(
            lambda p, q, D: _solve_any_rank(p, q, D, *settings)
        ),
    )
    solution = program(p, q, D)
    if (rows, columns) == (n, m):
        return solution
    f, g = solution.potentials
    return solution._replace(
        plan=cut_axes(solution.plan, n, m),
        potentials=(cut_axes(f, n), cut_axes(g, m)),
    )


def length_classes(n, m):
    """Lengths to pad two texts to, so that few programs are compiled."""
    if max(n, m) <= _SHORT:
        return _SHORT, _SHORT
    n, m = _length_class(n), _length_class(m)
    longer = max(n, m)
    return tuple(longer if 4 * size > longer else size for size in (n, m))


def _length_class(n):
    if n > 64:
        return -(-n // 64) * 64
    return max(16, 1 << (n - 1).bit_length())


# Outside of a compiled function a call of `ops.pad`, or to cut a tensor, takes
# as long as solving some hundred small problems. NumPy takes microseconds.


def pad_axis(x, axis, size):
    """Known numbers `x`, padded with zeros to `size` along an axis."""
    if x.shape[axis] == size:
        return x
    padding = [[0, 0]] * len(x.shape)
    padding[axis] = [0, size - x.shape[axis]]
    return ops.convert_to_tensor(np.pad(as_numpy(x), padding))


def cut_axes(x, *sizes):
    """The first elements of known numbers `x` along the last axes."""
    return ops.convert_to_tensor(
        as_numpy(x)[(..., *(slice(size) for size in sizes))]
    )


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
    return SinkhornSolution(*values, iterations)


def as_tensors(*arrays):
    """Tensors of one dtype; TensorFlow does not multiply different ones."""
    dtype = common_dtype(*arrays)
    return [as_tensor(x, dtype) for x in arrays]


def common_dtype(*arrays):
    """Float32; float64 only if one of the arrays is a tensor of that.

    Half precision has too few digits for marginals. NumPy arrays are float64 by
    default, usually without intent.
    """
    wide = any(
        (ops.is_tensor(x) or isinstance(x, keras.KerasTensor))
        and "float64" in str(x.dtype)
        for x in arrays
    )
    return "float64" if wide else "float32"


def as_tensor(x, dtype):
    """A tensor of an array, list or tensor of numbers."""
    return ops.cast(ops.convert_to_tensor(as_numbers(x)), dtype)


def solve(p, q, cost, regularization, tolerance, max_iterations):
    """`sinkhorn` of `(batch, n)`, `(batch, m)` and `(batch, n, m)`."""
    settings = (regularization, tolerance, max_iterations)
    shape = ops.shape(cost)
    if not all(isinstance(size, int) for size in shape) or _accelerated():
        return _solve_block(p, q, cost, *settings)
    batch, size = shape[0], max(1, _BLOCK // (shape[1] * shape[2]))
    if batch <= size:
        return _solve_block(p, q, cost, *settings)

    # Solve one block after the other: a block fits into the cache, and ends
    # with the slowest of its own pairs.
    def zeros(*sizes):
        return ops.zeros((batch, *sizes), cost.dtype)

    def fill(k, iterations, *whole):
        # The last block starts early enough to be a full one.
        first = ops.minimum(k * size, batch - size)

        def part(a):
            start = (first, *[0] * (len(a.shape) - 1))
            return ops.slice(a, start, (size, *a.shape[1:]))

        *found, more = _solve_block(part(p), part(q), part(cost), *settings)
        found = tree.flatten(found)
        whole = [
            ops.slice_update(a, (first, *[0] * (len(a.shape) - 1)), b)
            for a, b in zip(whole, found, strict=True)
        ]
        return k + 1, ops.maximum(iterations, more), *whole

    _, n, m = shape
    whole = [zeros(), zeros(), zeros(), zeros(n, m), zeros(n), zeros(m)]
    _, iterations, *whole, f, g = ops.while_loop(
        lambda k, *_: k * size < batch, fill, (0, 0, *whole)
    )
    return SinkhornSolution(*whole, (f, g), iterations)


def _accelerated():
    """Whether there is a GPU or a TPU, where small blocks are of no use."""
    devices = keras.distribution.list_devices()
    return not all(device.lower().startswith("cpu") for device in devices)


def _solve_block(p, q, cost, regularization, tolerance, max_iterations):
    p, q = p[:, :, None], q[:, None, :]
    rows, columns = p > 0, q > 0
    support = ops.logical_and(rows, columns)
    zero, one = ops.zeros_like(cost), ops.ones_like(cost)
    magnitude = ops.where(support, ops.abs(cost), zero)
    scale = ops.max(magnitude, axis=(1, 2), keepdims=True)
    scale = ops.where(scale > 0, scale, ops.ones_like(scale))
    cost = cost * (1 / scale)
    problem = _Problem(
        p, q, rows, columns, support, ops.where(support, cost, one)
    )

    settings = (regularization, tolerance, max_iterations)
    *state, error, iterations = _anneal(_scale, problem, *settings)

    def in_log_domain():
        *again, _, more = _anneal(_log_scale, problem, *settings)
        return *again, iterations + more

    # Where numbers overflow or vanish, compute in the log domain. The potential
    # of a word of little mass may overflow while the error is finite.
    finite = [ops.all(ops.isfinite(a)) for a in (error, *state[-2:])]
    kernel, s, t, f, g, iterations = ops.cond(
        ops.all(ops.stack(finite)),
        lambda: (*state, iterations),
        in_log_domain,
    )
    plan, distance, lower, f_low, g_low = _certify(problem, kernel, s, t, f)
    # The iteration leaves the potentials of words without mass undefined.
    f, g = ops.where(rows, f, f_low), ops.where(columns, g, g_low)
    # A sum of k terms of size at most 1/k has an error of at most k units in
    # the last place. Masses and their sums have errors of the same size, and so
    # have the costs and the mass that was too small to be spread.
    terms = ops.cast(2 + ops.shape(cost)[1] + ops.shape(cost)[2], cost.dtype)
    slack = 2 * terms * _unit(cost)
    scale = scale[:, :, 0]
    return SinkhornSolution(
        distance * scale[:, 0],
        (lower - slack) * scale[:, 0],
        (distance + slack) * scale[:, 0],
        plan,
        (f[:, :, 0] * scale, g[:, 0, :] * scale),
        iterations,
    )


class _Problem(NamedTuple):
    p: object  # (batch, n, 1)
    q: object  # (batch, 1, m)
    rows: object  # where p > 0
    columns: object  # where q > 0
    support: object  # both
    c: object  # (batch, n, m), at most 1, and 1 outside of the support


def _certify(problem, kernel, s, t, f):
    """A plan and its cost, a lower bound and the potentials it comes from."""
    p, q, rows, columns, _, c = problem
    plan = _round(problem, kernel, s, t)
    # Sum one axis after the other: XLA sums the first one in parallel.
    distance = ops.sum(ops.sum(plan * c, axis=1), axis=1)
    # The largest g with f + g <= c, then the largest f.
    far = _FAR * ops.ones_like(c)
    g = ops.min(ops.where(rows, c - f, far), axis=1, keepdims=True)
    f = ops.min(ops.where(columns, c - g, far), axis=2, keepdims=True)
    lower = ops.sum(p * f, axis=(1, 2)) + ops.sum(q * g, axis=(1, 2))
    return plan, distance, lower, f, g


def _unit(x):
    return float(np.finfo(keras.backend.standardize_dtype(x.dtype)).eps)


def _turn(vector):
    return ops.swapaxes(vector, 1, 2)


def _round(problem, kernel, s, t):
    """The plan p K q / (s t), made feasible (Altschuler et al., algorithm 2).

    Rows and columns are scaled down to at most their mass; then the missing
    mass is spread over all.
    """
    p, q = problem.p, problem.q
    row = p / (
        s * ops.maximum(full_precision_matmul(kernel, _turn(q / t)) / s, 1)
    )
    arrived = full_precision_matmul(_turn(row), kernel)
    column = q / (t * ops.maximum(arrived / t, 1))
    missing_p = p - row * full_precision_matmul(kernel, _turn(column))
    missing_q = q - column * arrived
    missing_p = ops.maximum(missing_p, 0)
    missing_q = ops.maximum(missing_q, 0)
    missing = ops.maximum(
        ops.sum(missing_p, axis=1, keepdims=True),
        ops.sum(missing_q, axis=2, keepdims=True),
    )
    plan = row * kernel * column
    # `missing` is at least one unit in the last place. XLA may compute
    # p - row * x twice, rounded differently, so that a remainder of a few units
    # would be divided by a sum of zero.
    missing = ops.maximum(missing, _unit(plan))
    return plan + missing_p * (missing_q / missing)


def _anneal(step, problem, regularization, tolerance, max_iterations):
    """Runs `step` with each ε in turn: `(kernel, s, t, f, g, error, count)`."""
    schedule = [regularization or _DEFAULT]
    while schedule[0] * _FACTOR <= _START:
        schedule.insert(0, schedule[0] * _FACTOR)
    count = len(schedule)
    goals = [max(tolerance, _LOOSE)] * (count - 1) + [tolerance]
    refined = 0 if regularization else _REFINEMENTS
    for k in range(1, refined + 1):
        # A marginal error costs as much as ε does.
        schedule.append(_DEFAULT / _FACTOR**k)
        goals.append(tolerance / _FACTOR**k)
    # Every row and every column of the first kernel has a 1.
    c = problem.c
    f = ops.min(c, axis=2, keepdims=True)
    g = ops.min(c - f, axis=1, keepdims=True)
    schedule, goals = (
        ops.convert_to_tensor(a, c.dtype) for a in (schedule, goals)
    )

    def apart(kernel, s, t, f):
        _, upper, lower, *_ = _certify(problem, kernel, s, t, f)
        enough = ops.maximum(_APART * ops.abs(upper), _CLOSE)
        return ops.any(upper - lower > enough)

    def stage(index, _, *state):
        *_, f, g, _, iterations = state
        *state, more = step(
            problem,
            f,
            g,
            ops.take(schedule, index),
            ops.take(goals, index),
            max_iterations,
        )
        kernel, s, t, f, *_ = state
        index = index + 1
        again = index < count
        if refined:
            # The bounds cost as much as an iteration: only after the last ε.
            again = ops.cond(
                again, lambda: again, lambda: apart(kernel, s, t, f)
            )
        return index, again, *state, iterations + more

    error = ops.zeros_like(f[:, 0, None])  # of a known size, as in _iterate
    state = 0, True, ops.zeros_like(c), f, g, f, g, error, 0
    if count + refined == 1:
        return stage(*state)[2:]
    # A loop over ε, so that the step is compiled only once.
    return ops.while_loop(
        lambda index, again, *_: ops.logical_and(
            again, index < count + refined
        ),
        stage,
        state,
    )[2:]


def _iterate(halves, limit, change, s, t, problem, goal, max_iterations):
    """Corrects rows and columns in turn until all errors are at most `goal`.

    Over-relaxed (Thibault et al.): each correction is extended by a weight that
    grows. That takes a third of the iterations or less.

    Args:
        halves: Pair of functions, t to s and s to t.
        limit: `limit(beyond, new)`, the bounded extension.
        change: `change(new, old)`, the error of a column of mass 1.

    Returns:
        `(s, t, error, iterations)`.
    """
    rows, columns = halves

    def unfinished(iterations, error, *_):
        # A problem that failed is solved in the log domain.
        left = ops.logical_and(ops.isfinite(error), error > goal)
        return ops.logical_and(iterations < max_iterations, ops.any(left))

    def repeat(iterations, error, best, s, t):
        weight = 1 - 1 / (2 + ops.cast(iterations, s.dtype) / _PATIENCE)
        # Where the error has grown, the next iterations are without
        # over-relaxation.
        weight = weight * ops.cast(error <= best, s.dtype)
        for _ in range(_STRIDE - 1):
            new = rows(t)
            s = limit(new + weight * (new - s), new)
            new = columns(s)
            t = limit(new + weight * (new - t), new)
        s = rows(t)
        new = columns(s)
        # The error of the rows is at most that of the columns before.
        off = problem.q * ops.abs(change(new, t))
        best = ops.minimum(best, error)
        error = ops.sum(off, axis=2, keepdims=True)
        return iterations + _STRIDE, error, best, s, new

    # Of s[:, :1] TensorFlow would not know the size, where it does not know
    # that of s, and a loop has to keep what is known.
    first = ops.full_like(s[:, 0, None], 2)
    iterations, error, _, s, t = ops.while_loop(
        unfinished, repeat, (0, first, first, s, t)
    )
    return s, t, error, iterations


def _kernel(problem, f, g, epsilon, largest=None):
    exponent = (f + g - problem.c) / epsilon
    if largest is not None:
        exponent = ops.minimum(exponent, largest)
    return ops.where(
        problem.support, ops.exp(exponent), ops.zeros_like(exponent)
    )


def _scale(problem, f, g, epsilon, goal, max_iterations):
    """γ = p K q / (s t) with fixed K; s and t correct rows and columns."""
    p, q = problem.p, problem.q
    kernel = _kernel(problem, f, g, epsilon)
    idle_rows = 1 - ops.cast(problem.rows, p.dtype)
    idle_columns = 1 - ops.cast(problem.columns, p.dtype)

    s, t, error, iterations = _iterate(
        (
            lambda t: full_precision_matmul(kernel, _turn(q / t)) + idle_rows,
            lambda s: (
                full_precision_matmul(_turn(p / s), kernel) + idle_columns
            ),
        ),
        lambda beyond, new: ops.maximum(beyond, new / 4),
        lambda new, old: new / old - 1,
        ops.ones_like(f),
        ops.ones_like(g),
        problem,
        goal,
        max_iterations,
    )
    f, g = f - epsilon * ops.log(s), g - epsilon * ops.log(t)
    return kernel, s, t, f, g, error, iterations


def _log_scale(problem, f, g, epsilon, goal, max_iterations):
    """The same in the log domain, on f and g: slower, never out of range."""
    p, q, rows, columns, support, c = problem
    floor = -_FAR * ops.ones_like(c)
    log_p = ops.log(ops.where(rows, p, ops.ones_like(p)))
    log_q = ops.log(ops.where(columns, q, ops.ones_like(q)))

    def transform(potential, log_mass, axis, used):
        z = ops.where(support, (potential - c) / epsilon + log_mass, floor)
        new = -epsilon * ops.logsumexp(z, axis=axis, keepdims=True)
        return ops.where(used, new, ops.zeros_like(new))

    f, g, error, iterations = _iterate(
        (
            lambda g: transform(g, log_q, 2, rows),
            lambda f: transform(f, log_p, 1, columns),
        ),
        lambda beyond, new: beyond,
        lambda new, old: ops.exp((old - new) / epsilon) - 1,
        f,
        g,
        problem,
        goal,
        max_iterations,
    )
    # This keeps the plan finite for any f and g.
    kernel = _kernel(problem, f, g, epsilon, largest=80.0)
    return kernel, ops.ones_like(f), ops.ones_like(g), f, g, error, iterations
