"""HSIC in Keras: a loss, a regularization and a metric."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_number,
    shapes_agree,
)
from blogkeras.graph import freeze_inside
from blogkeras.hsic.grams import rescale
from blogkeras.hsic.kernels import (
    LinearKernel,
    PrecomputedKernel,
    as_kernel,
    deserialize,
    serialize,
)
from blogkeras.hsic.samples import is_array
from blogkeras.hsic.statistic import ESTIMATORS, alignment, hsic
from blogkeras.hsic.tiles import prepare, statistics

LINEAR = LinearKernel()


@keras.saving.register_keras_serializable(package="blogkeras")
class HSICLoss(keras.losses.Loss):
    """Dependence between a model's outputs and a target, as a loss.

        loss = HSIC(y_true, y_pred)        or, with `maximize`, −HSIC

    of the whole batch: it is a number per batch, not per sample, and the mean
    of small batches is not that of a large one. Sample weights are the shares
    of the pairs in the sample measure (a row of weight 0 is left out). Under
    `tf.distribute` the replicas' batches are gathered, so that the loss and
    gradients are those of one large batch. All axes but the first are features;
    masked time steps count as zeros, those of a target for each time step as
    well. Computed in float32. A batch of fewer than 4 rows, such as the last
    one, is 0 with `"unbiased"`.

    Args:
        kernel_true: Kernel of the target, or a function or Keras layer
            `fn(x1, x2)` that returns the `(n, m)` matrix; `None` is a Gaussian
            of median bandwidth. For labels: `DeltaKernel()`.
        kernel_pred: Kernel of the outputs, likewise.
        estimator: `"biased"`, `"blog"` or `"unbiased"`.
        maximize: Boolean. Whether dependence is wanted.
        name: String.
        dtype: Dtype of the result.

    Call arguments:
        y_true: `(batch, ...)`.
        y_pred: `(batch, ...)`.
        sample_weight: `(batch,)`, weights ≥ 0, or `None`. The result is a
            scalar.

    Raises:
        ValueError: on an unknown estimator and on what is no kernel.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> loss = HSICLoss(DeltaKernel(), maximize=True)
    >>> model.compile("adam", loss)
    >>> x, labels = np.random.rand(16, 4), np.random.randint(0, 2, 16)
    >>> model.evaluate(x, labels, verbose=0) <= 0
    True

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910)
    """

    def __init__(
        self,
        kernel_true: Any = None,
        kernel_pred: Any = None,
        estimator: str = "biased",
        maximize: bool = False,
        name: str = "hsic_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=None, dtype=dtype)
        self.kernel_true = as_kernel_or_none(kernel_true)
        self.kernel_pred = as_kernel_or_none(kernel_pred)
        self.estimator = check_choice("estimator", estimator, ESTIMATORS)
        self.maximize = check_boolean("maximize", maximize)

    def __call__(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred, weight = gathered(
            unmasked(y_true, y_pred), unmasked(y_pred), sample_weight
        )
        value = hsic_of_batch(
            y_true,
            y_pred,
            self.kernel_true,
            self.kernel_pred,
            self.estimator,
            weight,
        )
        value = -value if self.maximize else value
        # Every replica has the loss of the whole batch: divide, since Keras
        # adds them.
        return ops.cast(value / backend.num_replicas(), self.dtype)

    def get_config(self):
        return {
            "name": self.name,
            "kernel_true": serialize(self.kernel_true),
            "kernel_pred": serialize(self.kernel_pred),
            "estimator": self.estimator,
            "maximize": self.maximize,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**{k: deserialize(v) for k, v in config.items()})


@keras.saving.register_keras_serializable(package="blogkeras")
class HSICRegularization(backend.ReplicaLosses, keras.layers.Layer):
    """Passes its first input through and adds `rate · HSIC(x, y)` to the loss.

    The auxiliary loss that the post recommends HSIC for: it makes a
    representation x independent of y (a nuisance attribute, another
    representation) or, with a negative rate, dependent. All axes but the first
    are features; masked time steps count as zeros. Replicas are gathered as in
    `HSICLoss`. Sample weights do not reach layers. Of fewer than 4 rows the
    term is 0 with `"unbiased"`, in training and in `predict`.

    With the default kernels the bandwidth of each step is a median over the
    batch, so shrinking the features does not lower the term.

    The default estimator is never negative, and of order 1/n for independent
    variables: at rate 100 and batches of 32 a term of 0.9 may mean that x and y
    are independent already. For the same reason its gradient slightly favours
    features with a small variance; the median bandwidth cancels this. To *read*
    the term as a measure of dependence take `estimator="unbiased"`, whose value
    is 0 on average for independent variables, and negative half of the time.

    Args:
        rate: Float. Weight of the term.
        kernel_x: A kernel, a function `fn(x1, x2)` that returns the `(n, m)`
            matrix, or a Keras layer that does, which is trained with the model;
            `None` is a Gaussian of median bandwidth.
        kernel_y: Likewise.
        estimator: `"biased"`, `"blog"` or `"unbiased"`.

    Input shape:  list `[x, y]`, `(batch, ...)` each.
    Output shape: that of `x`.

    Raises:
        ValueError: on an unknown estimator, a rate that is not finite, and on
            what is no kernel.

    Example:

    >>> image, camera = keras.Input((8,)), keras.Input((1,))
    >>> features = keras.layers.Dense(4)(image)
    >>> features = HSICRegularization(10.0)([features, camera])
    >>> model = keras.Model([image, camera], keras.layers.Dense(2)(features))

    Reference:
        [blog post 6910](https://kexue.fm/archives/6910)
    """

    def __init__(
        self,
        rate: float,
        kernel_x: Any = None,
        kernel_y: Any = None,
        estimator: str = "biased",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Labels and large numbers are not numbers of half precision.
        self.autocast = False
        self.supports_masking = True
        self.rate = check_number("rate", rate)
        self.kernel_x = as_kernel_or_none(kernel_x)
        self.kernel_y = as_kernel_or_none(kernel_y)
        self.estimator = check_choice("estimator", estimator, ESTIMATORS)
        freeze_inside(self)

    def build(self, input_shape):
        for kernel, shape in zip(
            (self.kernel_x, self.kernel_y), input_shape, strict=True
        ):
            if isinstance(kernel, keras.Layer) and not kernel.built:
                features = keras.KerasTensor((None, num_features(shape)))
                kernel(features, features)

    def call(self, inputs, mask=None):
        x, y = inputs
        mask = (None, None) if mask is None else mask
        if not isinstance(mask, (list, tuple)) or len(mask) != 2:
            raise ValueError(
                "Expected `mask` to be a pair [x_mask, y_mask] of masks or "
                f"None. Received: mask={mask!r}"
            )
        mask_x, mask_y = mask
        first, second, _ = gathered(flat(x, mask_x), flat(y, mask_y), None)
        value = hsic_of_batch(
            first, second, self.kernel_x, self.kernel_y, self.estimator
        )
        self.add_loss(self.rate * ops.cast(value, "float32"))
        return ops.cast(x, self._dtype_of(x))

    def compute_mask(self, inputs, previous_mask=None):
        return None if previous_mask is None else previous_mask[0]

    def compute_output_spec(self, inputs, mask=None):
        x, _ = inputs
        return keras.KerasTensor(x.shape, dtype=self._dtype_of(x))

    def _dtype_of(self, x):
        is_float = keras.backend.is_float_dtype(x.dtype)
        return self.compute_dtype if is_float else x.dtype

    def get_config(self):
        return {
            **super().get_config(),
            "rate": self.rate,
            "kernel_x": serialize(self.kernel_x),
            "kernel_y": serialize(self.kernel_y),
            "estimator": self.estimator,
        }

    @classmethod
    def from_config(cls, config):
        kernels = ("kernel_x", "kernel_y")
        return cls(
            **{
                k: deserialize(v) if k in kernels else v
                for k, v in config.items()
            }
        )


@keras.saving.register_keras_serializable(package="blogkeras")
class CKA(keras.metrics.Metric):
    """Centered kernel alignment of two representations, over minibatches.

        CKA = Σ_b HSIC(x_b, y_b) / √(Σ_b HSIC(x_b, x_b) Σ_b HSIC(y_b, y_b))

    with the unbiased HSIC of each batch b, so that the expected value does not
    depend on the batch size. Batches of fewer than 4 samples add nothing;
    samples of weight 0 are left out, other weights are ignored.

    Args:
        kernel_true: Kernel of the targets; linear by default, as in the papers.
            `None` is a Gaussian of median bandwidth.
        kernel_pred: Kernel of the outputs, likewise.
        name: String.
        dtype: Dtype of the result.

    Call arguments:
        y_true: `(batch, ...)`.
        y_pred: `(batch, ...)`.
        sample_weight: `(batch,)` or `None`. The result is a scalar.

    Raises:
        ValueError: on what is no kernel.

    Example:

    >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    >>> metric = CKA()
    >>> metric.update_state(x, 2 * x[:, ::-1])
    >>> round(float(metric.result()), 3)
    1.0

    Reference:
        [Nguyen et al., 2021](https://arxiv.org/abs/2010.15327)
    """

    def __init__(
        self,
        kernel_true: Any = LINEAR,
        kernel_pred: Any = LINEAR,
        name: str = "cka",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.kernel_true = as_kernel_or_none(kernel_true)
        self.kernel_pred = as_kernel_or_none(kernel_pred)
        self.sums = [
            self.add_variable((), "zeros", name=name, dtype="float32")
            for name in ("xy", "xx", "yy")
        ]

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = unmasked(y_true, y_pred), unmasked(y_pred)
        sizes = {y_true.shape[0], y_pred.shape[0]} - {None}
        if len(sizes) > 1:
            raise ValueError(
                "Expected as many rows of `y_true` as of `y_pred`. Received: "
                f"y_true.shape={tuple(y_true.shape)}, "
                f"y_pred.shape={tuple(y_pred.shape)}"
            )
        if sizes and min(sizes) < 4:
            return
        if sample_weight is not None:
            sample_weight = per_sample(sample_weight)
        grams, weight = prepare(
            y_true,
            y_pred,
            self.kernel_true,
            self.kernel_pred,
            sample_weight,
            "unbiased",
        )
        pairs = [(0, 1), (0, 0), (1, 1)]
        values = statistics(grams, weight, pairs, "unbiased")
        for total, value, (i, j) in zip(self.sums, values, pairs, strict=True):
            value = rescale(value, grams[i], grams[j])
            total.assign_add(ops.cast(value, "float32"))

    def result(self):
        return alignment(*map(ops.convert_to_tensor, self.sums))

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_true": serialize(self.kernel_true),
            "kernel_pred": serialize(self.kernel_pred),
        }

    @classmethod
    def from_config(cls, config):
        kernels = ("kernel_true", "kernel_pred")
        return cls(
            **{
                k: deserialize(v) if k in kernels else v
                for k, v in config.items()
            }
        )


def hsic_of_batch(x, y, kernel_x, kernel_y, estimator, weight=None):
    """`hsic` of batches of any size: unbiased, 0 for fewer than 4 rows."""
    rows = x.shape[0]
    if estimator == "unbiased" and rows in (1, 2, 3) and y.shape[0] == rows:
        # Copies of weight 0 fill the batch up. So the value 0 has a gradient,
        # of 0, without which TensorFlow's optimizers complain.
        index = np.minimum(np.arange(4), rows - 1)
        x = _taken(x, index, kernel_x)
        y = _taken(y, index, kernel_y)
        counted = np.arange(4) < rows
        if weight is not None:
            counted = ops.where(counted, ops.take(weight, index), 0.0)
        weight = counted
    return hsic(x, y, kernel_x, kernel_y, estimator, weight)


def _taken(x, index, kernel):
    """Rows of a variable; of a kernel matrix also these columns."""
    for axis in (0, 1) if isinstance(kernel, PrecomputedKernel) else (0,):
        take = np.take if is_array(x) else ops.take
        x = take(x, index, axis=axis)
    return x


def as_kernel_or_none(kernel):
    """The kernel as given, checked; Keras tracks it if it is a layer."""
    if kernel is not None:
        as_kernel(kernel)
    return kernel


def flat(x, mask=None):
    """`(batch, features)`, masked positions zero; arrays stay arrays."""
    if is_array(x) and mask is None:
        x = np.asarray(x)
        return x.reshape(len(x), math.prod(x.shape[1:])) if x.ndim else x
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16"):
        x = ops.cast(x, "float32")
    if mask is not None:
        mask = ops.cast(mask, "bool")
        first = tuple(x.shape[: len(mask.shape)])
        if not shapes_agree(tuple(mask.shape), first):
            raise ValueError(
                f"Expected a mask of the first axes of shape {tuple(x.shape)}. "
                f"Received: mask.shape={tuple(mask.shape)}"
            )
        for _ in range(len(x.shape) - len(mask.shape)):
            mask = mask[..., None]
        x = ops.where(mask, x, ops.zeros_like(x))
    return ops.reshape(x, [-1, num_features(x.shape)])


def unmasked(x, masked=None):
    """`flat`, without what the Keras mask of `masked`, or of `x`, hides.

    The target of a model has no mask of its own. It has that of the outputs if
    its first axes are as long, such as one of a target for each time step.
    """
    mask = backend.get_keras_mask(x if masked is None else masked)
    if mask is not None and masked is not None:
        shape = np.shape(x) if is_array(x) else x.shape
        pairs = list(zip(mask.shape, shape, strict=False))
        if len(pairs) < len(mask.shape) or any(
            None not in pair and pair[0] != pair[1] for pair in pairs
        ):
            mask = None
    return flat(x, mask)


def num_features(shape):
    """The product of all axes but the first, which are features."""
    if None in shape[1:]:
        raise ValueError(
            "Expected axes of known size, since all but the first are "
            "features: give them the same size in each batch, or pool them, "
            "such as by GlobalAveragePooling1D. Received: shape "
            f"{tuple(shape)}"
        )
    return math.prod(shape[1:])


def per_sample(weight):
    """Sample weights as a float32 vector, one for each row."""
    return ops.reshape(ops.cast(weight, "float32"), [-1])


def gather(x):
    """The rows of all replicas; on TensorFlow they lose their static shape."""
    if backend.num_replicas() == 1:
        return x
    x = ops.convert_to_tensor(x)
    return ops.reshape(backend.all_gather(x), [-1, *x.shape[1:]])


def gathered(x, y, sample_weight):
    """The batches of all replicas."""
    weight = None
    if sample_weight is not None:
        weight = gather(per_sample(sample_weight))
    return gather(x), gather(y), weight
