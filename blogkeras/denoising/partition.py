"""log Z of a log-density that is known up to a constant."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_choice,
    check_finite,
    check_integer,
    check_number,
    check_seed,
)
from blogkeras.denoising.base import DenoisingModel
from blogkeras.denoising.chains import (
    check_log_density,
    compiled,
    compiler,
    first_call,
    make_weights,
)
from blogkeras.denoising.energy import as_scalars, log_density_and_score
from blogkeras.denoising.kernels import leapfrog, metropolis, sum_rows
from blogkeras.loops import loop_program, run_steps
from blogkeras.models import map_batches
from blogkeras.state import StepSeed, base_seed, stream_seed

_LOG_2PI = math.log(2 * math.pi)
_LEAPFROG = 5
_PILOT = 64  # chains that find the step sizes
_ACCEPTANCE = 0.8  # what these step sizes are to reach
_OPTIONS = {
    "quadrature": ("bounds", "num_points"),
    "importance": ("mean", "scale", "num_samples"),
    "annealed": ("mean", "scale", "num_samples", "num_steps", "samples"),
}
_HINTS = {
    "draws of the reference": "mean and scale may be far off",
    "samples": "samples must be of this density",
}


class LogPartition(NamedTuple):
    """What `log_partition` returns.

    Attributes:
        value: Float. The estimate of log Z = log ∫ exp(log_density(x)) dx.
        standard_error: Float. Of the estimate. For quadrature, the difference
            to the grid of half as many intervals.
        lower: Float. Not above log Z in expectation; `nan` where the method has
            no bound.
        upper: Float. Not below log Z in expectation; `nan` likewise.
        effective_sample_size: Float. (Σw)² / Σw² of the weights; the number of
            points for quadrature.
        diagnostics: Dict. Further numbers of the method.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> result = log_partition(log_density, "quadrature", bounds=[(-9, 9)])
    >>> round(result.value, 4)  # log √(2π)
    0.9189

    Reference:
        [Grosse et al., 2015](https://arxiv.org/abs/1511.02543), the bounds
    """

    value: float
    standard_error: float
    lower: float
    upper: float
    effective_sample_size: float
    diagnostics: dict


def log_partition(
    log_density: Callable[..., Any],
    method: str = "annealed",
    *,
    bounds: Any = None,
    num_points: int | None = None,
    mean: Any = None,
    scale: Any = None,
    num_samples: int | None = None,
    num_steps: int | None = None,
    samples: Any = None,
    seed: int | keras.random.SeedGenerator | None = None,
    verbose: str | int = 0,
) -> LogPartition:
    """Estimates log Z = log ∫ exp(log_density(x)) dx, with its error.

    `"quadrature"`, in one or two dimensions: the trapezoidal rule in a box.

    `"importance"`: with draws of q = N(mean, scale²),

        Z ≈ mean(exp(log_density(x) − log q(x)))

    In many dimensions few draws carry all the weight, and the estimate is too
    small without any sign of it but the effective sample size.

    `"annealed"`: annealed importance sampling along (1 − β) log q + β
    log_density with Hamiltonian steps, whose size a few chains find first. With
    exact `samples` of the density it also runs backwards. The means of the
    logarithms of the weights then are a lower and an upper bound of log Z in
    expectation, whatever the chains do: a narrow gap proves the value.

    A warning is given where the effective sample size is below a tenth of the
    draws, or a box cuts off the density.

    Args:
        log_density: Model or function, `(rows, ...)` to `(rows,)`, as for
            `langevin`.
        method: `"annealed"`, `"importance"` or `"quadrature"`.
        bounds: Sequence of pairs `(low, high)`, one for each dimension, one or
            two. For `"quadrature"`.
        num_points: Odd integer. Of the grid along each axis, 501 by default.
        mean: Array of the shape of a row: the center of q. A model of this
            room has one, and a scale.
        scale: Float > 0, or such an array: the standard deviation of q.
        num_samples: Integer ≥ 2. Draws or chains: 1024 for `"annealed"`, 65536
            for `"importance"`.
        num_steps: Integer. Values of β, 1000 by default.
        samples: Array `(n, ...)` of exact draws of the density. For
            `"annealed"`; without, there is no upper bound.
        seed: Integer, `None` or `keras.random.SeedGenerator`.
        verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

    Returns:
        `LogPartition`.

    Example:

    >>> def log_density(x):
    ...     return -keras.ops.sum(x**2, axis=-1) / 2
    >>> result = log_partition(log_density, "quadrature", bounds=[(-9, 9)] * 2)
    >>> round(result.value, 4), round(np.log(2 * np.pi).item(), 4)
    (1.8379, 1.8379)

    Departs from the released code of the paper, whose proposal log-density is a
    mean over the dimensions where a sum is meant: for a Gaussian in d
    dimensions it is off by (d/2) log(2 − 1/d).

    Reference:
        [Neal, 2001](https://doi.org/10.1023/A:1008923215028);
        [Grosse et al., 2015](https://arxiv.org/abs/1511.02543), the bounds
    """
    check_choice("method", method, _OPTIONS)
    given = {
        "bounds": bounds,
        "num_points": num_points,
        "mean": mean,
        "scale": scale,
        "num_samples": num_samples,
        "num_steps": num_steps,
        "samples": samples,
    }
    extra = [
        name
        for name, value in given.items()
        if value is not None and name not in _OPTIONS[method]
    ]
    if extra:
        raise ValueError(
            f"Expected arguments of method={method!r}: "
            f"{', '.join(_OPTIONS[method])}. Received: {', '.join(extra)}"
        )
    check_log_density(log_density)
    check_seed("seed", seed)
    if method == "quadrature":
        return _quadrature(log_density, bounds, num_points, verbose)
    mean, scale = _reference(log_density, mean, scale)
    if method == "importance":
        return _importance(log_density, mean, scale, num_samples, seed, verbose)
    return _annealed(
        log_density, mean, scale, num_samples, num_steps, samples, seed, verbose
    )


def _evaluate(log_density, x, verbose):
    """`log_density` of many rows, float64."""
    batch_size = min(len(x), 16_384)
    x = x.astype("float32")
    make_weights(log_density, x)
    program = compiled(
        log_density,
        ("partition", batch_size, x.shape[1:]),
        lambda: compiler(log_density)(
            lambda x: as_scalars(log_density(x), x.shape[0])
        ),
    )
    values = first_call(
        log_density, lambda: map_batches(program, [x], batch_size, verbose)
    )
    # −∞ is the logarithm of 0; NaN and +∞ are of no density.
    check_finite("log_density(x)", np.where(values == -np.inf, 0, values))
    return values.astype("float64")


def _log_mean_exp(x):
    top = x.max()
    if not np.isfinite(top):
        return float(top)
    return float(np.log(np.mean(np.exp(x - top))) + top)


def _from_weights(log_weights):
    """`(value, standard error, effective sample size)`."""
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    number = len(log_weights)
    value = _log_mean_exp(log_weights)
    if not np.isfinite(value):
        raise ValueError(
            "Expected a log-density that is finite somewhere near the "
            f"reference. Received: log-weights with the mean {value}"
        )
    weights = np.exp(log_weights - log_weights.max())
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    # Of the logarithm of a mean, to first order.
    error = math.sqrt(max(number / effective - 1, 0) / (number - 1))
    if effective < 0.1 * number:
        warnings.warn(
            "log_partition: the effective sample size is "
            f"{effective:.1f} of {number}; a few draws carry the weight, and "
            "value and standard error cannot be trusted. Take a better mean "
            "and scale, the method 'annealed', or more steps.",
            stacklevel=4,
        )
    return value, error, effective


def _quadrature(log_density, bounds, num_points, verbose):
    number = 501 if num_points is None else num_points
    number = check_integer("num_points", number, minimum=3)
    if number % 2 == 0:
        raise ValueError(
            "Expected an odd number of points, so that every other one is a "
            f"grid, too. Received: num_points={number}"
        )
    if np.ndim(bounds) != 2 or np.shape(bounds) not in ((1, 2), (2, 2)):
        raise ValueError(
            "Expected (low, high) for each of one or two dimensions; for more, "
            f"take the method 'annealed'. Received: bounds={bounds}"
        )
    axes, steps = [], []
    for low, high in bounds:
        low = check_number("bounds", low)
        high = check_number("bounds", high, above=low)
        axes.append(np.linspace(low, high, number))
        steps.append(math.log((high - low) / (number - 1)))
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    values = _evaluate(log_density, points.reshape(-1, len(axes)), verbose)
    values = values.reshape(points.shape[:-1])
    if values.max() == -np.inf:
        raise ValueError(
            "Expected a density that is above 0 somewhere in the box. "
            f"Received: a log-density of -inf everywhere in {bounds}"
        )

    def integrate(values, log_step):
        weights = np.ones(values.shape)
        for axis in range(values.ndim):
            ends = np.moveaxis(weights, axis, 0)
            ends[0] /= 2
            ends[-1] /= 2
        top = values.max()
        if top == -np.inf:
            return top
        return top + np.log(np.sum(weights * np.exp(values - top))) + log_step

    value = integrate(values, sum(steps))
    every_other = values[tuple([slice(None, None, 2)] * values.ndim)]
    coarse = integrate(every_other, sum(steps) + len(axes) * math.log(2))
    inner = values[tuple([slice(1, -1)] * values.ndim)]
    inside = _log_mean_exp(inner.ravel()) + math.log(inner.size)
    edge = 1 - math.exp(
        min(inside - (_log_mean_exp(values.ravel()) + math.log(values.size)), 0)
    )
    # Beyond the edge an exponential tail would hold about so much again for
    # each step of its length.
    if edge > 1e-4:
        warnings.warn(
            f"log_partition: {edge:.2g} of the mass lies on the edge of the "
            "box, so more lies outside. Take wider bounds.",
            stacklevel=3,
        )
    return LogPartition(
        float(value),
        abs(float(value - coarse)),
        math.nan,
        math.nan,
        float(values.size),
        {"edge": edge},
    )


def _reference(log_density, mean, scale):
    """Mean and standard deviation of the reference, arrays like a row."""
    if isinstance(log_density, DenoisingModel):
        _ = log_density.row_shape  # an error where it is not known yet
        mean = log_density.mean.value if mean is None else mean
        scale = log_density.noisy_scale if scale is None else scale
    if mean is None or scale is None:
        raise ValueError(
            "Expected mean and scale of a Gaussian near the density, since the "
            f"log-density has none. Received: mean={mean}, scale={scale}"
        )
    mean, scale = (
        as_numpy(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)
        for x in (mean, scale)
    )
    if mean.ndim < 1 or mean.dtype.kind not in "fiu":
        raise ValueError(
            "Expected a mean of the shape of a row, such as (2,). Received: "
            f"mean of shape {mean.shape}"
        )
    check_finite("mean", mean)
    try:
        scale = np.broadcast_to(scale, mean.shape).astype("float64")
    except ValueError:
        scale = np.full(mean.shape, np.nan)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            "Expected a scale above 0, one number or one for each entry of the "
            f"mean. Received: scale={scale.ravel()[:3]}"
        )
    return mean.astype("float64"), scale


def _importance(log_density, mean, scale, num_samples, seed, verbose):
    number = 65_536 if num_samples is None else num_samples
    number = check_integer("num_samples", number, minimum=2)
    rng = np.random.default_rng(int(ops.convert_to_numpy(base_seed(seed))))
    unit = rng.normal(size=(number, *mean.shape))
    values = _evaluate(log_density, mean + scale * unit, verbose)
    unit = unit.reshape(number, -1)
    log_q = -0.5 * (np.square(unit) + _LOG_2PI).sum(-1) - np.log(scale).sum()
    value, error, effective = _from_weights(values - log_q)
    return LogPartition(value, error, math.nan, math.nan, effective, {})


def _annealed(
    log_density, mean, scale, num_samples, num_steps, samples, seed, verbose
):
    number = 1024 if num_samples is None else num_samples
    number = check_integer("num_samples", number, minimum=2)
    steps = 1000 if num_steps is None else num_steps
    steps = check_integer("num_steps", steps, minimum=1)
    if samples is not None:
        samples = as_numpy(as_numbers(samples, "samples")).astype("float64")
        if samples.shape[1:] != mean.shape or len(samples) < 2:
            raise ValueError(
                f"Expected two or more samples of shape {mean.shape} each. "
                f"Received: samples of shape {samples.shape}"
            )
        check_finite("samples", samples)
    seed = base_seed(seed)
    path = _Path(log_density, mean, scale, steps)
    rng = np.random.default_rng(int(ops.convert_to_numpy(seed)))

    def draw(rows):
        return rng.normal(size=(rows, *mean.shape))

    sizes = path.find_step_sizes(draw(_PILOT), seed, verbose)
    forward, accepted = path.run(
        "forward", draw(number), stream_seed(seed, 1), sizes, verbose
    )
    value, error, effective = _from_weights(forward)
    diagnostics = {"acceptance_rate": accepted}
    upper = math.nan
    if samples is not None:
        backward, accepted = path.run(
            "backward",
            (samples - mean) / scale,
            stream_seed(seed, 2),
            sizes,
            verbose,
        )
        # E log w ≤ log E w = log(1 / Z).
        upper = float(-np.mean(backward))
        diagnostics["backward_value"] = -_log_mean_exp(backward)
        diagnostics["backward_acceptance_rate"] = accepted
    return LogPartition(
        value, error, float(np.mean(forward)), upper, effective, diagnostics
    )


class _Path:
    """Chains between the reference and a density, in units of the reference.

    With x = mean + scale · u the reference is the standard normal of u.
    """

    def __init__(self, log_density, mean, scale, num_steps):
        self.log_density = log_density
        self.num_steps = num_steps
        self.size = mean.size
        self.mean = ops.convert_to_tensor(mean.astype("float32"))
        self.scale = ops.convert_to_tensor(scale.astype("float32"))
        # More steps near the reference, where much changes at once.
        betas = (np.arange(num_steps + 1) / num_steps) ** 2
        self.betas = ops.convert_to_tensor(betas.astype("float32"))

    def _ends(self, u, mean, scale):
        """`(u, log f₁(u), its gradient)` of the density at the end."""
        return (
            u,
            *log_density_and_score(
                lambda u: self.log_density(mean + scale * u), u
            ),
        )

    def _gap(self, chain, scale):
        """log f₁ − log f₀, what a weight gains with β."""
        log_reference = -0.5 * (
            sum_rows(ops.square(chain[0])) + self.size * _LOG_2PI
        )
        return chain[1] + ops.sum(ops.log(scale)) - log_reference

    def _move(self, chain, beta, step_size, seed, mean, scale):
        """One Hamiltonian step that leaves the density of `beta` invariant."""

        def tempered(chain):
            u, value, score = chain
            square = -0.5 * sum_rows(ops.square(u))
            return (
                u,
                (1 - beta) * square + beta * value,
                beta * score - (1 - beta) * u,
                value,
                score,
            )

        state = tempered(chain)
        momentum = backend.normal(ops.shape(chain[0]), seed=seed)
        new, new_momentum = leapfrog(
            lambda u: tempered(self._ends(u, mean, scale)),
            state,
            momentum,
            step_size,
            _LEAPFROG,
        )
        log_ratio = (
            new[1]
            - state[1]
            + 0.5 * sum_rows(ops.square(momentum))
            - 0.5 * sum_rows(ops.square(new_momentum))
        )
        state, accepted, _ = metropolis(state, new, log_ratio, seed)
        return (state[0], state[3], state[4]), ops.mean(accepted)

    def _program(self, name, step, rows):
        return compiled(
            self.log_density,
            ("annealed", name, rows, self.num_steps, tuple(self.mean.shape)),
            lambda: (
                compiler(self.log_density)(self._ends),
                loop_program(step, compiler(self.log_density)),
            ),
        )

    def find_step_sizes(self, u, seed, verbose):
        """A step size for each β, from chains that adapt it on their way."""

        def step(index, state, seed, betas, mean, scale):
            chain, log_size, sizes = state
            size = ops.exp(log_size)
            chain, accepted = self._move(
                chain,
                betas[index + 1],
                size,
                StepSeed(seed, index),
                mean,
                scale,
            )
            sizes = ops.where(
                ops.arange(self.num_steps, dtype="int32") == index, size, sizes
            )
            log_size = log_size + 0.1 * (accepted - _ACCEPTANCE)
            return chain, log_size, sizes

        start, program = self._program("pilot", step, len(u))
        state = (
            self._start(start, u, "draws of the reference"),
            # Half a unit, less in more dimensions: near the best for a normal.
            ops.convert_to_tensor(math.log(0.8 / self.size**0.25), "float32"),
            ops.zeros((self.num_steps,), "float32"),
        )
        return run_steps(
            program,
            state,
            self.num_steps,
            seed,
            self.betas,
            self.mean,
            self.scale,
            verbose=verbose,
        )[2]

    def _start(self, start, u, source):
        u = ops.convert_to_tensor(u.astype("float32"))
        make_weights(self.log_density, u)
        chain = first_call(
            self.log_density, lambda: start(u, self.mean, self.scale)
        )
        broken = ~np.isfinite(ops.convert_to_numpy(chain[1]))
        if broken.any():
            raise ValueError(
                f"Expected a log-density that is finite on the {source}. "
                f"Received: {broken.sum()} of {len(broken)} values that are "
                f"not; {_HINTS[source]}"
            )
        return chain

    def run(self, direction, u, seed, sizes, verbose):
        """`(log-weights, acceptance rate)` of chains in one direction.

        Backwards the steps are those of forwards in reverse order.
        """
        last = self.num_steps - 1

        def gain(chain, weight, betas, k, scale):
            difference = betas[k + 1] - betas[k]
            return weight + difference * self._gap(chain, scale)

        def step(index, state, seed, betas, sizes, mean, scale):
            chain, weight, total = state
            k = index if direction == "forward" else last - index
            if direction == "forward":
                weight = gain(chain, weight, betas, k, scale)
            chain, accepted = self._move(
                chain,
                betas[k + 1],
                sizes[k],
                StepSeed(seed, index),
                mean,
                scale,
            )
            if direction == "backward":
                weight = gain(chain, weight, betas, k, scale)
            return chain, weight, total + accepted

        start, program = self._program(direction, step, len(u))
        source = "draws of the reference"
        if direction == "backward":
            source = "samples"
        state = (
            self._start(start, u, source),
            ops.zeros((len(u),), "float32"),
            ops.zeros((), "float32"),
        )
        _, weight, total = run_steps(
            program,
            state,
            self.num_steps,
            seed,
            self.betas,
            sizes,
            self.mean,
            self.scale,
            verbose=verbose,
        )
        weight = ops.convert_to_numpy(weight).astype("float64")
        sign = 1 if direction == "forward" else -1
        return sign * weight, float(total) / self.num_steps
