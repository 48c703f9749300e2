"""Steps of Markov chains on a log-density, as pure functions.

A kernel is a pair of pure functions `(init, step)`:

    state = init(x)
    state, accepted, broken = step(state, seed)

The state is a tuple that begins with the positions `(chains, ...)`, the
log-density `(chains,)` and its gradient there. `accepted` is a share between 0
and 1 for each chain, `broken` says where the step led to numbers that are not
finite.
"""

from typing import NamedTuple

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.denoising.energy import log_density_and_score


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


def choose(accept, new, old):
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
        noise = backend.normal(ops.shape(x), seed=seed)
        new_x = x + 0.5 * step_size * score
        new = init(new_x + ops.sqrt(step_size * temperature) * noise)
        fine = _is_finite(new[2], new[1])
        # A chain that became non-finite stays where it was: no NaN is returned.
        accepted = ops.ones_like(new[1])
        return choose(fine, new, state), accepted, ops.logical_not(fine)

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
        seen = known + known_sigma * backend.normal(shape, seed=seed)
        x, value, score = init(ops.where(mask > 0, seen, x), sigma)
        noise = backend.normal(shape, seed=seed)
        new_x = x + 0.5 * step_size * score
        new_x = new_x + ops.sqrt(step_size * temperature) * noise
        fine = _is_finite(new_x, value)
        accepted = ops.ones_like(value)
        new = (new_x, value, score)
        return choose(fine, new, state), accepted, ops.logical_not(fine)

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
        noise = backend.normal(ops.shape(x), seed=seed)
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
    temperature, jitter)`; the target is p^(1/T).
    """

    def init(x):
        return (x, *log_density_and_score(log_density, x))

    def step(state, seed, step_size, temperature, jitter):
        x, value, _score = state
        momentum = backend.normal(ops.shape(x), seed=seed)
        step_size = jittered(step_size, jitter, x, seed)
        new, new_momentum = leapfrog(
            init, state, momentum, step_size, num_leapfrog, temperature
        )
        log_ratio = (new[1] - value) / temperature + 0.5 * (
            sum_rows(ops.square(momentum)) - sum_rows(ops.square(new_momentum))
        )
        return metropolis(state, new, log_ratio, seed)

    return Kernel(init, step)


def jittered(step_size, jitter, x, seed):
    """A step size for each chain, uniform in step_size · (1 ± jitter).

    Trajectories of one length can come back to where they began: those of a
    Gaussian are periodic, and a length near a multiple of half a period only
    changes the sign of x, with all proposals accepted. The draw does not depend
    on the position, so the stationary density stays what it is.

    Args:
        step_size: Float > 0.
        jitter: Float within [0, 1).
        x: Positions, `(chains, ...)`.
        seed: As for `keras.random`.

    Returns:
        `(chains, 1, ...)`, of the rank of x.
    """
    uniform = backend.uniform((ops.shape(x)[0],), -1.0, 1.0, seed=seed)
    return step_size * (1 + jitter * _per_chain(uniform, x))


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
    uniform = backend.uniform(ops.shape(log_ratio), seed=seed)
    probability = ops.exp(ops.minimum(log_ratio, 0))
    accept = ops.logical_and(uniform < probability, fine)
    return choose(accept, new, state), probability, ops.logical_not(fine)
