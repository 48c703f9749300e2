"""Markov chains on a log-density, each run in one compiled loop.

A kernel is a pair of pure functions `(init, step)`:

    state = init(x)
    state, accepted, broken = step(state, seed)

The state is a tuple that begins with the positions `(chains, ...)`, the
log-density `(chains,)` and its gradient there. `accepted` is a share between 0
and 1 for each chain, `broken` says where the step led to numbers that are not
finite.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_boolean,
    check_finite,
    check_integer,
    check_number,
    check_seed,
)
from blogkeras.denoising.energy import log_density_and_score
from blogkeras.loops import ProgramCache, loop_program, run_steps
from blogkeras.state import StepSeed
from blogkeras.typing import Tensor

# A chain this many times farther out than it began has exploded, long before
# its numbers overflow.
EXPLODED = 1e9


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
    """

    x: np.ndarray
    acceptance_rate: float
    num_non_finite: int


class Kernel(NamedTuple):
    """A Markov chain: `init(x) -> state`, `step(state, seed, ...)`."""

    init: object
    step: object


def _per_chain(values, like):
    """`(chains,)` shaped so that it broadcasts with `like`."""
    return ops.reshape(values, [-1] + [1] * (len(like.shape) - 1))


def sum_rows(x):
    """Σ over all axes but the first."""
    return ops.sum(ops.reshape(x, (ops.shape(x)[0], -1)), axis=-1)


def _is_finite(x, values):
    """For each chain, whether position and log-density are finite."""
    x = ops.reshape(x, (ops.shape(x)[0], -1))
    return ops.logical_and(
        ops.all(ops.isfinite(x), axis=-1), ops.isfinite(values)
    )


def _choose(accept, new, old):
    """The new state where a chain accepts, else the old one."""
    return tuple(
        ops.where(_per_chain(accept, a), a, b)
        for a, b in zip(new, old, strict=True)
    )


def langevin_kernel(log_density):
    """Unadjusted Langevin dynamics: x ← x + ½ε ∇log p(x) + √(εT) N(0, 1).

    The step takes `(state, seed, step_size, temperature)`.
    """

    def init(x):
        return (x, *log_density_and_score(log_density, x))

    def step(state, seed, step_size, temperature):
        x, _, score = state
        noise = keras.random.normal(ops.shape(x), seed=seed)
        new_x = x + 0.5 * step_size * score
        new = init(new_x + ops.sqrt(step_size * temperature) * noise)
        fine = _is_finite(new[2], new[1])
        # What has broken stays where it was: no NaN reaches a picture.
        accepted = ops.ones_like(new[1])
        return _choose(fine, new, state), accepted, ops.logical_not(fine)

    return Kernel(init, step)


def annealed_langevin_kernel(log_density, conditional):
    """Langevin dynamics whose temperature or density changes from step to step.

    The step takes `(state, seed, step_size, temperature, sigma, known, mask,
    known_sigma)`: where `mask` is 1 the position is `known` plus noise of
    `known_sigma`. The gradient is taken at the head of the step, for the
    density of that step; the one in the state is that of the step before.
    """

    def init(x, sigma=None):
        if not conditional:
            return (x, *log_density_and_score(log_density, x))
        if sigma is None:
            sigma = ops.ones((), "float32")
        sigmas = ops.broadcast_to(sigma, (ops.shape(x)[0],))
        return (
            x,
            *log_density_and_score(lambda x: log_density(x, sigmas), x),
        )

    def step(
        state, seed, step_size, temperature, sigma, known, mask, known_sigma
    ):
        x = state[0]
        shape = ops.shape(x)
        seen = known + known_sigma * keras.random.normal(shape, seed=seed)
        x, value, score = init(ops.where(mask > 0, seen, x), sigma)
        noise = keras.random.normal(shape, seed=seed)
        new_x = x + 0.5 * step_size * score
        new_x = new_x + ops.sqrt(step_size * temperature) * noise
        fine = _is_finite(new_x, value)
        accepted = ops.ones_like(value)
        new = (new_x, value, score)
        return _choose(fine, new, state), accepted, ops.logical_not(fine)

    return Kernel(init, step)


