"""Densities and denoisers learnt at one amount of noise."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    check_boolean,
    check_integer,
    check_layer,
    shapes_agree,
)
from blogkeras.denoising.base import (
    DenoisingModel,
    check_sigma,
    check_source,
    is_array,
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
from blogkeras.denoising.samplers import langevin

_Schedule = keras.optimizers.schedules.LearningRateSchedule


class _OneNoise(DenoisingModel):
    """σ is one number, after annealing, or follows a Keras schedule."""

    def __init__(self, network, sigma, annealing_steps, seed=None, **kwargs):
        scheduled = isinstance(sigma, _Schedule)
        if not scheduled:
            sigma = check_sigma("sigma", sigma)
        is_auto = isinstance(annealing_steps, str) and annealing_steps == "auto"
        if not is_auto:
            annealing_steps = check_integer(
                "annealing_steps", annealing_steps, 0
            )
        if scheduled and not (is_auto or annealing_steps == 0):
            raise ValueError(
                "Expected a number as sigma where annealing_steps are given; a "
                "schedule sets σ at every step itself. Received: "
                f"sigma={sigma!r}, annealing_steps={annealing_steps}"
            )
        super().__init__(network, seed, **kwargs)
        self.sigma = sigma
        self.annealing_steps = annealing_steps
        self.mean_sigma = keras.metrics.Mean(name="sigma")
        self._checked_sigma(0)
        # A weight, so that a resumed run anneals like one never stopped.
        self._annealing = self.add_weight(
            (),
            keras.initializers.Constant(0 if is_auto else annealing_steps),
            "int32",
            trainable=False,
            name="annealing_steps",
        )

    @as_in_keras
    def fit(self, x=None, y=None, batch_size=None, epochs=1, **kwargs):
        first = int(ops.convert_to_numpy(self.draws.iterations))
        if isinstance(self.sigma, _Schedule):
            steps = _steps_per_epoch(x, batch_size, kwargs) or 0
            runs = epochs - kwargs.get("initial_epoch", 0)
            # The values between these are not known, but nearly all schedules
            # rise or fall from one to the next.
            for step in np.linspace(first, first + steps * runs, 65):
                self._checked_sigma(round(step))
        elif self.annealing_steps == "auto" and first == 0:
            steps = _steps_per_epoch(x, batch_size, kwargs)
            if steps is None:
                raise ValueError(
                    "Expected to know how many steps an epoch has, since σ is "
                    "annealed over half of them. Give `steps_per_epoch` to "
                    "`fit`, or a number as `annealing_steps` to the model (0 "
                    "is none). Received: data of unknown size"
                )
            runs = epochs - kwargs.get("initial_epoch", 0)
            self._annealing.assign(steps * runs // 2)
        history = super().fit(x, y, batch_size, epochs, **kwargs)
        self._warn_if_annealing()
        return history

    fit.__doc__ = DenoisingModel.fit.__doc__

    def _warn_if_annealing(self):
        """Warns where σ has not come down to that of the model's methods."""
        if isinstance(self.sigma, _Schedule):
            return
        step = ops.convert_to_numpy(self.draws.iterations)
        sigma = float(ops.convert_to_numpy(self._sigma_at(step, True)))
        if sigma > self.sigma * (1 + 1e-6):
            warnings.warn(
                f"`fit` ended after {int(step)} of the "
                f"{int(ops.convert_to_numpy(self._annealing))} steps in which "
                f"σ falls, at σ = {sigma:.3g}; the model's methods take σ = "
                f"{self.sigma:g}, which it has not been trained with. Call "
                "`fit` again. While σ falls, the loss rises, so callbacks such "
                "as EarlyStopping should not watch it before `sigma` in the "
                "logs is constant.",
                stacklevel=4,
            )

    def _sigma_at(self, step, training):
        """σ of a training step; the last one elsewhere, or the schedule's."""
        if isinstance(self.sigma, _Schedule):
            return ops.cast(self.sigma(step), "float32")
        if not training:
            return ops.convert_to_tensor(self.sigma, "float32")
        # Geometric, from the scale of the data down to σ.
        steps = ops.cast(ops.maximum(self._annealing.value, 1), "float32")
        left = 1 - ops.cast(step, "float32") / steps
        left = ops.where(self._annealing.value > 0, ops.maximum(left, 0), 0.0)
        scale = ops.maximum(ops.sqrt(self.variance.value), self.sigma)
        return self.sigma * ops.exp(left * ops.log(scale / self.sigma))

    def _checked_sigma(self, step):
        """σ outside of training after a number of steps, a float."""
        if not isinstance(self.sigma, _Schedule):
            return float(np.float32(self.sigma))
        step = ops.convert_to_tensor(step, "int32")
        sigma = float(ops.convert_to_numpy(self._sigma_at(step, False)))
        # Bounds as for a number; 1e-18 itself is a little less in float32.
        if not 9e-19 < sigma < 1.1e18:
            raise ValueError(
                "Expected a schedule whose values are finite and above 0 at "
                "every step, such as a CosineDecay with alpha=0.1. Received: "
                f"sigma={self.sigma!r}, which is {sigma} at step {int(step)}"
            )
        return sigma

    @property
    def last_sigma(self):
        """σ as it is outside of training, a float."""
        return self._checked_sigma(self.draws.iterations.value)

    # Training may have gone on to where a schedule is 0.

    def _check_data(self, x):
        self._checked_sigma(self.draws.iterations.value)
        return super()._check_data(x)

    def _by_batches(self, *args):
        self._checked_sigma(self.draws.iterations.value)
        return super()._by_batches(*args)

    def _sigma_and_noise(self, x, training):
        """σ of a step, and the noise of a batch divided by it."""
        step, seed = self._step(training)
        sigma = self._sigma_at(step, training)
        self.mean_sigma.update_state(sigma)
        return sigma, self._noise(x, seed)

    def get_config(self):
        sigma = self.sigma
        if isinstance(sigma, _Schedule):
            sigma = keras.saving.serialize_keras_object(sigma)
        return {
            **super().get_config(),
            "sigma": sigma,
            "annealing_steps": self.annealing_steps,
        }

    @classmethod
    def from_config(cls, config):
        if isinstance(config["sigma"], dict):
            sigma = keras.saving.deserialize_keras_object(config["sigma"])
            config = {**config, "sigma": sigma}
        return super().from_config(config)


