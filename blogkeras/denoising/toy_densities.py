"""Densities in the plane that are known, with and without noise.

    from blogkeras.denoising import toy_densities

    x = toy_densities.eight_gaussians.sample(1000, seed=0)
    toy_densities.eight_gaussians.log_density(x, sigma=0.1)

`eight_gaussians`, `two_spirals`, `checkerboard` and `rings` have

- `sample(n, seed=None)`: `(n, 2)`, float32;
- `log_density(x, sigma=0.0)`: `(n,)`, float64, the exact log-density at `x` of
  the set with Gaussian noise of standard deviation `sigma`, normalized.

NumPy in float64 on every backend.
"""

import numpy as np

from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_finite,
    check_integer,
    check_number,
)

_BLOCK = 2048  # rows whose terms are in memory at once


class ToyDensity:
    """A density in the plane; see the module."""

    name = ""

    def sample(self, n, seed=None):
        """Draws `n` points without noise: `(n, 2)`, float32.

        Args:
            n: Integer ≥ 1.
            seed: Integer ≥ 0, or `None`.
        """
        n = check_integer("n", n, minimum=1)
        if seed is not None:
            seed = check_integer("seed", seed, minimum=0)
        rng = np.random.default_rng(seed)
        return self._sample(n, rng).astype("float32")

    def log_density(self, x, sigma=0.0):
        """The exact log-density with noise: `(n,)`, float64.

        Args:
            x: `(n, 2)`.
            sigma: Float ≥ 0. Standard deviation of the noise.
        """
        sigma = check_number("sigma", sigma, 0, 1e150)
        x = as_numpy(as_numbers(x, "x"))
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(
                "Expected points of the plane, of shape (n, 2). Received: "
                f"x.shape={x.shape}"
            )
        check_finite("x", x)
        x = x.astype("float64")
        # Far away squares overflow, and log 0 is what is meant.
        with np.errstate(over="ignore", divide="ignore"):
            parts = [
                self._log_density(x[start : start + _BLOCK], sigma**2)
                for start in range(0, len(x), _BLOCK)
            ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def __repr__(self):
        return f"<toy density {self.name}>"


def _log_mean_exp(terms, weights=None):
    """log Σ wᵢ exp(termᵢ) over the last axis; equal weights by default."""
    if weights is None:
        weights = np.full(terms.shape[-1], 1 / terms.shape[-1])
    top = terms.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    return np.log(np.exp(terms - top) @ weights) + top[..., 0]


def _log_box(x, low, high, variance):
    """log-density of U[low, high] + N(0, variance) on the line, at x."""
    from scipy.special import log_ndtr

    width = high - low
    if variance == 0:
        return np.log(((x >= low) & (x < high)) / width)
    scale = variance**0.5
    upper, lower = (high - x) / scale, (low - x) / scale
    # Φ(b) − Φ(a) of the side where both are small: nothing cancels.
    flip = upper + lower > 0
    a = np.where(flip, -upper, lower)
    b = np.where(flip, -lower, upper)
    log_b, log_a = log_ndtr(b), log_ndtr(a)
    middle = (a + b) / 2
    with np.errstate(invalid="ignore"):
        # Far away the two are equal to all digits, though one is far smaller.
        gap = np.where(log_a == log_b, -np.abs(middle) * (b - a), log_a - log_b)
        exact = log_b + np.log1p(-np.exp(gap)) - np.log(width)
        # Of a box that is narrow beside the noise, where Φ(b) − Φ(a) cancels.
        narrow = -0.5 * (middle**2 + np.log(2 * np.pi)) - np.log(scale)
    is_narrow = (b - a) * np.maximum(np.abs(middle), 1) < 1e-5
    return np.where(
        log_b == -np.inf, -np.inf, np.where(is_narrow, narrow, exact)
    )


class EightGaussians(ToyDensity):
    """Standard deviation ¼√2, on a circle of radius 2√2."""

    name = "eight_gaussians"
    variance = 0.125

    def __init__(self):
        angles = np.arange(8) * np.pi / 4
        self.centers = np.sqrt(8) * np.stack(
            [np.cos(angles), np.sin(angles)], -1
        )

    def _sample(self, n, rng):
        centers = self.centers[rng.integers(0, 8, n)]
        return centers + self.variance**0.5 * rng.normal(size=(n, 2))

    def _log_density(self, x, noise):
        variance = self.variance + noise
        squares = np.square(x[:, None] - self.centers).sum(-1)
        return _log_mean_exp(-squares / (2 * variance)) - np.log(
            2 * np.pi * variance
        )


class TwoSpirals(ToyDensity):
    """Two arms, t ↦ ±(−t cos t + u, t sin t + v)/3 + N(0, 0.1²).

    t = 3π√w; u, v from U[0, ½], w from U[0, 1].
    """

    name = "two_spirals"
    variance = 0.01

    def _sample(self, n, rng):
        t = 3 * np.pi * np.sqrt(rng.uniform(size=n))
        u, v = rng.uniform(0, 0.5, (2, n))
        arm = np.stack([u - t * np.cos(t), v + t * np.sin(t)], -1) / 3
        sign = rng.choice([-1.0, 1.0], (n, 1))
        return sign * arm + self.variance**0.5 * rng.normal(size=(n, 2))

    def _log_density(self, x, noise):
        # The integral over t by midpoints; where the arm is longest they are
        # 0.06 apart, less than the width of the noise. t has the density
        # 2t / 9π².
        variance = self.variance + noise
        number = 500
        t = 3 * np.pi * (np.arange(number) + 0.5) / number
        weights = t / t.sum() / 2
        terms = []
        for sign in (1, -1):
            y = sign * x
            low = -t * np.cos(t) / 3, t * np.sin(t) / 3
            terms.append(
                sum(
                    _log_box(y[:, i, None], low[i], low[i] + 1 / 6, variance)
                    for i in (0, 1)
                )
            )
        return _log_mean_exp(
            np.concatenate(terms, -1), np.concatenate([weights, weights])
        )


class Checkerboard(ToyDensity):
    """Eight squares of side 2 in [−4, 4]²."""

    name = "checkerboard"

    def _sample(self, n, rng):
        column = rng.integers(0, 4, n)
        row = 2 * rng.integers(0, 2, n) + column % 2
        corner = 2.0 * np.stack([column, row], -1) - 4
        return corner + rng.uniform(0, 2, (n, 2))

    def _log_density(self, x, noise):
        terms = []
        for column in range(4):
            across = _log_box(x[:, 0], 2 * column - 4, 2 * column - 2, noise)
            for row in (column % 2, column % 2 + 2):
                up = _log_box(x[:, 1], 2 * row - 4, 2 * row - 2, noise)
                terms.append(across + up)
        return _log_mean_exp(np.stack(terms, -1))


class Rings(ToyDensity):
    """Four circles of radius ¾, 1½, 2¼ and 3, with noise of 0.08."""

    name = "rings"
    variance = 0.0064
    radii = 0.75 * np.arange(1, 5)

    def _sample(self, n, rng):
        angle = rng.uniform(0, 2 * np.pi, n)
        radius = self.radii[rng.integers(0, 4, n), None]
        circle = np.stack([np.cos(angle), np.sin(angle)], -1)
        return radius * circle + self.variance**0.5 * rng.normal(size=(n, 2))

    def _log_density(self, x, noise):
        from scipy.special import i0e

        variance = self.variance + noise
        distance = np.sqrt(np.square(x).sum(-1))[:, None]
        # exp(−(ρ² + r²)/2v) I₀(ρr/v) / 2πv for a circle of radius r.
        terms = np.log(i0e(distance * self.radii / variance)) - np.square(
            distance - self.radii
        ) / (2 * variance)
        return _log_mean_exp(terms) - np.log(2 * np.pi * variance)


eight_gaussians = EightGaussians()
two_spirals = TwoSpirals()
checkerboard = Checkerboard()
rings = Rings()
