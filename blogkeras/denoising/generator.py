"""A generator that is trained on the difference of two scores."""

import weakref

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    check_integer,
    check_layer,
    row_weights,
)
from blogkeras.denoising.base import (
    DenoisingModel,
    RowModel,
    check_not_rows,
    check_sigma,
    evaluation_seed,
    input_shape_of,
    row_mean,
    warn_if_untrained,
)
from blogkeras.denoising.energy import (
    call_with_loss,
    check_inputs,
    check_network,
    check_scalars,
    log_density_and_score,
    score_and_loss,
)
from blogkeras.loops import ProgramCache
from blogkeras.models import check_own_loss, compiled, map_batches
from blogkeras.optimizers import SkipNonFinite, copied_optimizer
from blogkeras.state import NumberedDraws, StepSeed, base_seed, draw_rows

# The step number that the latent vectors of `sample` are drawn with.
_SAMPLE = 2**31 - 2
# The optimizers that `compile` has made to accumulate gradients.
_ACCUMULATING = weakref.WeakSet()


@keras.saving.register_keras_serializable(package="blogkeras")
class DenoisingGenerator(RowModel):
    """Trains a generator until its noisy samples are as likely as noisy data.

    Given is a model of log p̂, the density of the data with noise N(0, σ²); it
    is frozen. A second one learns log q̂, that of the generator's samples with
    such noise, and the generator G minimizes

        E[log q̂(G(z) + ε) − log p̂(G(z) + ε)]

    up to constants the Kullback–Leibler divergence of q̂ and p̂. The derivative
    of log q̂ by its own weights has the mean 0, so the gradient that reaches G
    is that of mean(G(z) · (∇log q̂ − ∇log p̂)) with the bracket held constant.
    Both train in one step, each with its own optimizer.

    `fit()` needs no data: it draws latent vectors z ~ N(0, 1). Give an array or
    data set of others, `fit(z)`, for other laws.

    The logs: `density_loss`, of log q̂, in units of `DenoisingDensityEstimator`
    (its best value is the generator's own floor); `divergence`, the mean of
    log q̂ − log p̂, which is off by the constants in both; `loss` is the first.

    Args:
        generator: `keras.Model` from latent vectors to rows of data; built, so
            that the shape of its input is known.
        data_density: A trained `DenoisingDensityEstimator`, or a layer from
            rows to log p̂, `(rows,)` or `(rows, 1)`. It is frozen.
        model_density: A network for log q̂, such as `mlp_log_density`. It is
            trained here, and cannot be a `DenoisingDensityEstimator`.
        sigma: Float > 0, or `None` for that of `data_density`. Needed, and
            taken on trust, only where that is a layer without one.
        seed: Integer or `None`. Of latent vectors and noise.

    Input shape:  `(rows, *latent_shape)`.
    Output shape: the generator's.

    Raises:
        ValueError: if both densities are one, `model_density` is no network,
            the generator does not know the shape of its input, neither
            `sigma` nor `data_density` says how much noise there is, or they
            contradict each other; and in `compile`, if one optimizer is given
            twice, both numbers of steps are above 1, or the optimizer that
            steps less often has made steps already or accumulates gradients.

    Example:

    >>> p = DenoisingDensityEstimator(mlp_log_density((2,)), 0.1)  # trained
    >>> g = keras.Sequential(
    ...     [keras.Input((2,)), layers.Dense(64, "swish"), layers.Dense(2)]
    ... )
    >>> model = DenoisingGenerator(g, p, mlp_log_density((2,)), 0.1)
    >>> model.compile(
    ...     optimizer=keras.optimizers.Adam(1e-3),
    ...     generator_optimizer=keras.optimizers.Adam(1e-4),
    ... )
    >>> history = model.fit(
    ...     batch_size=64, steps_per_epoch=2, verbose=0
    ... )  # take thousands of steps
    >>> model.sample(10).shape
    (10, 2)

    Departs from the post: log p̂ and log q̂ themselves stand for the post's
    E = σ² · log p̂; the gradient of G differs by that factor.

    Reference:
        [Bigdeli et al., 2020](https://arxiv.org/abs/2001.02728);
        [blog post 7038](https://kexue.fm/archives/7038)
    """

    def __init__(
        self,
        generator,
        data_density,
        model_density,
        sigma=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_inputs(check_layer("generator", generator), "generator")
        check_layer("data_density", data_density)
        check_not_rows("data_density", data_density)
        check_network(model_density, allow_piecewise=True, name="model_density")
        if isinstance(model_density, DenoisingModel):
            raise ValueError(
                "Expected a network as model_density, such as "
                "`mlp_log_density((2,))`: it is trained here, without the "
                f"data's moments. Received: model_density={model_density!r}"
            )
        known = getattr(data_density, "last_sigma", None)
        sigma = known if sigma is None else sigma
        if sigma is None:
            raise ValueError(
                "Expected sigma, since data_density has none. Received: "
                "sigma=None"
            )
        sigma = check_sigma("sigma", sigma)
        comes_later = _is_untrained_schedule(data_density)
        if known and not comes_later and abs(sigma / known - 1) > 1e-5:
            raise ValueError(
                f"Expected the sigma of data_density, {known:g} (None takes "
                "it): both densities are of data with the same noise. "
                f"Received: sigma={sigma}"
            )
        latent_shape = input_shape_of(generator)
        if latent_shape is None:
            raise ValueError(
                "Expected a generator that knows the shape of its input, such "
                "as a Sequential with keras.Input. Received: "
                f"generator={generator!r}"
            )
        self.generator = generator
        self.data_density = data_density
        self.model_density = model_density
        self.sigma = sigma
        self.seed = None if seed is None else check_integer("seed", seed)
        self.latent_shape = tuple(latent_shape)
        self.draws = NumberedDraws(self, seed)
        self.density_loss = keras.metrics.Mean(name="density_loss")
        self.divergence = keras.metrics.Mean(name="divergence")
        self._programs = ProgramCache(size=4)
        self.build((None, *latent_shape))
        self._check_apart()
        data_density.trainable = False

    def _check_apart(self):
        """The given density is frozen, so no part of it can be trained."""
        frozen = {id(v) for v in self.data_density.variables}
        for name in ("generator", "model_density"):
            shared = [
                v for v in getattr(self, name).variables if id(v) in frozen
            ]
            if shared:
                raise ValueError(
                    f"Expected {name} to share no weights with data_density, "
                    "which is frozen; keras.models.clone_model copies a "
                    f"network. Received: {shared[0].path!r} in both"
                )

    def build(self, input_shape):
        rows = self.generator(keras.KerasTensor(input_shape, "float32"))
        rows = keras.KerasTensor(rows.shape, "float32")
        for density in (self.data_density, self.model_density):
            known = isinstance(density, RowModel) and density.built
            if known and density.row_shape != rows.shape[1:]:
                raise ValueError(
                    "Expected a generator of rows that the densities take. "
                    f"Received: rows of shape {rows.shape[1:]}, "
                    f"{density.name} of rows of shape {density.row_shape}"
                )
            check_scalars(
                density.compute_output_spec(rows)
                if density.built
                else density(rows)
            )

    @property
    def row_shape(self):
        """The shape of one latent vector."""
        return self.latent_shape

    def call(self, inputs, training=None):
        return ops.cast(
            self.generator(ops.cast(inputs, "float32"), training=training),
            "float32",
        )

    def compile(
        self,
        optimizer="adam",
        generator_optimizer=None,
        energy_steps=1,
        generator_steps=1,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: Of `model_density`.
            generator_optimizer: Of the generator; defaults to one like
                `optimizer`. Of the two, the one that steps less often is made
                to accumulate gradients, in place.
            energy_steps: Integer ≥ 1. Steps of `model_density` to one of the
                generator, which takes the mean gradient of them.
            generator_steps: Integer ≥ 1. The other way round; one of the two
                is 1.
            **kwargs: As for Keras's `compile`; no loss and no metrics.
        """
        check_own_loss(kwargs)
        energy_steps = check_integer("energy_steps", energy_steps, 1)
        generator_steps = check_integer("generator_steps", generator_steps, 1)
        if min(energy_steps, generator_steps) > 1:
            raise ValueError(
                "Expected energy_steps or generator_steps to be 1. Received: "
                f"energy_steps={energy_steps}, "
                f"generator_steps={generator_steps}"
            )
        first = _get_optimizer(optimizer)
        if generator_optimizer is None:
            generator_optimizer = copied_optimizer(first)
        second = _get_optimizer(generator_optimizer)
        if second is first:
            raise ValueError(
                "Expected two optimizers: their states are of different "
                "variables. Received: one optimizer twice"
            )
        # What `get_compile_config` saves, before the ratio is put in.
        self._compile_arguments = {
            "optimizer": keras.saving.serialize_keras_object(first),
            "generator_optimizer": keras.saving.serialize_keras_object(second),
            "energy_steps": energy_steps,
            "generator_steps": generator_steps,
            **kwargs,
        }
        _accumulate(first, generator_steps)
        _accumulate(second, energy_steps)
        super().compile(_together(first, second, self), **kwargs)

    def get_compile_config(self):
        return self._compile_arguments

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        self.optimizer.build(self.trainable_variables)

    @as_in_keras
    def fit(self, x=None, y=None, batch_size=None, epochs=1, **kwargs):
        """As in Keras. Without `x`, latent vectors are drawn.

        Args:
            x: `None`, or latent vectors: an array or data set.
            batch_size: Integer. Defaults to 512 without `x`.
            epochs: Integer.
            steps_per_epoch: Integer. Defaults to 100 without `x`.
        """
        if x is not None:
            return super().fit(x, y, batch_size, epochs, **kwargs)
        batch_size = 512 if batch_size is None else batch_size
        batch_size = check_integer("batch_size", batch_size, minimum=1)
        steps = kwargs.pop("steps_per_epoch", None)
        steps = (
            100
            if steps is None
            else check_integer("steps_per_epoch", steps, minimum=1)
        )
        return super().fit(
            self._latents(batch_size),
            epochs=epochs,
            steps_per_epoch=steps,
            # Keras warns that it will not shuffle what is drawn at random.
            **{"shuffle": False, **kwargs},
        )

    def _latents(self, batch_size):
        """Batches numbered by the steps made, so that a resumed run goes on."""
        seed, step = (
            int(ops.convert_to_numpy(v))
            for v in (self.draws.seed, self.draws.iterations)
        )
        while True:
            rng = np.random.default_rng([seed, step])
            shape = (batch_size, *self.latent_shape)
            yield (rng.standard_normal(shape, "float32"),)
            step += 1

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if training:
            seed = self.draws.next_step()
        else:
            seed = evaluation_seed(self.draws, self.density_loss)
        # Of the generator, and of all weights; the densities run only now.
        added = [ops.cast(ops.sum(x), "float32") for x in self.losses]
        rows = y_pred
        unit = draw_rows(backend.normal, ops.shape(rows), seed)
        noisy = ops.stop_gradient(rows) + self.sigma * unit
        log_q, score_q, added_q = score_and_loss(
            lambda x: call_with_loss(self.model_density, x, training), noisy
        )
        backend.check_second_order([score_q])
        log_p, score_p = log_density_and_score(
            self.data_density, noisy, training=False
        )
        density_loss = row_mean(ops.square(self.sigma * score_q + unit))
        # Its gradient is that of the divergence; its value has no meaning.
        pull = ops.stop_gradient(score_q - score_p)
        generator_loss = ops.sum(
            ops.reshape(rows * pull, (ops.shape(rows)[0], -1)), axis=-1
        )
        generator_loss = generator_loss - ops.stop_gradient(generator_loss)
        each = density_loss + generator_loss
        if sample_weight is not None:
            each = each * row_weights(sample_weight)
        self.density_loss.update_state(density_loss)
        self.divergence.update_state(log_q - log_p)
        loss = ops.mean(each) + sum(added, start=added_q)
        # See `DenoisingModel._finish`: variables without influence.
        for variable in self.trainable_variables:
            if len(variable.shape) < 2:
                loss = loss + 0 * ops.cast(ops.sum(variable.value), "float32")
        return loss / backend.num_replicas()

    def sample(self, num, seed=None, batch_size=1024, verbose=0):
        """Draws rows: the generator of z ~ N(0, 1).

        Args:
            num: Integer ≥ 1.
            seed: Integer, `None` or `keras.random.SeedGenerator`.
            batch_size: Integer. Rows computed at once.
            verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

        Returns:
            NumPy array `(num, ...)`.
        """
        num = check_integer("num", num, minimum=1)
        warn_if_untrained(self)
        batch_size = min(check_integer("batch_size", batch_size, 1), num)
        z = backend.normal(
            (num, *self.latent_shape), seed=StepSeed(base_seed(seed), _SAMPLE)
        )
        program = self._programs.get(
            batch_size,
            lambda: compiled(self, lambda z: self(z, training=False)),
        )
        return map_batches(program, [z], batch_size, verbose)

    def get_config(self):
        return {
            **super().get_config(),
            **{
                name: keras.saving.serialize_keras_object(getattr(self, name))
                for name in ("generator", "data_density", "model_density")
            },
            "sigma": self.sigma,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("generator", "data_density", "model_density")
        }
        return cls(**{**config, **parts})


def _is_untrained_schedule(density):
    """Whether σ is a schedule's first, as it is while a model is loaded."""
    return isinstance(
        getattr(density, "sigma", None),
        keras.optimizers.schedules.LearningRateSchedule,
    ) and not int(ops.convert_to_numpy(density.draws.iterations))


def _that_steps(optimizer):
    """The optimizer that makes the steps, inside of one that guards it."""
    if isinstance(optimizer, SkipNonFinite):
        return optimizer.inner_optimizer
    return optimizer


def _get_optimizer(optimizer):
    """The optimizer, without the ratio of an earlier `compile`."""
    optimizer = keras.optimizers.get(optimizer)
    if _that_steps(optimizer) in _ACCUMULATING:
        _that_steps(optimizer).gradient_accumulation_steps = None
    return optimizer


def _accumulate(optimizer, steps):
    """Lets an optimizer step at every `steps`-th gradient only, in place."""
    optimizer = _that_steps(optimizer)
    if steps == 1:
        return
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "Expected an optimizer without gradient accumulation, since "
            "energy_steps and generator_steps use it. Received: "
            f"gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}"
        )
    if optimizer.built and optimizer not in _ACCUMULATING:
        raise ValueError(
            "Expected a new optimizer, since energy_steps and generator_steps "
            "need further variables in it. Received: an optimizer that has "
            f"made {int(ops.convert_to_numpy(optimizer.iterations))} steps"
        )
    optimizer.gradient_accumulation_steps = steps
    _ACCUMULATING.add(optimizer)


def _together(first, second, model):
    """One optimizer of two: `second` for the generator, `first` elsewhere."""
    multi = getattr(keras.optimizers, "MultiOptimizer", None)
    if multi is None:
        raise ValueError(
            "Expected a Keras with `keras.optimizers.MultiOptimizer`, 3.15 or "
            "newer, since densities and generator have an optimizer each. "
            f"Received: Keras {keras.__version__}"
        )

    def choose(variable):
        own = model.generator.trainable_variables
        return second if any(variable is v for v in own) else first

    return multi(choose)
