"""The model classes of old scripts: Keras 3's, with Keras 2's interface."""

import contextvars

import keras
import tensorflow as tf

from blogkeras.bert4keras import compiling, data, layers, saving
from blogkeras.bert4keras.names import register
from blogkeras.bert4keras.optimizers import get_optimizer

# The model whose loss is being computed, if any.
_at_work = contextvars.ContextVar("model at work", default=None)

# Whether that is for a step of training.
_training = contextvars.ContextVar("loss of a step of training", default=False)

# Arguments of Keras 2's queue of batches, which Keras 3 does not have.
_QUEUE = (
    "max_queue_size",
    "max_q_size",
    "workers",
    "use_multiprocessing",
    "pickle_safe",
)

# The arguments of `fit` behind the data, in their order in Keras 2 and 3.
_OF_FIT = (
    "batch_size",
    "epochs",
    "verbose",
    "callbacks",
    "validation_split",
    "validation_data",
    "shuffle",
    "class_weight",
    "sample_weight",
    "initial_epoch",
    "steps_per_epoch",
    "validation_steps",
)


def model_at_work():
    """Returns the bridged model whose loss is being computed."""
    return _at_work.get()


def trains_at_work():
    """Tells whether a loss is being computed to be learned from."""
    return _training.get()


def _unwrapped(tensors):
    """Keras 2 says `x` where Keras 3 says `[x]`."""
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1:
        return tensors[0]
    return tensors


def _arguments(kwargs):
    """Renames and drops arguments of Keras 1 and 2."""
    kwargs = {k: v for k, v in kwargs.items() if k not in _QUEUE}
    if "nb_epoch" in kwargs:
        kwargs["epochs"] = kwargs.pop("nb_epoch")
    return kwargs