def mala_kernel(log_density):
    """Langevin proposals, accepted or rejected: exact for any step size.

        x' = x + ½ε ∇log p(x) + √ε N(0, 1)
        accept with min(1, p(x') q(x | x') / (p(x) q(x' | x)))

    The step takes `(state, seed, step_size, temperature)`; the target is
    p^(1/T).
    """

    def init(x):
        return (x, *log_density_and_score(log_density, x))

    def step(state, seed, step_size, temperature):
        x, value, score = state
        noise = keras.random.normal(ops.shape(x), seed=seed)
        drift = 0.5 * step_size / temperature
        new_x = x + drift * score + ops.sqrt(step_size) * noise
        new = init(new_x)
        # ‖x' − x − drift‖² / 2ε of the way there is ‖noise‖² / 2.
        back = x - new_x - drift * new[2]
        log_ratio = (
            (new[1] - value) / temperature
            - sum_rows(ops.square(back)) / (2 * step_size)
            + sum_rows(ops.square(noise)) / 2
        )
        return metropolis(state, new, log_ratio, seed)

    return Kernel(init, step)


def hmc_kernel(log_density, num_leapfrog):
    """Hamiltonian dynamics by the leapfrog, accepted or rejected.

    A fresh momentum r ~ N(0, 1) for every step, whether the last one was
    accepted or not; half a step of momentum first and last, so that the
    dynamics can be run backwards. The step takes `(state, seed, step_size,
    temperature)`; the target is p^(1/T).
    """

    def init(x):
        return (x, *log_density_and_score(log_density, x))

    def step(state, seed, step_size, temperature):
        x, value, score = state
        momentum = keras.random.normal(ops.shape(x), seed=seed)
        new, new_momentum = leapfrog(
            init, state, momentum, step_size, num_leapfrog, temperature
        )
        log_ratio = (new[1] - value) / temperature + 0.5 * (
            sum_rows(ops.square(momentum)) - sum_rows(ops.square(new_momentum))
        )
        return metropolis(state, new, log_ratio, seed)

    return Kernel(init, step)


def leapfrog(init, state, momentum, step_size, num_steps, temperature=1.0):
    """`num_steps` steps of the leapfrog: half kick, drift, half kick.

    Run again with the momentum reversed, it leads back to where it began.

    Args:
        init: Function of positions that returns a state.
        state: Tuple that begins with `x, log_density, score`.
        momentum: Tensor like x.
        step_size: Float, or one for each chain shaped to broadcast.
        num_steps: Integer.
        temperature: Float > 0.

    Returns:
        `(state, momentum)`.
    """
    half = 0.5 * step_size / temperature

    def body(_, carry):
        state, momentum = carry
        momentum = momentum + half * state[2]
        state = init(state[0] + step_size * momentum)
        return state, momentum + half * state[2]

    return ops.fori_loop(0, num_steps, body, (tuple(state), momentum))


def metropolis(state, new, log_ratio, seed):
    """Accepts with probability min(1, exp(log_ratio)), each chain for itself.

    Returns what a kernel's step returns.
    """
    fine = _is_finite(new[2], log_ratio)
    log_ratio = ops.where(fine, log_ratio, -ops.ones_like(log_ratio) * np.inf)
    uniform = keras.random.uniform(ops.shape(log_ratio), seed=seed)
    probability = ops.exp(ops.minimum(log_ratio, 0))
    accept = ops.logical_and(uniform < probability, fine)
    return _choose(accept, new, state), probability, ops.logical_not(fine)


def _owner(log_density):
    """The layer whose variables a log-density reads, if it says so."""
    owner = getattr(log_density, "__self__", log_density)
    return owner if isinstance(owner, keras.layers.Layer) else None


def compiler(log_density):
    """Compiles functions that call `log_density`: `backend.jit` or the like.

    Of a layer, and of a layer's method, the variables are read at each call; a
    plain function is compiled with the values that they have now.
    """
    owner = _owner(log_density)
    if owner is None:
        return backend.jit
    return lambda fn: backend.jit_layer(fn, owner)


def programs_of(log_density):
    """The cache of a layer that has one; else a new one, for this call only."""
    cache = getattr(_owner(log_density), "_programs", None)
    return cache if isinstance(cache, ProgramCache) else ProgramCache(size=1)


def base_seed(seed):
    """A scalar of int32 from what Keras takes as a seed."""
    seed = check_seed("seed", seed)
    if seed is None:
        # A new one, which `keras.utils.set_random_seed` decides.
        seed = keras.random.SeedGenerator()
    if isinstance(seed, keras.random.SeedGenerator):
        seed = int(as_numpy(seed.next()).astype("int64").sum())
    return ops.convert_to_tensor(seed % 2**31, "int32")


