"""One energy for all amounts of noise, sampled from hot to cold."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_numbers,
    as_numpy,
    check_boolean,
    check_integer,
)
from blogkeras.denoising.base import (
    DenoisingModel,
    check_sigma,
    row_mean,
    warn_if_untrained,
)
from blogkeras.denoising.energy import (
    as_scalars,
    call_with_loss,
    check_network,
    log_density_and_score,
    score_and_loss,
)
from blogkeras.denoising.samplers import (
    annealed_langevin,
    check_levels,
    check_mask,
)
from blogkeras.state import base_seed

# How often chains that diverge are drawn anew at most, and which have diverged:
# those that end so many standard deviations of the noisiest data from its mean.
_NEW_DRAWS, _FAR = 10, 100.0


@keras.saving.register_keras_serializable(package="blogkeras")
class AnnealedScoreMatching(DenoisingModel):
    """Learns a log-density from noise of many strengths, and samples from it.

    In many dimensions noisy data lie on a shell of radius σ√d around the data,
    so training with one σ gives no information on other distances. Here each
    row of a batch has its own σ, drawn from `sigmas`. With ε ~ N(0, σ²) the
    loss is

        σ₀⁴ ‖∇log_density(x + ε) + ε/σ₀²‖² / dσ²

    (the paper's, divided by d; 1 where the log-density is constant). The
    network does not know σ, so at the distance of the noise σ the gradient is
    about σ²/σ₀² times that of log p̂: it is log p̂ at the temperature
    T = σ²/σ₀². Sampling goes through the temperatures from that of the largest
    σ down, and ends with one jump of the denoiser, x + σ₀² ∇log_density(x).

    With `conditional=True` the network also takes σ, `network([x, sigma])` with
    `sigma` of shape `(rows, 1)`. Then its output is log p̂ for that σ, and the
    loss has the weights of NCSN:

        σ² ‖∇log p̂(x + ε; σ) + ε/σ²‖² / d

    Signs: `log_density` grows towards the data, the score is its gradient, the
    energy of the paper and `anomaly_score` are −`log_density`.

    Args:
        network: Keras layer or model from rows (and σ) to one number,
            `(rows,)` or `(rows, 1)`; twice differentiable. A quadratic head
            keeps chains from diverging: `residual_log_density`,
            `mlp_log_density(..., head="quadratic")`.
        sigmas: Sequence of floats > 0, rising or falling: from well below the
            details of the data to their scale, such as
            `np.geomspace(0.1, 1, 10)`.
        sigma0: Float within the range of `sigmas`. The σ of the final jump
            (conditional: that is the least of `sigmas`), and of `log_density`.
        conditional: Boolean. Whether the network takes σ.
        allow_piecewise: Boolean. Whether ReLU and max-pooling pass.
        seed: Integer or `None`. Of the noise.

    Input shape:  `(rows, ...)`, any numeric dtype.
    Output shape: `(rows,)`, float32: `log_density` (at `sigma0`).

    Raises:
        ValueError: if `sigmas` are not two or more positive numbers in order,
            `sigma0` is outside of their range, or the network does not give one
            number for each row or has layers whose score would be wrong (see
            `allow_piecewise`); and in `fit`, if rows are not finite (see
            `DenoisingDensityEstimator`), or TensorFlow has no second derivative
            of an operation in the network.

    Example:

    >>> network = mlp_log_density((2,))  # or residual_log_density((28, 28, 1))
    >>> model = AnnealedScoreMatching(network, np.geomspace(0.1, 1, 10))
    >>> model.compile(keras.optimizers.Adam(1e-4))
    >>> x = toy_densities.eight_gaussians.sample(512, seed=0)
    >>> history = model.fit(x, verbose=0)
    >>> model.anomaly_score(x).shape
    (512,)

    Departs from the paper: σ is drawn for each row; there it is a function of
    the row's position in the batch, and so of the batch size.

    Reference:
        [Li, Chen and Sommer, 2019](https://arxiv.org/abs/1910.07762);
        [Song and Ermon, 2019](https://arxiv.org/abs/1907.05600), conditional;
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    def __init__(
        self,
        network: keras.layers.Layer,
        sigmas: Sequence[float],
        sigma0: float = 0.1,
        conditional: bool = False,
        allow_piecewise: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_network(network, allow_piecewise)
        # The largest first, as the samplers take them.
        falling = np.ndim(sigmas) == 1 and np.size(sigmas) > 1
        if falling and np.asarray(sigmas)[0] < np.asarray(sigmas)[-1]:
            sigmas = list(sigmas)[::-1]
        levels = check_levels("sigmas", sigmas, above=0)
        for level in levels:
            check_sigma("sigmas", level)
        if len(levels) < 2:
            raise ValueError(
                "Expected two or more sigmas; for one, take "
                f"DenoisingDensityEstimator. Received: sigmas={sigmas}"
            )
        sigma0 = check_sigma("sigma0", sigma0)
        # The ends of `np.geomspace` are rounded, so they may miss sigma0.
        if not levels[-1] * (1 - 1e-6) <= sigma0 <= levels[0] * (1 + 1e-6):
            raise ValueError(
                f"Expected sigma0 between {levels[-1]:g} and {levels[0]:g}, "
                f"the range of sigmas. Received: sigma0={sigma0}"
            )
        super().__init__(network, seed, **kwargs)
        self.sigmas = [float(level) for level in levels]
        self.sigma0 = sigma0
        self.conditional = check_boolean("conditional", conditional)
        self.allow_piecewise = allow_piecewise
        self._build_if_known()

    def _network_inputs(self, shape):
        inputs = super()._network_inputs(shape)
        if not self.conditional:
            return inputs
        return [inputs, keras.KerasTensor((None, 1), "float32")]

    def _inputs(self, x, sigma):
        """`sigma` of shape `(rows,)`; not used unless conditional."""
        return [x, ops.reshape(sigma, (-1, 1))] if self.conditional else x

    def _log_density(self, x, sigma):
        inputs = self._inputs(x, sigma)
        return as_scalars(self.network(inputs, training=False))

    def _score(self, x, sigma):
        return log_density_and_score(lambda x: self._log_density(x, sigma), x)[
            1
        ]

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        return self._log_density(x, self._sigma_of(x, self.sigma0))

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape[:1], "float32")

    def _sigma_of(self, x, sigma):
        return ops.broadcast_to(
            ops.convert_to_tensor(sigma, "float32"), (ops.shape(x)[0],)
        )

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        x = ops.cast(x, "float32")
        _, seed = self._step(training)
        unit = self._noise(x, seed)
        drawn = self._uniform(x, seed) * len(self.sigmas)
        index = ops.minimum(ops.cast(drawn, "int32"), len(self.sigmas) - 1)
        sigmas = ops.take(ops.convert_to_tensor(self.sigmas, "float32"), index)
        wide = ops.reshape(sigmas, [-1] + [1] * (len(x.shape) - 1))
        _, score, added = score_and_loss(
            lambda x: call_with_loss(
                self.network, self._inputs(x, sigmas), training
            ),
            x + wide * unit,
        )
        backend.check_second_order([score])
        # Both losses in one: the score times a length should be −ε/σ.
        length = wide if self.conditional else self.sigma0**2 / wide
        error = row_mean(ops.square(length * score + unit))
        steady = error + 1 - row_mean(ops.square(unit))
        return self._finish(error, steady, added, sample_weight)

    def log_density(self, x, sigma=None, batch_size=256, verbose=0):
        """log p̂ of rows up to a constant.

        Args:
            x: `(rows, ...)`.
            sigma: Float > 0, for a conditional network: whose noise. Defaults
                to `sigma0`.
            batch_size: Integer. Rows computed at once.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(rows,)`.
        """
        return self._at_sigma(
            "log_density", self._log_density, x, sigma, batch_size, verbose
        )

    def score(self, x, sigma=None, batch_size=256, verbose=0):
        """The gradient of `log_density`: a NumPy array like `x`.

        Arguments: as for `log_density`.
        """
        return self._at_sigma(
            "score", self._score, x, sigma, batch_size, verbose
        )

    def _at_sigma(self, name, fn, x, sigma, batch_size, verbose):
        x = self._check_rows(x)
        sigma = self._check_sigma(sigma)
        return self._by_batches(
            name,
            fn,
            [x, np.full(len(x), sigma, "float32")],
            batch_size,
            verbose,
        )

    def _check_sigma(self, sigma):
        if sigma is None:
            return self.sigma0
        if not self.conditional:
            raise ValueError(
                "Expected no sigma: the network does not take it. Received: "
                f"sigma={sigma}"
            )
        return check_sigma("sigma", sigma)

    def denoise(self, x, sigma=None, batch_size=256, verbose=0):
        """x + σ₀² ∇log_density(x), the denoiser's jump.

        Without `conditional` it removes noise of any strength within `sigmas`;
        a conditional network removes noise of the strength `sigma` (or σ₀).

        Args and returns: as for `score`.
        """
        length = self._check_sigma(sigma) ** 2
        score = self.score(x, sigma, batch_size, verbose)
        return self._check_rows(x) + length * score

    def anomaly_score(self, x, batch_size=256, verbose=0):
        """−`log_density`: the higher, the less like the data. `(rows,)`."""
        return -self.log_density(x, None, batch_size, verbose)

    # Sampling

    def sample(
        self,
        num,
        num_steps=1000,
        step_size=None,
        denoise=True,
        seed=None,
        verbose=0,
    ):
        """Draws rows: annealed Langevin dynamics, then the denoiser's jump.

        Without `conditional`: a fifth of the steps at the temperature of the
        largest σ, the rest on a geometric way down to T = 1, σ₀'s. With it:
        equally many steps at each σ.

        Args:
            num: Integer ≥ 1.
            num_steps: Integer ≥ 1. Steps of the dynamics in all (conditional:
                rounded to a multiple of the number of `sigmas`).
            step_size: Float > 0. ε; defaults to σ₀²/5 (conditional: to a
                fifth of the square of the least σ).
            denoise: Boolean. Whether the last jump is made.
            seed: Integer, `None` or `keras.random.SeedGenerator`.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(num, ...)`, float32. If up to half of the chains
            diverge (they end more than 100 standard deviations of the noisiest
            data from its mean), they are drawn anew, with a warning.

        Raises:
            FloatingPointError: if more of them diverge, or some do in ten
                further draws, too.
        """
        num_steps = check_integer("num_steps", num_steps, minimum=1)
        num = check_integer("num", num, minimum=1)
        _ = self.row_shape  # an error where it is not known yet
        warn_if_untrained(self)
        return self._anneal(
            lambda seed: self._start(num, seed),
            *(None, num_steps, step_size, denoise, seed, verbose),
        )

    def inpaint(
        self,
        x,
        mask,
        num_steps=1000,
        step_size=None,
        denoise=True,
        seed=None,
        verbose=0,
    ):
        """Draws what is missing in rows, given the rest.

        As `sample`, but before each step the known values are put back, with
        the noise of the level.

        Args:
            x: `(rows, ...)`. Values where `mask` is false are ignored.
            mask: Boolean array, true where `x` is known: shaped like `x` or
                like one row; of pictures, the axis of channels may be missing.
            num_steps, step_size, denoise, seed, verbose: As for `sample`.

        Returns:
            NumPy array like `x`, equal to it where `mask` is true. Chains that
            diverge, and errors: as for `sample`.
        """
        num_steps = check_integer("num_steps", num_steps, minimum=1)
        warn_if_untrained(self)
        x = as_numpy(as_numbers(x, "x"))
        known = np.broadcast_to(check_mask(mask, x), x.shape)
        # NaN often marks what is missing.
        filled = self._check_rows(np.where(known, x, 0))
        return self._anneal(
            lambda seed: np.where(known, filled, self._start(len(x), seed)),
            *(known, num_steps, step_size, denoise, seed, verbose),
        )

    def _anneal(
        self, start, known, num_steps, step_size, denoise, seed, verbose
    ):
        """`start(seed)` gives the starting points."""
        check_boolean("denoise", denoise)
        seed = int(ops.convert_to_numpy(base_seed(seed)))
        sigmas = np.asarray(self.sigmas)
        if self.conditional:
            repeats = max(round(num_steps / len(sigmas)), 1)
            default = sigmas[-1] ** 2 / 5
            levels = {"sigmas": sigmas, "steps_per_level": repeats}
        else:
            default = self.sigma0**2 / 5
            hot = num_steps // 5
            way = np.geomspace(sigmas[0], self.sigma0, num_steps - hot)
            way = np.minimum(np.r_[np.full(hot, sigmas[0]), way], sigmas[0])
            # `np.geomspace` rounds, and may rise by the last bit.
            way = np.minimum.accumulate(way)
            levels = {
                "temperatures": (way / self.sigma0) ** 2,
                "known_sigmas": way,
            }
        if step_size is None:
            step_size = default
        density = _Conditional(self) if self.conditional else self

        def draw(seed, allow_non_finite=True):
            return annealed_langevin(
                density,
                start(seed),
                step_size,
                mask=known,
                seed=seed,
                allow_non_finite=allow_non_finite,
                verbose=verbose,
                **levels,
            )

        x = self._without_diverged(draw, seed, known)
        if denoise:
            sigma = self.sigmas[-1] if self.conditional else None
            x = self.denoise(x, sigma)
        return x if known is None else np.where(known, start(seed), x)

    def _without_diverged(self, draw, seed, known):
        """What is drawn, with other draws in place of the few that diverge.

        Far from all data nothing tells a network to fall, so single chains may
        find a place where it rises without end.
        """
        x, _, stopped = draw(seed)
        mean, variance = map(ops.convert_to_numpy, (self.mean, self.variance))
        limit = _FAR * (variance + self.sigmas[0] ** 2) ** 0.5

        def diverged(x):
            far = np.abs(x - mean) > limit
            far = far if known is None else far & ~known
            return far.reshape(len(x), -1).any(1)

        lost = diverged(x)
        number = int(lost.sum())
        if not number and not stopped:
            return x

        def fail():
            # The same again, for its error, where chains were stopped.
            draw(seed, allow_non_finite=False)
            raise FloatingPointError(
                f"{number} of {len(x)} chains ended more than {limit:.3g} from "
                "the mean of the data. More steps of training or a smaller "
                "step_size may help."
            )

        if number < stopped or 2 * number > len(x):
            fail()  # of another kind, or most of them
        for i in range(1, _NEW_DRAWS + 1):
            # Far from the seeds that users count up.
            again = draw((seed + i * 1_000_003) % 2**31).x
            x[lost] = again[lost]
            lost &= diverged(again)
            if not lost.any():
                break
        else:
            fail()
        warnings.warn(
            f"{number} of {len(x)} chains diverged and were drawn anew: far "
            "from the data the learned log-density rises. More steps of "
            "training or a smaller step_size may help.",
            stacklevel=4,
        )
        return x

    @property
    def last_sigma(self):
        """σ₀, the σ at which `log_density` is log p̂."""
        return self.sigma0

    def get_config(self):
        return {
            **super().get_config(),
            "sigmas": self.sigmas,
            "sigma0": self.sigma0,
            "conditional": self.conditional,
            "allow_piecewise": self.allow_piecewise,
        }


class _Conditional:
    """The log-density of x and σ, with the model as its owner."""

    def __init__(self, model):
        self.__self__ = model

    def __call__(self, x, sigma):
        return self.__self__._log_density(x, sigma)
