"""What denoising models share: numbered noise, moments, calls in batches."""

import inspect
import warnings

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numbers,
    as_numpy,
    check_finite,
    check_integer,
    check_number,
    row_weights,
)
from blogkeras.denoising.energy import check_scalars
from blogkeras.loops import ProgramCache
from blogkeras.models import (
    TargetlessModel,
    check_own_loss,
    compiled,
    map_batches,
)
from blogkeras.state import NumberedDraws, StepSeed, base_seed, draw_rows

# The noise of `evaluate` has seeds of its own, far from those of `fit`.
_EVALUATION = 2**20
# The step number that the starting points of samplers are drawn with.
_START = 2**31 - 1


class RowModel(TargetlessModel):
    """A model of rows of numbers. Abstract.

    Subclasses have `row_shape`, the shape of one row.
    """

    def __init__(self, **kwargs):
        # Rows are taken in float32 under any dtype policy, as in training: only
        # networks round them to half precision.
        super().__init__(**{"autocast": False, **kwargs})

    @as_in_keras
    def compile(self, jit_compile="auto", **kwargs):
        # Keras keeps only what "auto" becomes, without XLA on a CPU. Chains of
        # samplers are many small operations, and want it there.
        self.jit_argument = jit_compile
        super().compile(jit_compile=jit_compile, **kwargs)
        self._programs.clear()

    def get_compile_config(self):
        config = super().get_compile_config()
        return config and {**config, "jit_compile": self.jit_argument}

    def _symbolic_inputs(self):
        if not self.built:
            return None
        return keras.KerasTensor((None, *self.row_shape), "float32")

    def _check_data(self, x):
        if not is_array(x):
            check_source(x)
            if inspect.isgenerator(x):
                return self._checked_batches(x), None
            # A data set that is divided among replicas has no `take`.
            is_set = hasattr(x, "take") or isinstance(x, keras.utils.PyDataset)
            for batch in _batches(x, 1) if is_set else ():
                self._check_batch(batch)
            return x, None
        # Lists, and tables such as those of pandas.
        x = x if ops.is_tensor(x) else as_numpy(x)
        return x, len(self._check_rows(x))

    def _check_batch(self, batch):
        self._check_rows(_rows_of(batch))

    def _check_rows(self, x):
        x = check_rows(x)
        if self.built and x.shape[1:] != self.row_shape:
            raise ValueError(
                f"Expected rows of shape {self.row_shape}. Received: x of "
                f"shape {x.shape}"
            )
        return x


