"""Samplers of a log-density: functions of it and of where the chains start."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import (
    as_numpy,
    check_integer,
    check_number,
)
from blogkeras.denoising.chains import Samples, check_start, run_chains
from blogkeras.denoising.kernels import (
    annealed_langevin_kernel,
    hmc_kernel,
    langevin_kernel,
    mala_kernel,
)
from blogkeras.typing import Tensor


def _positive(name, value):
    value = check_number(name, value, above=0)
    # Beyond these, float32 holds zero or an infinity.
    value = check_number(name, value, 1e-37, 3e38)
    return ops.convert_to_tensor(value, "float32")


def langevin(
    log_density: Callable[..., Any],
    x: Tensor,
    num_steps: int,
    step_size: float,
    temperature: float = 1.0,
    *,
    seed: int | keras.random.SeedGenerator | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Unadjusted Langevin dynamics, all chains in one compiled loop.

        x ← x + ½ε ∇log p(x) + √(εT) N(0, 1)

    The stationary density is p^(1/T) up to an error of order ε: that of
    N(0, s²) at T = 1 has the variance s² / (1 − ε/4s²).

    Signs: chains go up in `log_density`, along its gradient, the score. Of an
    energy give its negative; the post's E is σ² · `log_density`.

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
    >>> samples = langevin(log_density, np.zeros((64, 2)), 1000, 0.1, seed=0).x
    >>> bool(0.8 < samples.std() < 1.2)
    True

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
    seed: int | keras.random.SeedGenerator | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Langevin dynamics from hot to cold, or from much noise to little.

    With `temperatures` one density is heated: `langevin` with T = T₁, T₂, ...
    With `sigmas` there is a density for each amount of noise, and the step
    size follows it (Song and Ermon's rule):

        εᵢ = ε (σᵢ / σ_last)²

    Args:
        log_density: As for `langevin`, the sign too; with `sigmas`, of
            `(x, sigma)`, where `sigma` has the shape `(chains,)`.
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

    Raises:
        FloatingPointError: if chains explode; it says at which step.
        ValueError: for arguments out of range, or for both `temperatures` and
            `sigmas`, or neither.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> x, temperatures = np.zeros((64, 2)), np.geomspace(100, 1, 500)
    >>> annealed_langevin(log_density, x, 1e-2, temperatures, seed=0).x.shape
    (64, 2)

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
    step_sizes = epsilon * np.ones_like(levels)
    if conditional:
        with np.errstate(over="ignore", under="ignore"):
            step_sizes *= (levels / levels[-1]) ** 2
    if not (step_sizes.min() >= 1e-37 and step_sizes.max() <= 3e38):
        raise ValueError(
            "Expected step sizes that float32 can hold at every level. "
            f"Received: step_size={epsilon}, which makes them from "
            f"{step_sizes.min():g} to {step_sizes.max():g}"
        )
    x = check_start(log_density, x)
    known = np.zeros(x.shape, "bool")
    if mask is not None:
        known = known | check_mask(mask, x)
    noise = levels if conditional else np.zeros_like(levels)
    if known_sigmas is not None:
        if np.shape(known_sigmas) != levels.shape:
            raise ValueError(
                f"Expected {len(levels)} known_sigmas, one for each level. "
                f"Received: known_sigmas={known_sigmas!r}"
            )
        noise = np.asarray(
            [check_number("known_sigmas", s, minimum=0) for s in known_sigmas]
        )
    ones = np.ones_like(levels)
    temperatures, sigmas = (ones, levels) if conditional else (levels, ones)
    # One row for each level.
    table = [step_sizes, temperatures, sigmas, noise]

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
            ops.convert_to_tensor(x),
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
            # Where two readings fit, that of one whole row is meant.
            shapes.setdefault(shape, mask[..., None])
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
    seed: int | keras.random.SeedGenerator | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Metropolis-adjusted Langevin dynamics: Langevin steps, some rejected.

    The stationary density is p^(1/T) whatever the step size; an acceptance
    rate near 0.57 mixes fastest.

    Args:
        log_density, x, num_steps, seed, verbose: As for `langevin`; the sign
            of `log_density`, too.
        step_size: Float > 0. ε, as for `langevin`.
        temperature: Float > 0. T.
        allow_non_finite: Boolean. A proposal that is not finite is rejected and
            its chain counted. If nothing else was ever proposed, that is an
            error unless this is true.

    Returns:
        `Samples`. A warning is given where hardly any proposal was accepted
        (below 1 %): then the step size is far too large.

    Raises:
        FloatingPointError: if no proposal was ever finite.
        ValueError: for arguments out of range, and for starting points whose
            log-density is not finite.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> samples = mala(log_density, np.zeros((64, 2)), 100, 0.5, seed=0)
    >>> 0.5 < samples.acceptance_rate < 1
    True

    Reference:
        [Roberts and Tweedie, 1996](https://doi.org/10.2307/3318418)
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
    step_size_jitter: float = 0.2,
    seed: int | keras.random.SeedGenerator | None = None,
    allow_non_finite: bool = False,
    verbose: str | int = 0,
) -> Samples:
    """Hamiltonian Monte Carlo with the leapfrog.

    The stationary density is p^(1/T) whatever the step size; an acceptance
    rate near 0.65 to 0.9 mixes fastest.

    Args:
        log_density, x, num_steps, seed, verbose: As for `langevin`; the sign
            of `log_density`, too.
        step_size: Float > 0. Of one leapfrog step; a length, like x (that of
            Langevin dynamics is a length squared).
        num_leapfrog: Integer ≥ 1. Leapfrog steps in a proposal.
        temperature: Float > 0. T.
        step_size_jitter: Float within [0, 1), j. Each chain draws its step size
            for each proposal, uniformly from step_size · (1 ± j). With 0,
            trajectories may come back to where they began: for N(0, s²) and
            step_size · num_leapfrog near a multiple of πs, all proposals are
            accepted and |x| hardly changes.
        allow_non_finite: As for `mala`.

    Returns:
        `Samples`, with a warning as for `mala`.

    Raises:
        FloatingPointError: if no proposal was ever finite.
        ValueError: for arguments out of range, and for starting points whose
            log-density is not finite.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> samples = hmc(log_density, np.zeros((64, 2)), 50, 0.3, seed=0)
    >>> 0.5 < samples.acceptance_rate <= 1
    True

    Departs from the released code of the paper: the last half step of the
    momentum is made, without which the dynamics cannot be run backwards; the
    momentum is drawn anew after a rejection, too; and the step size varies.

    Reference:
        [Neal, 2011](https://arxiv.org/abs/1206.1901), also on varying the step
        size;
        [blog post 7038](https://kexue.fm/archives/7038)
    """
    num_leapfrog = check_integer("num_leapfrog", num_leapfrog, minimum=1)
    jitter = check_number(
        "step_size_jitter", step_size_jitter, minimum=0, below=1
    )
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
            ops.convert_to_tensor(jitter, "float32"),
        ),
        seed=seed,
        allow_non_finite=allow_non_finite,
        verbose=verbose,
    )
