"""What models that are made of models have in common."""

import contextlib

import keras
import numpy as np
from keras import ops, tree

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numpy,
    check_integer,
    check_no_class_weight,
    check_sample_weight,
    check_verbose,
)
from blogkeras.state import separate


class CompositeModel(keras.Model):
    """A model that is saved, restored and trained again with all its state."""

    ROW: str | None = None  # what a row is, where it has no class

    def compile_from_config(self, config):
        """Compiles a loaded model as the saved one was.

        Keras does this by itself only where `compile` is its own.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            # A part of another model may have been frozen after its training.
            # Its optimizer has the state of what was trained.
            trainable = self.trainable
            if not trainable:
                self.trainable = True
            self.optimizer.build(self.trainable_variables)
            if not trainable:
                self.trainable = False

    @as_in_keras
    def fit(self, x=None, **kwargs):
        """As in Keras."""
        if x is None:
            raise ValueError("Expected data to train on. Received: x=None")
        if _is_empty(x):  # Keras's trainer for JAX would lose all weights
            raise ValueError("Expected at least one row. Received: none")
        if self.ROW:
            check_no_class_weight(kwargs.get("class_weight"), self.ROW)
        separate(self)  # parts of it may have been trained before
        history = super().fit(x, **kwargs)
        separate(self)
        return history

    def export(
        self,
        filepath,
        format="tf_saved_model",
        verbose=None,
        input_signature=None,
        **kwargs,
    ):
        """As in Keras, without a call of the model before."""
        if input_signature is None:
            inputs = self._symbolic_inputs()
            input_signature = None if inputs is None else [inputs]
        super().export(
            filepath,
            format,
            verbose,
            input_signature=input_signature,
            **kwargs,
        )

    def _symbolic_inputs(self):
        """What `call` takes, for `export`; `None` where that is not known.

        Keras only knows shapes, and takes all inputs for floating ones.
        """
        return None

    @property
    def _default_save_signature(self):
        # Keras's would trace the model once more, with floating inputs.
        return None

    # Keras leaves the states of `SeedGenerator`s out of its files, so dropout
    # of a loaded model would begin anew. Here they are saved as well.

    def _seed_states(self):
        weights = {id(v) for v in self.weights}
        return [v for v in self.variables if id(v) not in weights]

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for number, state in enumerate(self._seed_states()):
            store[f"seed_{number}"] = state

    def load_own_variables(self, store):
        names = list(store.keys())
        seeds = [name for name in names if name.startswith("seed_")]
        super().load_own_variables(
            {name: store[name] for name in names if name not in seeds}
        )
        states = self._seed_states()
        if len(seeds) == len(states):
            for number, state in enumerate(states):
                state.assign(store[f"seed_{number}"])


class TargetlessModel(CompositeModel):
    """A model of data without targets, whose loss is its own. Abstract.

    In a compiled step no values are known, so the data are checked before it:
    `fit` and the like hand `x` to `_check_data` first, which subclasses
    override. Sample weights are one number ≥ 0 for each row.
    """

    ROW = "row"

    def _check_data(self, x):
        """Checks data; of a data set, its first batch.

        Returns:
            `(x, rows)`: what to hand to Keras, and how many rows there are, or
            `None` where that is not known.
        """
        raise NotImplementedError

    def _check_batch(self, batch):
        """Checks a batch of a generator, with targets and weights if it has."""
        raise NotImplementedError

    def _checked_batches(self, batches):
        """The batches of a generator, each checked when its turn comes."""
        batch = None
        for batch in batches:
            try:
                self._check_batch(batch)
            except ValueError as error:
                self._batch_error = error
                raise
            yield batch
        if batch is None:
            raise ValueError("Expected at least one batch. Received: none")

    def _check_stream(self, x):
        """Checks a data set's first batch, or a generator's ones in turn.

        Returns:
            What to hand to Keras.
        """
        if hasattr(x, "__next__"):
            return self._checked_batches(x)
        batch = None
        # A data set that is divided among replicas has no `take`.
        if hasattr(x, "element_spec") and hasattr(x, "take"):
            batch = next(iter(x.take(1)), None)
        elif isinstance(x, keras.utils.PyDataset) and x.num_batches != 0:
            batch = x[0]
        if batch is not None:
            self._check_batch(batch)
        return x

    @contextlib.contextmanager
    def _errors_of_batches(self):
        """TensorFlow hands an error of a generator on as one of its own."""
        self._batch_error = None
        try:
            yield
        except Exception:
            if self._batch_error is None:
                raise
            raise self._batch_error from None

    def _before_fit(self, x):
        """Called by `fit` with checked data."""

    def _checked(self, x, y=None, sample_weight=None):
        x, rows = self._check_data(x)
        sample_weight = check_sample_weight(sample_weight, rows, self.ROW)
        if sample_weight is not None and y is None and rows is not None:
            # Without `y`, Keras would ignore the sample weights.
            y = np.zeros(rows, "float32")
        return x, y, sample_weight

    @as_in_keras
    def fit(self, x=None, y=None, sample_weight=None, **kwargs):
        """As in Keras; `y` is not used, sample weights are one for each row."""
        check_no_class_weight(kwargs.get("class_weight"), self.ROW)
        x, y, sample_weight = self._checked(x, y, sample_weight)
        known = kwargs.get("validation_data")
        if isinstance(known, (tuple, list)) and len(known):
            known = self._checked(*known)
            kwargs["validation_data"] = known[: 2 + (known[2] is not None)]
        elif known is not None:
            kwargs["validation_data"] = self._check_data(known)[0]
        self._before_fit(x)
        if hasattr(x, "element_spec") or hasattr(x, "__next__"):
            # Keras warns of each data set that it does not shuffle.
            kwargs.setdefault("shuffle", False)
        with self._errors_of_batches():
            return super().fit(x, y, sample_weight=sample_weight, **kwargs)

    @as_in_keras
    def evaluate(self, x=None, y=None, sample_weight=None, **kwargs):
        # `fit` has checked its validation data already. It calls this with a
        # private argument of Keras.
        if not any(name.startswith("_") for name in kwargs):
            x, y, sample_weight = self._checked(x, y, sample_weight)
        with self._errors_of_batches():
            return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x, *args, **kwargs):
        x = self._check_data(x)[0]
        with self._errors_of_batches():
            return super().predict(x, *args, **kwargs)

    @as_in_keras
    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        check_no_class_weight(kwargs.get("class_weight"), self.ROW)
        return super().train_on_batch(
            *self._checked(x, y, sample_weight), **kwargs
        )

    @as_in_keras
    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        return super().test_on_batch(
            *self._checked(x, y, sample_weight), **kwargs
        )


def _is_empty(x):
    """Whether arrays have no row, or a data set has no batch, as far as known.

    A data set has none where `drop_remainder` leaves nothing.
    """
    if hasattr(x, "element_spec") and hasattr(x, "take"):
        return int(x.cardinality()) == 0
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches == 0
    arrays = [part for part in tree.flatten(x) if hasattr(part, "__array__")]
    return any(tuple(part.shape[:1]) == (0,) for part in arrays)


def symbolic_inputs(model):
    """What a functional or sequential model takes; `None` of another one."""
    if isinstance(model, keras.Sequential):
        return next(iter(getattr(model, "inputs", ())), None)
    return getattr(model, "_inputs_struct", None)


def check_own_loss(arguments):
    """Raises a `ValueError` where `compile` is given a loss or metrics.

    Args:
        arguments: Dict of the keyword arguments of `compile`.
    """
    for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
        value = arguments.get(name)
        empty = isinstance(value, (list, tuple, dict)) and not value
        if value is not None and not empty:
            raise ValueError(
                f"Expected no loss and no metrics, here `{name}`: they are the "
                f"model's own. Received: {name}={value!r}"
            )


def compiled(model, fn, xla=True):
    """A function compiled as the model's own steps are, by its `compile`.

    Args:
        model: A built Keras layer or model.
        fn: Function of tensors that calls `model` or its parts and assigns
            nothing.
        xla: Boolean. Whether XLA compiles it where `compile` does not say so.

    Returns:
        Function of tensors: `fn` itself under `run_eagerly`.
    """
    if isinstance(model, keras.Model) and model.compiled:
        if model.run_eagerly:
            return fn
        given = getattr(model, "jit_argument", model.jit_compile)
        xla = xla if given == "auto" else bool(given)
    return backend.jit_layer(fn, model, xla)


def map_batches(program, arrays, batch_size=32, verbose=0):
    """Applies a compiled function to rows, a batch at a time.

    All batches have one shape, so the function is compiled once. The last batch
    is filled up with copies of its last row, whose results are dropped.

    Args:
        program: Function of as many tensors as there are arrays, each with
            `batch_size` rows; returns a structure of tensors with as many rows.
        arrays: List of arrays with equally many rows, at least one.
        batch_size: Integer.
        verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

    Returns:
        The structure of NumPy arrays for all rows.
    """
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    verbose = check_verbose(verbose)
    arrays = [as_numpy(array) for array in arrays]
    rows = len(arrays[0])
    if not rows or any(len(array) != rows for array in arrays):
        raise ValueError(
            "Expected arrays with equally many rows, at least one. Received: "
            f"shapes {[array.shape for array in arrays]}"
        )
    batch_size = min(batch_size, rows)
    starts = range(0, rows, batch_size)
    bar = None
    if verbose:
        bar = keras.utils.Progbar(len(starts), verbose=verbose)
    results = []
    for number, start in enumerate(starts, start=1):
        batch = [array[start : start + batch_size] for array in arrays]
        size = len(batch[0])
        if size < batch_size:
            batch = [
                np.concatenate([x, np.repeat(x[-1:], batch_size - size, 0)])
                for x in batch
            ]
        outputs = program(*map(ops.convert_to_tensor, batch))
        results.append(
            tree.map_structure(
                lambda x, size=size: ops.convert_to_numpy(x)[:size], outputs
            )
        )
        if bar is not None:
            bar.update(number)
    return tree.map_structure(lambda *parts: np.concatenate(parts), *results)
