"""k-means in one compiled loop, to initialize codebooks."""

from keras import ops

from blogkeras import backend
from blogkeras.arguments import check_integer, check_verbose
from blogkeras.loops import ProgramCache, loop_program, run_steps
from blogkeras.quantization.nearest import nearest_codes

_PROGRAMS = ProgramCache(8)


def check(iterations, seed, verbose):
    """The arguments of `adapt`, checked."""
    return (
        check_integer("iterations", iterations, minimum=1),
        check_integer("seed", seed, minimum=0),
        check_verbose(verbose),
    )


def k_means(z, means, iterations, project, verbose):
    """Lloyd's iterations.

    A cluster that is left empty goes to the vector farthest from its mean, a
    second one to the next, and so on.

    Args:
        z: `(n, dim)`, float32.
        means: `(k, dim)`, k ≤ n, to start from.
        iterations: Integer ≥ 1.
        project: Function of means that is applied after each iteration.
        verbose: As for `run_steps`.

    Returns:
        `(k, dim)`.
    """

    def step(_, means, z):
        counts, sums, farthest = _assign(z, means)
        empty = counts == 0
        rank = ops.maximum(ops.cumsum(ops.cast(empty, "int32")) - 1, 0)
        return ops.where(
            empty[:, None],
            ops.take(z, ops.take(farthest, rank), axis=0),
            project(sums / ops.maximum(counts, 1)[:, None]),
        )

    program = _program("k_means", z, means, project, step, loop_program)
    return run_steps(program, means, iterations, z, verbose=verbose)


def cluster_sizes(z, means):
    """How many vectors each mean is nearest to; `(k,)`, float32."""

    def sizes(z, means):
        weights = ops.ones_like(z[:, 0])
        return ops.segment_sum(weights, nearest_codes(z, means), means.shape[0])

    return _program("sizes", z, means, None, sizes)(z, means)


def nearest_means(z, means, project):
    """The nearest mean of each vector; `(n, dim)`.

    Args:
        z: `(n, dim)`, float32.
        means: `(k, dim)`.
        project: Function of vectors and means before they are compared, or
            `None`.
    """

    def nearest(z, means):
        compared = (z, means) if project is None else map(project, (z, means))
        return ops.take(means, nearest_codes(*compared), axis=0)

    return _program("nearest", z, means, project, nearest)(z, means)


def _program(name, z, means, project, fn, compiled=None):
    key = name, tuple(z.shape), tuple(means.shape), project
    if compiled is None:
        return _PROGRAMS.get(key, lambda: backend.jit(fn))
    return _PROGRAMS.get(key, lambda: compiled(fn, backend.jit))


def _assign(z, means):
    """Counts and sums of clusters, and the vectors farthest from their mean."""
    size = means.shape[0]
    nearest = nearest_codes(z, means)
    counts = ops.segment_sum(ops.ones_like(z[:, 0]), nearest, size)
    sums = ops.segment_sum(z, nearest, size)
    error = ops.sum(ops.square(z - ops.take(means, nearest, axis=0)), axis=-1)
    return counts, sums, ops.top_k(error, size)[1]
