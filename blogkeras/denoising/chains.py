"""Runs the chains of a kernel in one compiled loop; reports divergence."""

import warnings
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from blogkeras import backend, models
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_boolean,
)
from blogkeras.denoising.base import (
    DenoisingModel,
    as_floats,
    check_not_rows,
    has_rows,
)
from blogkeras.denoising.kernels import choose
from blogkeras.loops import ProgramCache, loop_program, run_steps
from blogkeras.state import StepSeed, base_seed

# A chain whose positions are this many times as large as the largest start has
# diverged. It is stopped long before its numbers overflow.
EXPLODED = 1e9
# A mean probability of acceptance below this share is worth a warning.
_HARDLY_ANY = 0.01


class Samples(NamedTuple):
    """What a sampler returns.

    Attributes:
        x: NumPy array, `(chains, ...)`: the last position of each chain, always
            finite.
        acceptance_rate: Float. Mean share of accepted proposals; 1 for the
            samplers that accept all.
        num_non_finite: Integer. How many chains met numbers that are not
            finite. Those of Langevin dynamics have stopped where they were
            before; those of MALA and HMC have rejected the proposal.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> samples = langevin(log_density, np.zeros((4, 2)), 10, 0.1, seed=0)
    >>> samples.x.shape, samples.acceptance_rate, samples.num_non_finite
    ((4, 2), 1.0, 0)

    Reference:
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    x: np.ndarray
    acceptance_rate: float
    num_non_finite: int


def _owner(log_density):
    """The layer that a log-density is, or is a method of; else `None`."""
    owner = getattr(log_density, "__self__", log_density)
    return owner if isinstance(owner, keras.layers.Layer) else None


def compiler(log_density):
    """Compiles functions that call `log_density`: `backend.jit` or the like.

    The variables of a layer, or of a layer whose method it is, are read at each
    call. A plain function is compiled with the present values of variables. A
    model's own `compile` decides about XLA and `run_eagerly`.
    """
    owner = _owner(log_density)
    if owner is None:
        return backend.jit
    return lambda fn: models.compiled(owner, fn)


def compiled(log_density, key, make):
    """What `make` returns, kept by a layer that keeps its programs."""
    cache = getattr(_owner(log_density), "_programs", None)
    if not isinstance(cache, ProgramCache):
        return make()
    # A layer may be a log-density itself, and have methods that are others.
    method = getattr(log_density, "__func__", type(log_density))
    return cache.get((method, *key), make)


def check_log_density(log_density):
    """An error for what cannot be compiled as a log-density."""
    if not callable(log_density):
        raise ValueError(
            "Expected a function or model that returns log-densities. "
            f"Received: log_density={log_density!r}"
        )
    check_not_rows("log_density", log_density)
    owner = _owner(log_density)
    name = getattr(log_density, "__name__", None)
    if isinstance(owner, DenoisingModel) and name == "log_density":
        raise ValueError(
            "Expected a log-density that takes and returns tensors: give the "
            "model itself. Received: its method `log_density`, which returns "
            "NumPy arrays"
        )


def first_call(log_density, call):
    """The result of `call`, the first one of a log-density in a program."""
    try:
        return call()
    except (TypeError, NotImplementedError) as error:
        # What JAX and TensorFlow say where NumPy gets a symbolic tensor.
        if "numpy" not in str(error):
            raise
        raise ValueError(
            "Expected a log-density of `keras.ops`, or of the backend's own "
            "operations, which can be differentiated and compiled. Received: "
            f"{log_density!r}, which makes NumPy arrays of tensors"
        ) from error


def make_weights(log_density, x):
    """Calls a layer that was never called, outside of compiled programs."""
    owner = _owner(log_density)
    if owner is not None and not owner.built:
        log_density(ops.convert_to_tensor(x[:1], "float32"))


def check_start(log_density, x):
    """Positions as float32 in NumPy; errors for what cannot be a start."""
    check_log_density(log_density)
    x = as_numpy(as_numbers(x, "x"))
    if not has_rows(x):
        raise ValueError(
            "Expected starting points of shape (chains, ...), at least one. "
            f"Received: x of shape {x.shape} and dtype {x.dtype}"
        )
    return as_floats("x", x)


def run_chains(
    name,
    key,
    make_kernel,
    log_density,
    x,
    num_steps,
    constants,
    schedule=None,
    *,
    seed=None,
    allow_non_finite=False,
    verbose=0,
):
    """Runs a kernel for `num_steps` steps on all chains, in one program.

    Args:
        name: String. The sampler's name, for messages and the cache.
        key: Hashable. What else the program depends on.
        make_kernel: Function without arguments that returns a `Kernel`.
        log_density: As given by the user.
        x: Starting points.
        num_steps: Integer.
        constants: Tensors for each step.
        schedule: Function `(index, *constants)` that returns the arguments of
            the kernel's step. Defaults to the constants themselves.
        seed, allow_non_finite, verbose: As for the samplers.

    Returns:
        `Samples`.
    """
    check_boolean("allow_non_finite", allow_non_finite)
    start = check_start(log_density, x)
    x = ops.convert_to_tensor(start)
    seed = base_seed(seed)
    make_weights(log_density, x)
    kernel = make_kernel()
    adjusted = name in ("mala", "hmc")

    def step(index, state, seed, limit, *constants):
        chain, accepted, broken, since = state
        draws = StepSeed(seed, index)
        arguments = schedule(index, *constants) if schedule else constants
        new, share, bad = kernel.step(chain, draws, *arguments)
        far = ops.any(
            ops.reshape(ops.abs(new[0]) > limit, (ops.shape(bad)[0], -1)), -1
        )
        bad = ops.logical_or(bad, far)
        first = ops.logical_and(ops.any(bad), since < 0)
        return (
            choose(ops.logical_not(far), new, chain),
            accepted + ops.mean(share),
            ops.logical_or(broken, bad),
            ops.where(first, index, since),
        )

    def make():
        compile = compiler(log_density)
        return compile(kernel.init), loop_program(step, compile)

    init, program = compiled(log_density, (name, key, tuple(x.shape)), make)
    # MALA and HMC reject what is far too unlikely, so nothing is too far.
    limit = np.inf if adjusted else EXPLODED * max(1.0, float(abs(start).max()))
    chain = first_call(log_density, lambda: init(x))
    for what, values in zip(
        ("log-densities", "scores"), chain[1:], strict=True
    ):
        values = ops.convert_to_numpy(values)
        if not np.isfinite(values).all():
            raise ValueError(
                f"Expected finite {what} at the starting points. Received: "
                f"{values[:3]} ..."
            )
    state = (
        chain,
        ops.zeros((), "float32"),
        ops.zeros((x.shape[0],), "bool"),
        ops.convert_to_tensor(-1, "int32"),
    )

    def check(done, state):
        broken = ops.convert_to_numpy(state[2])
        # A rejected proposal does no harm, unless all are rejected.
        hopeless = broken.all() and float(state[1]) == 0 if adjusted else True
        if broken.any() and hopeless and not allow_non_finite:
            points = ops.convert_to_numpy(state[0][0])
            norms = np.linalg.norm(points.reshape(len(points), -1), axis=-1)
            raise FloatingPointError(
                f"{name} diverged at step {int(state[3])}: "
                f"{int(broken.sum())} of {len(broken)} chains, the largest "
                f"‖x‖ before it {norms.max():.3g}. Take a smaller step_size; "
                "if none helps, log_density may be an energy, which has the "
                "opposite sign, or be finite on a part of the space only, "
                "where `mala` and `hmc` stay inside. "
                f"{_received_step_size(constants)}"
            )

    state = run_steps(
        program,
        state,
        num_steps,
        seed,
        ops.convert_to_tensor(limit, "float32"),
        *constants,
        chunk_size=num_steps if verbose == 0 else None,
        verbose=verbose,
        check=check,
    )
    chain, accepted, broken, _ = state
    rate = float(accepted) / num_steps if num_steps else float(not adjusted)
    if num_steps and rate < _HARDLY_ANY:
        warnings.warn(
            f"{name} accepted hardly any proposal (rate {rate:.2g}), so the "
            "chains stayed near where they started. Take a smaller step_size. "
            f"{_received_step_size(constants)}",
            stacklevel=3,
        )
    return Samples(
        ops.convert_to_numpy(chain[0]),
        rate,
        int(ops.convert_to_numpy(broken).sum()),
    )


def _received_step_size(constants):
    first = ops.convert_to_numpy(constants[0])
    return f"Received: step_size={float(first.ravel()[0]):.3g}"