class DenoisingModel(RowModel):
    """A model that is trained on data with Gaussian noise. Abstract.

    Subclasses have `last_sigma`, the σ of the density that they give.

    Args:
        network: Keras layer or model.
        seed: Integer or `None`. Of the noise.

    Attributes:
        denoising_loss: Metric. The loss without regularizers and sample
            weights, and with the random ‖ε‖² in it replaced by its mean: less
            noisy.
    """

    def __init__(self, network, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.seed = check_seed_number(seed)
        self.draws = NumberedDraws(self, seed)
        self.denoising_loss = keras.metrics.Mean(name="denoising_loss")
        self._programs = ProgramCache(size=8)
        self._moments_built = False

    def _build_if_known(self):
        """Builds where the network knows its input; last line of `__init__`."""
        shape = input_shape_of(self.network)
        if shape is not None:
            self.build((None, *shape))

    @as_in_keras
    def compile(self, optimizer="adam", **kwargs):
        check_own_loss(kwargs)
        super().compile(optimizer, **kwargs)

    # Moments of the data

    def build(self, input_shape):
        shape = tuple(input_shape[1:])
        if not shape or None in shape:
            raise ValueError(
                "Expected rows of a fixed shape (rows, ...). Received: "
                f"input_shape={input_shape}"
            )
        inputs = self._network_inputs(shape)
        self._check_outputs(
            self.network.compute_output_spec(inputs)
            if self.network.built
            else self.network(inputs),
            shape,
        )
        if self._moments_built:
            return
        self._moments_built = True
        self._row_shape = shape
        # Read in float32 under any dtype policy.
        self.mean, self.variance = (
            self.add_weight(
                size,
                keras.initializers.Constant(start),
                "float32",
                trainable=False,
                autocast=False,
                name=name,
            )
            for name, size, start in (("mean", shape, 0), ("variance", (), 1))
        )
        self.num_adapted = self.add_weight(
            (), "zeros", "int32", trainable=False, name="num_adapted"
        )

    def _network_inputs(self, shape):
        """What the network takes, for rows of a shape."""
        return keras.KerasTensor((None, *shape), "float32")

    def _check_outputs(self, outputs, shape):
        """Raises a `ValueError` where a network gives something else."""
        check_scalars(outputs)

    @property
    def row_shape(self):
        """The shape of one row of the data."""
        if not self.built:
            raise ValueError(
                "Expected a model that has seen the shape of the data. Call "
                "`fit`, `adapt` or `build` first. Received: a model that is "
                "not built"
            )
        return self._row_shape

    @property
    def noisy_scale(self):
        """√(s² + σ²), a float: the standard deviation of the noisy data."""
        variance = float(ops.convert_to_numpy(self.variance))
        return (variance + self.last_sigma**2) ** 0.5

    def adapt(self, x, max_batches=64):
        """Takes mean and variance from data: one mean per entry, one variance.

        The first `fit` calls it, except for generators, which can be read only
        once.

        Args:
            x: Array, `tf.data.Dataset` or `keras.utils.PyDataset` (of rows, or
                of tuples that begin with rows).
            max_batches: Integer. How many batches of a data set are read.
        """
        total, squares, count = 0.0, 0.0, 0
        for batch in _batches(x, check_integer("max_batches", max_batches, 1)):
            batch = check_rows(batch, dtype="float64")
            total = total + batch.sum(0)
            squares = squares + np.square(batch).sum(0)
            count += len(batch)
        if not count:
            raise ValueError("Expected at least one row. Received: none")
        mean = total / count
        if not self.built:
            self.build((None, *mean.shape))
        if mean.shape != self._row_shape:
            raise ValueError(
                f"Expected rows of shape {self._row_shape}. Received: rows of "
                f"shape {mean.shape}"
            )
        variance = np.maximum(squares / count - mean**2, 0).mean()
        if variance > np.finfo("float32").max:
            raise ValueError(
                "Expected numbers with squares that float32 can hold; scale "
                f"the data. Received: x with the variance {variance:.3g}"
            )
        self.mean.assign(mean)
        self.variance.assign(variance)
        self.num_adapted.assign(count)

    def _before_fit(self, x):
        if not self.built or not int(ops.convert_to_numpy(self.num_adapted)):
            self.adapt(x)

    def train_on_batch(self, x, *args, **kwargs):
        """As in Keras. Call `adapt` before the first one."""
        if not self.built or not int(ops.convert_to_numpy(self.num_adapted)):
            warnings.warn(
                "The mean and the variance of the data are not known, so 0 and "
                "1 stand for them: `train_on_batch` sees one batch only, and "
                "anneals by `annealing_steps` alone. Call `adapt` with "
                "examples before.",
                stacklevel=2,
            )
        return super().train_on_batch(x, *args, **kwargs)

    # Training

    def _step(self, training):
        """`(step, seed)`: the count of steps before this one, its draws."""
        step = ops.copy(self.draws.iterations.value)
        if training:
            return step, self.draws.next_step()
        return step, evaluation_seed(self.draws, self.denoising_loss)

    def _noise(self, x, seed):
        return draw_rows(backend.normal, ops.shape(x), seed)

    def _uniform(self, x, seed):
        return draw_rows(backend.uniform, (ops.shape(x)[0],), seed)

    def _finish(self, each, error, added, sample_weight):
        """The scalar loss of a batch from one for each row.

        Args:
            each: `(rows,)`, to be minimized.
            error: `(rows,)`, for the metric.
            added: Scalar: what layers gave to `add_loss`.
            sample_weight: `None`, `(rows,)` or `(rows, 1)`.
        """
        if sample_weight is not None:
            each = each * row_weights(sample_weight)
        self.denoising_loss.update_state(error)
        loss = ops.mean(each) + added
        for variable in self.trainable_variables:
            # `losses` would hold what layers add for rows without noise, too.
            if variable.regularizer is not None:
                value = variable.regularizer(variable.value)
                loss = loss + ops.cast(ops.sum(value), "float32")
            # The score does not depend on the bias of the last layer.
            # TensorFlow then has no gradient for it and warns. With this term
            # it is zero.
            if len(variable.shape) < 2:
                loss = loss + 0 * ops.cast(ops.sum(variable.value), "float32")
        # Replicas add up their gradients.
        return loss / backend.num_replicas()

    # Verbs

    def _by_batches(self, name, fn, arrays, batch_size, verbose):
        """`fn` of rows as NumPy arrays, compiled for few numbers of rows."""
        rows = len(arrays[0])
        if not self.built:
            # Variables that a compiled program makes are not known outside.
            self.build((None, *arrays[0].shape[1:]))
        # Fewer rows than a batch are filled up to a power of two, so that calls
        # with many different numbers of rows compile few programs.
        batch_size = min(
            check_integer("batch_size", batch_size, minimum=1),
            1 << (rows - 1).bit_length(),
        )
        program = self._programs.get(
            (name, batch_size), lambda: compiled(self, fn)
        )
        if rows < batch_size:
            arrays = [
                np.concatenate([x, np.repeat(x[-1:], batch_size - rows, 0)])
                for x in arrays
            ]
        return map_batches(program, arrays, batch_size, verbose)[:rows]

    def _start(self, num, seed):
        """Rows drawn from N(μ, s²), the moments of the data."""
        num = check_integer("num", num, minimum=1)
        shape = (num, *self.row_shape)
        seed = StepSeed(base_seed(seed), _START)
        scale = ops.sqrt(self.variance.value)
        start = self.mean.value + scale * backend.normal(shape, seed=seed)
        return ops.convert_to_numpy(start)

    def get_config(self):
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        network = keras.saving.deserialize_keras_object(config["network"])
        return cls(**{**config, "network": network})


def check_not_rows(name, value):
    """Raises a `ValueError` for a model of rows that has no log-density."""
    # Of rows of one number its output would have the shape of log-densities.
    if isinstance(value, RowModel) and not hasattr(value, "log_density"):
        raise ValueError(
            "Expected a log-density, such as a DenoisingDensityEstimator. "
            f"Received: {name}={value!r}, which returns rows"
        )


def warn_if_untrained(model):
    """Warns where a method of the model is called before the first `fit`."""
    if not int(ops.convert_to_numpy(model.draws.iterations)):
        warnings.warn(
            f"{type(model).__name__} has not been trained: the samples are "
            "those of a random network. Call `fit` first.",
            stacklevel=3,
        )


def evaluation_seed(draws, metric):
    """The seeds of a batch of `evaluate`.

    The batch is known by the rows that the metric has seen before it: each
    evaluation draws the same noise, and each of its batches another.
    """
    number = ops.cast(ops.copy(metric.count), "int32")
    seed = ops.convert_to_tensor(draws.seed.value)
    return StepSeed(seed + _EVALUATION, number)


def row_mean(x):
    """The mean over all axes but the first."""
    return ops.mean(ops.reshape(x, (ops.shape(x)[0], -1)), axis=-1)


def check_source(x):
    """Raises a `ValueError` for what cannot give rows."""
    if x is None or isinstance(x, (str, bytes, dict, tuple, set)):
        raise ValueError(
            "Expected rows: an array, a list, a data set or a generator. "
            f"Received: x of type {type(x).__name__}"
        )


def check_sigma(name, value):
    """A number above 0 whose square is neither 0 nor infinite in float32."""
    value = check_number(name, value, above=0)
    return check_number(name, value, 1e-18, 1e18)


def check_seed_number(seed):
    """An integer or `None`, which a config can store."""
    return None if seed is None else check_integer("seed", seed)


def is_array(x):
    """Whether data are an array, a tensor, a list or a table."""
    return isinstance(x, list) or ops.is_tensor(x) or hasattr(x, "__array__")


def has_rows(x):
    """Whether a NumPy array holds rows of numbers, of any numeric dtype."""
    # bfloat16 and its like have the kind "V" in NumPy.
    is_numeric = x.dtype.kind in "fiub" or "float" in str(x.dtype)
    return is_numeric and x.ndim >= 2 and x.size > 0


def check_rows(x, dtype="float32"):
    """Rows of numbers that are finite as `dtype`, from any numeric dtype."""
    x = as_numpy(as_numbers(x, "x"))
    if not has_rows(x):
        raise ValueError(
            "Expected numbers of shape (rows, ...), at least one row. "
            f"Received: x of shape {x.shape} and dtype {x.dtype}"
        )
    return as_floats("x", x, dtype)


def as_floats(name, x, dtype="float32"):
    """A NumPy array of finite numbers as floats, which can hold them."""
    check_finite(name, x)
    with np.errstate(over="ignore"):
        floats = x.astype(dtype, copy=False)
    if floats is not x and not np.isfinite(floats).all():
        raise ValueError(
            f"Expected numbers in `{name}` that {dtype} can hold; scale the "
            f"data. Received: {x[~np.isfinite(floats)].ravel()[:3]}"
        )
    return floats


def input_shape_of(network):
    """The shape of a row that a built network takes, or `None`."""
    try:
        shape = network.input_shape
    except (AttributeError, ValueError):
        return None
    if isinstance(shape, list):
        shape = shape[0]
    if not isinstance(shape, tuple) or None in shape[1:]:
        return None
    return shape[1:]


def _batches(x, limit):
    x = as_numpy(x) if isinstance(x, list) else x
    if is_array(x):
        # In pieces: they are converted to float64.
        for start in range(0, len(x), 4096):
            yield x[start : start + 4096]
        return
    if isinstance(x, keras.utils.PyDataset):
        number = x.num_batches
        sources = (x[i] for i in range(min(limit, number or limit)))
    elif hasattr(x, "take"):
        sources = x.take(limit)
    else:
        raise ValueError(
            "Expected an array, a tf.data.Dataset or a keras.utils.PyDataset; "
            "for a generator, or a data set that is divided among replicas, "
            "call `adapt` with an array of examples before `fit`. Received: "
            f"x={type(x).__name__}"
        )
    yield from map(_rows_of, sources)


def _rows_of(batch):
    return batch[0] if isinstance(batch, (tuple, list)) else batch