def _steps_per_epoch(x, batch_size, kwargs):
    """Steps in an epoch of `fit`; `None` where they are unknown."""
    check_source(x)
    if kwargs.get("steps_per_epoch") is not None:
        return check_integer("steps_per_epoch", kwargs["steps_per_epoch"], 1)
    if is_array(x):
        split = kwargs.get("validation_split") or 0.0
        rows = int(len(x) * (1 - split))
        return -(-rows // (batch_size or 32))
    number = None
    if isinstance(x, keras.utils.PyDataset):
        number = x.num_batches
    elif hasattr(x, "cardinality"):
        number = int(x.cardinality())
    # TensorFlow's numbers for unknown and endless data are below 0.
    return None if number is None or number < 0 else number


@keras.saving.register_keras_serializable(package="blogkeras")
class DenoisingDensityEstimator(_OneNoise):
    """Learns the log-density of data with Gaussian noise.

    The best denoiser of Gaussian noise is r(y) = y + σ²∇log p̂(y), where p̂ is
    the density of the noisy data, p convolved with N(0, σ²). So a network whose
    gradient denoises is log p̂ up to a constant. With ε ~ N(0, σ²) the loss is

        σ² ‖∇log p̂(x + ε) + ε/σ²‖² / d

    the mean over the d numbers of a row (1 where log p̂ is constant; divide by
    σ² for units of the score). Signs, here and everywhere: `log_density` is
    log p̂ up to a constant, the score is its gradient, the energy is
    −`log_density`, and the post's E is σ² · `log_density`.

        log_density(x) = network(x) − ‖x − μ‖² / 2(s² + σ²)

    The second term, with the mean μ and the variance s² of the data, is not
    trained. It makes the density fall to zero far away, so that it can be
    normalized.

    At a small σ the loss hardly depends on how much probability each of several
    distant modes has, so these shares can be far off at a low loss. Therefore,
    by default, σ starts at the scale of the data, s, and falls geometrically to
    `sigma` in the first half of the first `fit`. Take a few
    ten thousand steps, a falling learning rate and averaged weights, as in the
    example. `denoising_loss` in the logs is a less noisy estimate of the loss.

    While σ falls, the loss rises: less of a smaller noise can be removed.
    `sigma` in the logs is its mean over the steps of an epoch. Callbacks such
    as `EarlyStopping` should not watch the loss before σ is constant; a `fit`
    that ends earlier gives a warning.

    Args:
        network: Keras layer or model from rows to one number, `(rows,)` or
            `(rows, 1)`; twice differentiable. See `mlp_log_density`,
            `residual_log_density`.
        sigma: Float > 0, or a `keras.optimizers.schedules.LearningRateSchedule`
            of the training step that stays above 0. Standard deviation of the
            noise.
        annealing_steps: Integer ≥ 0. In how many first steps σ falls to
            `sigma`. `"auto"` is half of the steps of the first `fit`; with 0
            there is no annealing.
        control_variate: Boolean. Subtracts from the loss 2 s(x)·ε, s(x) being
            the score without noise; its mean is 0. It costs a second gradient
            of the network, and makes the loss less noisy where σ is much
            smaller than the distances over which the density varies.
        allow_piecewise: Boolean. Whether ReLU and max-pooling pass.
        seed: Integer or `None`. Of the noise.

    Input shape:  `(rows, ...)`, any numeric dtype.
    Output shape: `(rows,)`, float32: `log_density`.

    Raises:
        ValueError: if `sigma` is not above 0, or is a schedule beside
            `annealing_steps`; if the network does not give one number for each
            row, or has layers whose score would be wrong (see
            `allow_piecewise`); and in `fit`, if rows are not finite in float32
            (arrays and generators are checked throughout, data sets in the
            first batch and in what `adapt` reads), a schedule comes to 0, σ is
            annealed over data of unknown size, or TensorFlow has no second
            derivative of an operation in the network.

    Example:

    >>> model = DenoisingDensityEstimator(mlp_log_density((2,)), sigma=0.1)
    >>> rate = keras.optimizers.schedules.CosineDecay(2e-3, 8000)
    >>> model.compile(keras.optimizers.Adam(rate, use_ema=True))
    >>> x = toy_densities.eight_gaussians.sample(512, seed=0)
    >>> history = model.fit(x, verbose=0)  # take the 8000 steps
    >>> model.log_density(x).shape, model.score(x).shape
    ((512,), (512, 2))
    >>> model.sample(10, num_steps=100).shape
    (10, 2)

    Departs from the post: the quadratic term and the annealing.

    Reference:
        [Bigdeli et al., 2020](https://arxiv.org/abs/2001.02728);
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    def __init__(
        self,
        network: keras.layers.Layer,
        sigma: float | keras.optimizers.schedules.LearningRateSchedule,
        annealing_steps: int | str = "auto",
        control_variate: bool = False,
        allow_piecewise: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_network(network, allow_piecewise)
        super().__init__(network, sigma, annealing_steps, seed, **kwargs)
        self.control_variate = check_boolean("control_variate", control_variate)
        self.allow_piecewise = allow_piecewise
        self._build_if_known()

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        sigma = self._sigma_at(self.draws.iterations.value, training=False)
        values = as_scalars(self.network(x, training=False))
        return values + self._gaussian(x, sigma)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape[:1], "float32")

    def _gaussian(self, x, sigma):
        """The term that is not trained."""
        distance = ops.reshape(
            ops.square(x - self.mean.value), (ops.shape(x)[0], -1)
        )
        variance = self.variance.value + ops.square(sigma)
        return -ops.sum(distance, axis=-1) / (2 * variance)

    def _trained_score(self, x, sigma, training):
        """`(score, loss)`, the loss being what layers add."""

        def log_density(x):
            values, loss = call_with_loss(self.network, x, training)
            return as_scalars(values) + self._gaussian(x, sigma), loss

        return score_and_loss(log_density, x)[1:]

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        x = ops.cast(x, "float32")
        sigma, unit = self._sigma_and_noise(x, training)  # unit: ε / σ
        # σ ∇log p̂(x + ε); it should be −ε / σ.
        noisy = x + sigma * unit
        score, added = self._trained_score(noisy, sigma, training)
        score = sigma * score
        backend.check_second_order([score])
        error = row_mean(ops.square(score + unit))
        # Only the mean of ‖ε‖² is kept: 1 for each number.
        steady = error + 1 - row_mean(ops.square(unit))
        if self.control_variate:
            clean, _ = self._trained_score(x, sigma, training)
            reduction = 2 * row_mean(sigma * clean * unit)
            error, steady = error - reduction, steady - reduction
        return self._finish(error, steady, added, sample_weight)

    def log_density(self, x, batch_size=1024, verbose=0):
        """log p̂ of rows, up to one constant (see `log_partition`).

        Args:
            x: `(rows, ...)`.
            batch_size: Integer. Rows computed at once.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(rows,)`.
        """
        return self._by_batches(
            "log_density",
            self,
            [self._check_rows(x)],
            batch_size,
            verbose,
        )

    def score(self, x, batch_size=1024, verbose=0):
        """∇log p̂ at rows: a NumPy array like `x`. Arguments: `log_density`."""
        return self._by_batches(
            "score",
            lambda x: log_density_and_score(self, x)[1],
            [self._check_rows(x)],
            batch_size,
            verbose,
        )

    def denoise(self, x, batch_size=1024, verbose=0):
        """x + σ² ∇log p̂(x): the mean of what `x`, a noisy row, may have been.

        Args and returns: as for `score`.
        """
        x = self._check_rows(x)
        return x + self.last_sigma**2 * self.score(x, batch_size, verbose)

    def sample(self, num, num_steps=1000, step_size=None, seed=None, verbose=0):
        """Draws rows of p̂ by Langevin dynamics from N(μ, s²).

        For other samplers give them the model: `hmc(model, x, ...)`.

        Args:
            num: Integer ≥ 1.
            num_steps: Integer ≥ 0.
            step_size: Float > 0. Defaults to σ²/2.
            seed: Integer, `None` or `keras.random.SeedGenerator`.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(num, ...)`. `denoise` takes the noise off.
        """
        if step_size is None:
            step_size = self.last_sigma**2 / 2
        x = self._start(num, seed)
        warn_if_untrained(self)
        return langevin(
            self, x, num_steps, step_size, seed=seed, verbose=verbose
        ).x


@keras.saving.register_keras_serializable(package="blogkeras")
class DenoisingAutoencoder(_OneNoise):
    """Learns to denoise; from the denoiser r the score follows.

        loss = ‖r(x + ε) − x‖² / dσ²,    ∇log p̂(y) = (r(y) − y) / σ²

    The vector form of `DenoisingDensityEstimator`: the network returns a row
    like its input. It need not be a gradient, so there is no log-density, and
    samplers do not take it. The loss has the same units: 1 for the identity.
    Signs: the score points uphill, from y towards the data; the post's energy
    has the gradient r(y) − y = σ² · score.

    Args:
        network: Keras layer or model from rows to rows of the same shape. Any
            activation will do: only its weights are differentiated. It is
            trained on noisy rows alone; calling the model is inference.
        sigma, annealing_steps, seed: As for `DenoisingDensityEstimator`;
            `annealing_steps` is 0 here.

    Input shape:  `(rows, ...)`.
    Output shape: the same, float32: the denoised rows.

    Raises:
        ValueError: if `sigma` is not above 0; and in `fit`, if rows are not
            finite (see `DenoisingDensityEstimator`), a schedule comes to 0, or
            the network's output has not the shape of its input.

    Example:

    >>> network = keras.Sequential(
    ...     [
    ...         keras.Input((2,)),
    ...         keras.layers.Dense(64, "relu"),
    ...         keras.layers.Dense(2),
    ...     ]
    ... )
    >>> model = DenoisingAutoencoder(network, sigma=0.1)
    >>> model.compile("adam")
    >>> x = toy_densities.eight_gaussians.sample(512, seed=0)
    >>> history = model.fit(x, verbose=0)
    >>> model.denoise(x).shape, model.score(x).shape
    ((512, 2), (512, 2))

    Reference:
        [Vincent, 2011](https://doi.org/10.1162/NECO_a_00142);
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    def __init__(
        self,
        network: keras.layers.Layer,
        sigma: float | keras.optimizers.schedules.LearningRateSchedule,
        annealing_steps: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_layer("network", network)
        super().__init__(network, sigma, annealing_steps, seed, **kwargs)
        self._build_if_known()

    def _check_outputs(self, outputs, shape):
        received = getattr(outputs, "shape", [type(outputs).__name__])
        if not shapes_agree(tuple(received)[1:], shape):
            raise ValueError(
                f"Expected rows of shape {tuple(shape)} from the network, like "
                f"its input. Received: output of shape {tuple(received)}"
            )

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        outputs = self.network(x, training=False)
        self._check_outputs(outputs, x.shape[1:])
        return ops.cast(outputs, "float32")

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, "float32")

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        x = ops.cast(x, "float32")
        sigma, unit = self._sigma_and_noise(x, training)
        denoised, added = call_with_loss(
            self.network, x + sigma * unit, training
        )
        self._check_outputs(denoised, x.shape[1:])
        denoised = ops.cast(denoised, "float32")
        error = row_mean(ops.square((denoised - x) / sigma))
        # ε/σ is a part of the difference, so the mean of ‖ε‖² can be kept.
        steady = error + 1 - row_mean(ops.square(unit))
        return self._finish(error, steady, added, sample_weight)

    def denoise(self, x, batch_size=1024, verbose=0):
        """r(x): a NumPy array like `x`.

        Args:
            x: `(rows, ...)`.
            batch_size: Integer. Rows computed at once.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.
        """
        return self._by_batches(
            "denoise",
            self,
            [self._check_rows(x)],
            batch_size,
            verbose,
        )

    def score(self, x, batch_size=1024, verbose=0):
        """(r(x) − x) / σ², an estimate of ∇log p̂. Arguments: `denoise`."""
        x = self._check_rows(x)
        return (self.denoise(x, batch_size, verbose) - x) / self.last_sigma**2