class Habits:
    """The interface of Keras 2's models that Keras 3's models lack.

    Data may be lists, and generators may yield lists and batches of any length.
    `fit_generator`, `evaluate_generator` and `predict_generator` exist,
    arguments have the order of Keras 2, and a file may have any name. With one
    input, `model.input` is a tensor. `add_loss` and `add_metric` take symbolic
    tensors of the model; as in Keras 2 they are not saved with it.

    It is a mixin because Keras changes the bases of a subclass of its `Model`
    when the first functional model of it is created.
    """

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        metrics=None,
        loss_weights=None,
        sample_weight_mode=None,
        weighted_metrics=None,
        target_tensors=None,
        **kwargs,
    ):
        if target_tensors is not None:
            raise ValueError(
                "Keras 3 has no symbolic targets: give `y` to fit. "
                f"Received: target_tensors={target_tensors}"
            )
        if sample_weight_mode not in (None, "temporal"):
            raise ValueError(
                "Expected `sample_weight_mode` to be None or 'temporal'; "
                "weights of steps are known by their shape. "
                f"Received: sample_weight_mode={sample_weight_mode!r}"
            )
        given = {
            "loss": loss,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
        }
        count = len(getattr(self, "output_names", None) or [""])
        super().compile(
            get_optimizer(optimizer),
            compiling.as_losses(loss),
            metrics=compiling.as_metrics(metrics, count),
            loss_weights=loss_weights,
            weighted_metrics=compiling.as_metrics(
                weighted_metrics, count, weighted=True
            ),
            **kwargs,
        )
        # Files, copies and readers of the loss get what was given.
        self._compile_config.config.update(given)
        object.__setattr__(self, "loss", loss)

    def compile_from_config(self, config):
        # Keras does this itself for models that leave `compile` as it is.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics_names(self):
        """The names of what `evaluate` returns, in its order."""
        names = []
        for metric in self.metrics:
            parts = getattr(metric, "metrics", None)
            names += [m.name for m in parts] if parts else [metric.name]
        return [name for name in names if name != "compile_metrics"]

    def fit(self, x=None, y=None, *args, **kwargs):
        kwargs = _arguments(kwargs)
        if data.is_iterator(x):
            weight = kwargs.get("sample_weight")
            if y is not None or weight is not None or args:
                raise ValueError(
                    "Expected a generator to yield the targets and weights, "
                    "and further arguments by name. "
                    f"Received: y={y}, sample_weight={weight}, {args}"
                )
            if isinstance(x, data.Sequence):
                steps = kwargs.get("steps_per_epoch") or len(x)
                kwargs["steps_per_epoch"] = steps
            x = _batches(x, self, shuffle=kwargs.pop("shuffle", True))
            kwargs["shuffle"] = False
            if kwargs.get("class_weight") is not None:
                # Keras would ignore `class_weight` for batches of our own
                # class.
                x = x.get_tf_dataset()
        if not set(_OF_FIT[: len(args)]) & set(kwargs):
            # A value that is given twice is left to Python's own error.
            kwargs.update(zip(_OF_FIT, args, strict=False))
            args = args[len(_OF_FIT) :]
        if kwargs.get("sample_weight") is not None:
            kwargs["sample_weight"] = data.as_arrays(kwargs["sample_weight"])
        held_out = kwargs.get("validation_data")
        if data.is_iterator(held_out):
            if isinstance(held_out, data.Sequence):
                steps = kwargs.get("validation_steps") or len(held_out)
                kwargs["validation_steps"] = steps
            kwargs["validation_data"] = _batches(held_out, self)
        elif isinstance(held_out, (list, tuple)):
            kwargs["validation_data"] = data.as_batch(held_out)
        x, y = _arrays(x), data.as_arrays(y)
        self._tell_callbacks(x, y, kwargs)
        return super().fit(x, y, *args, **kwargs)

    def _tell_callbacks(self, x, y, kwargs):
        """Gives callbacks Keras 2's list of the arrays to validate with."""
        callbacks = kwargs.get("callbacks")
        callbacks = getattr(callbacks, "callbacks", callbacks)
        held_out = kwargs.get("validation_data")
        share = kwargs.get("validation_split")
        if share and held_out is None:
            held_out = data.last_rows(
                (x, y, kwargs.get("sample_weight")), share
            )
        arrays = data.validation_arrays(held_out)
        for callback in keras.tree.flatten(callbacks or []):
            callback.validation_data = arrays

    def evaluate(self, x=None, y=None, *args, **kwargs):
        kwargs = _arguments(kwargs)
        x = _with_steps(self, x, kwargs)
        return super().evaluate(_arrays(x), data.as_arrays(y), *args, **kwargs)

    def predict(self, x, batch_size=None, verbose=0, *args, **kwargs):
        kwargs = _arguments(kwargs)
        x = _with_steps(self, x, kwargs, inputs_only=True)
        return super().predict(_arrays(x), batch_size, verbose, *args, **kwargs)

    def fit_generator(
        self, generator, steps_per_epoch=None, epochs=1, verbose=1, *args, **kw
    ):
        """`fit`, with the arguments in the order of Keras 2."""
        names = ("callbacks", "validation_data", "validation_steps")
        names += ("validation_freq", "class_weight", "max_queue_size")
        names += ("workers", "use_multiprocessing", "shuffle", "initial_epoch")
        kw.update(zip(names, args, strict=False))
        kw.setdefault("steps_per_epoch", steps_per_epoch)
        kw.setdefault("epochs", epochs)
        return self.fit(generator, verbose=verbose, **kw)

    def evaluate_generator(
        self, generator, steps=None, callbacks=None, *queue, verbose=0, **kwargs
    ):
        """`evaluate`, with the arguments in the order of Keras 2."""
        kwargs.setdefault("steps", steps)
        return self.evaluate(
            generator, callbacks=callbacks, verbose=verbose, **kwargs
        )

    def predict_generator(
        self, generator, steps=None, callbacks=None, *queue, verbose=0, **kwargs
    ):
        """`predict`, with the arguments in the order of Keras 2."""
        kwargs.setdefault("steps", steps)
        return self.predict(
            generator, callbacks=callbacks, verbose=verbose, **kwargs
        )

    def train_on_batch(self, x, y=None, *args, **kwargs):
        x, y = data.as_arrays(x), data.as_arrays(y)
        kwargs.pop("reset_metrics", None)  # Keras 3 resets them
        return super().train_on_batch(x, y, *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        x, y = data.as_arrays(x), data.as_arrays(y)
        kwargs.pop("reset_metrics", None)
        return super().test_on_batch(x, y, *args, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(data.as_arrays(x))

    def save(self, filepath, *args, **kwargs):
        saving.save_model(self, filepath, *args, **kwargs)

    def save_weights(self, filepath, *args, **kwargs):
        saving.save_weights(self, filepath, *args, **kwargs)

    def load_weights(self, filepath, *args, **kwargs):
        saving.load_weights(self, filepath, *args, **kwargs)

    # A function: Keras must not find the layers in there a second time.
    _with_added = None

    @property
    def input(self):
        return _unwrapped(super().input)

    @property
    def total_loss(self):
        """Raises: Keras 3 has no train function of symbolic tensors."""
        raise NotImplementedError(
            "Keras 3 has no train function of symbolic tensors to build upon. "
            "For adversarial training, take out the script's own function: "
            "from blogkeras import adversarial_training (or "
            "virtual_adversarial_training), then "
            "adversarial_training(model, 'Embedding-Token', 0.5). "
            f"Received: model={self.name!r}"
        )

    def _make_train_function(self):
        return self.total_loss

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        # For a loss that searches the layers that its argument comes from, or
        # that asks for the learning phase.
        tokens = _at_work.set(self), _training.set(bool(training))
        try:
            return super().compute_loss(
                x, y, y_pred, sample_weight, training=training
            )
        finally:
            _at_work.reset(tokens[0])
            _training.reset(tokens[1])

    def add_loss(self, loss, inputs=None):
        """Adds a loss: a symbolic tensor of the model, or a list of them."""
        losses = loss if isinstance(loss, (list, tuple)) else [loss]
        for tensor in losses:
            if isinstance(tensor, keras.KerasTensor):
                self._add(tensor, self._add_value)
            else:
                self._add_value(tensor)

    def _add_value(self, loss):
        # A functional model of Keras 3 overrides `add_loss` to refuse.
        keras.layers.Layer.add_loss(self, loss)

    def add_metric(self, value, name=None, aggregation="mean"):
        """Shows the mean of a symbolic tensor of the model as a metric."""
        if not isinstance(value, keras.KerasTensor):
            raise ValueError(
                "Expected `value` to be a symbolic tensor of the model. In a "
                f"layer use the layer's `add_metric`. Received: value={value}"
            )
        metric = layers.mean_metric(self, name, aggregation)
        self._add(value, metric.update_state)

    def _add(self, tensor, use):
        """Computes a further tensor in each call, and passes it to `use`."""
        tensors, uses = self._with_added() if self._with_added else ([], [])
        tensors, uses = [*tensors, tensor], [*uses, use]
        self._with_added = lambda: (tensors, uses)
        extended = keras.Model(self.inputs, [*self.outputs, *tensors])
        self._extended = lambda: extended

    def call(self, inputs, training=None, mask=None, **kwargs):
        if self._with_added is None:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        uses = self._with_added()[1]
        values = self._extended()(
            keras.tree.flatten(inputs), training=training, mask=mask
        )
        count = len(self.outputs)
        for use, value in zip(uses, values[count:], strict=True):
            use(value)
        return keras.tree.pack_sequence_as(self.output, values[:count])


def _arrays(x):
    is_data = isinstance(x, (data.Batches, tf.data.Dataset))
    return x if is_data else data.as_arrays(x)


def _batches(items, model, inputs_only=False, shuffle=False):
    if isinstance(items, data.Sequence):
        items = data.endless(items, shuffle)
    return data.Batches(items, inputs_only, model)


def _with_steps(model, x, kwargs, inputs_only=False):
    """Makes batches of an iterator; a `Sequence` knows how many there are."""
    if not data.is_iterator(x):
        return x
    if isinstance(x, data.Sequence) and kwargs.get("steps") is None:
        kwargs["steps"] = len(x)
    return _batches(x, model, inputs_only)


class Model(Habits, keras.Model):
    """A functional model that takes what old scripts give to it."""


class Sequential(Habits, keras.Sequential):
    """`keras.Sequential` that takes what old scripts give to it."""

    def predict_proba(self, x, batch_size=None, verbose=0):
        """`predict` under a name of Keras 2."""
        return self.predict(x, batch_size, verbose)

    def predict_classes(self, x, batch_size=None, verbose=0):
        """The classes predicted: the largest output, or one above 0.5."""
        probabilities = self.predict(x, batch_size, verbose)
        if probabilities.shape[-1] > 1:
            return probabilities.argmax(axis=-1)
        return (probabilities > 0.5).astype("int32")


register(Model)
register(Sequential)


def make_model(*args, **kwargs):
    """Makes a functional `Model`, from the arguments of Keras 2."""
    for old, new in (("input", "inputs"), ("output", "outputs")):
        if old in kwargs:
            kwargs[new] = kwargs.pop(old)
    kwargs.update(zip(("inputs", "outputs", "name"), args, strict=False))
    if kwargs.get("inputs") is None:
        return Model(**kwargs)
    if isinstance(kwargs["inputs"], keras.KerasTensor):
        kwargs["inputs"] = [kwargs["inputs"]]
    kwargs["outputs"] = _unwrapped(kwargs["outputs"])
    return Model(**kwargs)