def check_start(log_density, x):
    """Positions as a float32 tensor; errors for what cannot be a start."""
    if not callable(log_density):
        raise ValueError(
            "Expected a function or model that returns log-densities. "
            f"Received: log_density={log_density!r}"
        )
    x = as_numpy(as_numbers(x, "x"))
    if x.ndim < 2 or x.dtype.kind not in "fiub" or not x.size:
        raise ValueError(
            "Expected starting points of shape (chains, ...), at least one. "
            f"Received: x of shape {x.shape} and dtype {x.dtype}"
        )
    check_finite("x", x)
    return ops.convert_to_tensor(x.astype("float32"))


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
    x = check_start(log_density, x)
    seed = base_seed(seed)
    kernel = make_kernel()

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
            _choose(ops.logical_not(far), new, chain),
            accepted + ops.mean(share),
            ops.logical_or(broken, bad),
            ops.where(first, index, since),
        )

    def make():
        compile = compiler(log_density)
        return compile(kernel.init), loop_program(step, compile)

    init, program = programs_of(log_density).get(
        (name, key, tuple(x.shape)), make
    )
    limit = EXPLODED * max(1.0, float(ops.max(ops.abs(x))))
    chain = init(x)
    if not np.isfinite(ops.convert_to_numpy(chain[1])).all():
        raise ValueError(
            "Expected finite log-densities at the starting points. Received: "
            f"{ops.convert_to_numpy(chain[1])[:3]} ..."
        )
    state = (
        chain,
        ops.zeros((), "float32"),
        ops.zeros((x.shape[0],), "bool"),
        ops.convert_to_tensor(-1, "int32"),
    )
    adjusted = name in ("mala", "hmc")

    def check(done, state):
        broken = ops.convert_to_numpy(state[2])
        # A rejected proposal does no harm, unless all are.
        hopeless = broken.all() and float(state[1]) == 0 if adjusted else True
        if broken.any() and hopeless and not allow_non_finite:
            points = ops.convert_to_numpy(state[0][0])
            norms = np.linalg.norm(points.reshape(len(points), -1), axis=-1)
            raise FloatingPointError(
                f"{name} diverged at step {int(state[3])}: "
                f"{int(broken.sum())} of {len(broken)} chains, the largest "
                f"‖x‖ before it {norms.max():.3g}. Take a smaller step_size. "
                + _said(constants)
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
    return Samples(
        ops.convert_to_numpy(chain[0]),
        float(accepted) / max(num_steps, 1),
        int(ops.convert_to_numpy(broken).sum()),
    )


def _said(constants):
    first = ops.convert_to_numpy(constants[0])
    return f"Received: step_size={float(first.ravel()[0]):.3g}"


def _positive(name, value):
    value = check_number(name, value, above=0)
    return ops.convert_to_tensor(value, "float32")


def langevin(
    log_density: Callable[..., Any],
    x: Tensor,
    num_steps: int,
    step_size: float,
    temperature: float = 1.0,
    *,
    seed: int | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Unadjusted Langevin dynamics, all chains in one compiled loop.

        x ← x + ½ε ∇log p(x) + √(εT) N(0, 1)

    The stationary density is p^(1/T) up to an error of order ε: that of
    N(0, s²) at T = 1 has the variance s² / (1 − ε/4s²).

    Args:
        log_density: Model or function, `(chains, ...)` to `(chains,)` or
            `(chains, 1)`: a log-density up to a constant. A model of this room
            keeps the compiled program; a plain function is compiled each time.
        x: Starting points `(chains, ...)`.
        num_steps: Integer ≥ 0.
        step_size: Float > 0. ε; stable below 4 times the least variance.
        temperature: Float ≥ 0. T; 0 is gradient ascent.
        seed: Integer, `None` or `keras.random.SeedGenerator`.
        allow_non_finite: Boolean. Chains that explode raise an error unless
            this is true; then they stop where they were and are counted.
        verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

    Returns:
        `Samples`: `x`, `acceptance_rate` (here 1), `num_non_finite`.

    Raises:
        FloatingPointError: if chains explode; it says at which step.
        ValueError: for arguments out of range.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> langevin(log_density, np.zeros((64, 2)), 1000, 0.1, seed=0).x.std()

    Reference:
        [blog post 7038](https://kexue.fm/archives/7038)
    """
    return run_chains(
        "langevin",
        None,
        lambda: langevin_kernel(log_density),
        log_density,
        x,
        check_integer("num_steps", num_steps, minimum=0),
        (
            _positive("step_size", step_size),
            ops.convert_to_tensor(
                check_number("temperature", temperature, minimum=0), "float32"
            ),
        ),
        seed=seed,
        allow_non_finite=allow_non_finite,
        verbose=verbose,
    )


def annealed_langevin(
    log_density: Callable[..., Any],
    x: Tensor,
    step_size: float,
    temperatures: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    steps_per_level: int = 1,
    mask: Tensor | None = None,
    known_sigmas: Any = None,
    *,
    seed: int | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Langevin dynamics from hot to cold, or from much noise to little.

    With `temperatures` one density is heated: `langevin` with T = T₁, T₂, ...
    With `sigmas` there is a density for each amount of noise, and the step
    size follows it (Song and Ermon's rule):

        εᵢ = ε (σᵢ / σ_last)²

    Args:
        log_density: As for `langevin`; with `sigmas`, of `(x, sigma)`, where
            `sigma` has the shape `(chains,)`.
        x: Starting points `(chains, ...)`.
        step_size: Float > 0. ε.
        temperatures: Sequence of floats ≥ 0, none above the one before.
        sigmas: Sequence of floats > 0, none above the one before. Exactly one
            of the two is given.
        steps_per_level: Integer ≥ 1. Steps at each of them.
        mask: Boolean, shaped like `x` or like one row of it: where `x` is
            known. There `x` is put back before every step, with noise, and
            returned as it was given.
        known_sigmas: Float ≥ 0 for each level: the noise on what is known.
            Defaults to `sigmas`, or to none.
        seed, allow_non_finite, verbose: As for `langevin`.

    Returns:
        `Samples`.

    Example:

    >>> temperatures = np.geomspace(100, 1, 500)
    >>> annealed_langevin(log_density, x, 1e-3, temperatures, seed=0).x

    Reference:
        [Song and Ermon, 2019](https://arxiv.org/abs/1907.05600);
        [Li, Chen and Sommer, 2019](https://arxiv.org/abs/1910.07762);
        [blog post 7038](https://kexue.fm/archives/7038)
    """
    if (temperatures is None) == (sigmas is None):
        raise ValueError(
            "Expected temperatures or sigmas, one of them. Received: "
            f"temperatures={temperatures}, sigmas={sigmas}"
        )
    conditional = sigmas is not None
    if conditional:
        levels = check_levels("sigmas", sigmas, above=0)
    else:
        levels = check_levels("temperatures", temperatures, minimum=0)
    steps_per_level = check_integer("steps_per_level", steps_per_level, 1)
    epsilon = check_number("step_size", step_size, above=0)
    x = as_numpy(as_numbers(x, "x"))
    known = np.zeros(x.shape, "bool")
    if mask is not None:
        known = known | check_mask(mask, x)
    noise = levels if conditional else np.zeros_like(levels)
    if known_sigmas is not None:
        noise = np.asarray(
            [check_number("known_sigmas", s, minimum=0) for s in known_sigmas]
        )
        if len(noise) != len(levels):
            raise ValueError(
                f"Expected {len(levels)} known_sigmas, one for each level. "
                f"Received: {len(noise)}"
            )
    ones = np.ones_like(levels)
    # One row for each level: step size, temperature, σ, noise on the known.
    table = [epsilon * ones, levels, ones, noise]
    if conditional:
        table = [epsilon * (levels / levels[-1]) ** 2, ones, levels, noise]

    def schedule(index, table, known, mask):
        row = ops.take(table, index // steps_per_level, axis=0)
        step_size, temperature, sigma, known_sigma = ops.unstack(row, 4)
        return step_size, temperature, sigma, known, mask, known_sigma

    samples = run_chains(
        "annealed_langevin",
        (conditional, len(levels), steps_per_level),
        lambda: annealed_langevin_kernel(log_density, conditional),
        log_density,
        x,
        len(levels) * steps_per_level,
        (
            ops.convert_to_tensor(np.stack(table, -1).astype("float32")),
            ops.convert_to_tensor(x.astype("float32")),
            ops.convert_to_tensor(known.astype("float32")),
        ),
        schedule,
        seed=seed,
        allow_non_finite=allow_non_finite,
        verbose=verbose,
    )
    return samples._replace(x=np.where(known, x, samples.x).astype("float32"))


def check_levels(name, levels, **bounds):
    """A sequence of numbers of which none is above the one before."""
    if isinstance(levels, (str, bytes)) or np.ndim(levels) != 1:
        raise ValueError(
            f"Expected a sequence of numbers. Received: {name}={levels!r}"
        )
    levels = np.asarray(
        [check_number(name, level, **bounds) for level in levels]
    )
    if not len(levels) or (np.diff(levels) > 0).any():
        raise ValueError(
            f"Expected {name} from the largest to the smallest, at least one. "
            f"Received: {name}={levels}"
        )
    return levels


def check_mask(mask, x):
    """A boolean array that broadcasts with `x`: where `x` is known.

    It has the shape of `x` or of one row, with or without the axis of features
    (channels) of pictures and sequences.
    """
    mask = as_numpy(mask)
    if mask.dtype.kind != "b":
        raise ValueError(
            "Expected a boolean mask, true where x is known. Received: mask of "
            f"dtype {mask.dtype}"
        )
    shapes = {x.shape: mask, x.shape[1:]: mask}
    if x.ndim > 2:
        for shape in (x.shape[1:-1], x.shape[:-1]):
            shapes[shape] = mask[..., None]
    if mask.shape not in shapes:
        raise ValueError(
            f"Expected a mask of the shape of x, {x.shape}, or of one row. "
            f"Received: mask.shape={mask.shape}"
        )
    return shapes[mask.shape]


def mala(
    log_density: Callable[..., Any],
    x: Tensor,
    num_steps: int,
    step_size: float,
    temperature: float = 1.0,
    *,
    seed: int | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Metropolis-adjusted Langevin dynamics: Langevin steps, some rejected.

    The stationary density is p^(1/T) whatever the step size; an acceptance
    rate near 0.57 mixes fastest.

    Args:
        log_density, x, num_steps, seed, verbose: As for `langevin`.
        step_size: Float > 0. ε, as for `langevin`.
        temperature: Float > 0. T.
        allow_non_finite: Boolean. A proposal that is not finite is rejected and
            its chain counted. If nothing else was ever proposed, that is an
            error unless this is true.

    Returns:
        `Samples`.
    """
    return run_chains(
        "mala",
        None,
        lambda: mala_kernel(log_density),
        log_density,
        x,
        check_integer("num_steps", num_steps, minimum=0),
        (
            _positive("step_size", step_size),
            _positive("temperature", temperature),
        ),
        seed=seed,
        allow_non_finite=allow_non_finite,
        verbose=verbose,
    )


def hmc(
    log_density: Callable[..., Any],
    x: Tensor,
    num_steps: int,
    step_size: float,
    num_leapfrog: int = 10,
    temperature: float = 1.0,
    *,
    seed: int | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Hamiltonian Monte Carlo with the leapfrog.

    The stationary density is p^(1/T) whatever the step size; an acceptance
    rate near 0.65 to 0.9 mixes fastest.

    Args:
        log_density, x, num_steps, seed, verbose: As for `langevin`.
        step_size: Float > 0. Of one leapfrog step; a length, like x (that of
            Langevin dynamics is a length squared).
        num_leapfrog: Integer ≥ 1. Leapfrog steps in a proposal.
        temperature: Float > 0. T.
        allow_non_finite: As for `mala`.

    Returns:
        `Samples`.

    Departs from the released code of the paper: the last half step of the
    momentum is made, without which the dynamics cannot be run backwards; and
    the momentum is drawn anew after a rejection, too.
    """
    num_leapfrog = check_integer("num_leapfrog", num_leapfrog, minimum=1)
    return run_chains(
        "hmc",
        num_leapfrog,
        lambda: hmc_kernel(log_density, num_leapfrog),
        log_density,
        x,
        check_integer("num_steps", num_steps, minimum=0),
        (
            _positive("step_size", step_size),
            _positive("temperature", temperature),
        ),
        seed=seed,
        allow_non_finite=allow_non_finite,
        verbose=verbose,
    )
