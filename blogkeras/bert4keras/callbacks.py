"""Callbacks with the interface of Keras 2."""

import keras

from blogkeras import arguments


class Callback(keras.callbacks.Callback):
    """A callback whose `model` a script may set itself."""

    # The arrays in a tuple, once `fit` has told; they may be None.
    _told = ()

    @property
    def validation_data(self):
        """Keras 2's list of arrays: inputs, targets and weights.

        It is None without validation data, and where they are a generator.
        """
        if self._told:
            return self._told[0]
        if self.model is not None:
            raise ValueError(
                "Expected the model to be of the `Model` that fills in "
                "`validation_data`: from bert4keras.backend import keras, then "
                "keras.models.Model. With another model give the data to the "
                f"callback's __init__. Received: model={self.model!r}"
            )
        return None

    @validation_data.setter
    def validation_data(self, arrays):
        self._told = (arrays,)

    @property
    def model(self):
        return getattr(self, "_model", None)

    @model.setter
    def model(self, model):
        self._model = model


def _direction(monitor, mode):
    """Keras 2's meaning of `mode="auto"`: only accuracies shall be large.

    Its `ModelCheckpoint` knew the old metric `fmeasure`, too; all do here.
    """
    if mode != "auto":
        return mode
    large = "acc" in monitor or monitor.startswith("fmeasure")
    return "max" if large else "min"


class EarlyStopping(keras.callbacks.EarlyStopping):
    """`EarlyStopping` whose `mode="auto"` goes by the name, as in Keras 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode = _direction(self.monitor, self.mode)


class ReduceLROnPlateau(keras.callbacks.ReduceLROnPlateau):
    """`ReduceLROnPlateau` whose `mode="auto"` goes by the name."""

    def __init__(self, *args, **kwargs):
        if "epsilon" in kwargs:  # its name in Keras 2.1, which Keras 3 ignores
            kwargs["min_delta"] = kwargs.pop("epsilon")
        super().__init__(*args, **kwargs)
        self.mode = _direction(self.monitor, self.mode)


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` of files of any name, and of every `period` epochs.

    Args:
        filepath: String. As it is; `{epoch}` and the like are filled in.
        period: Integer. Epochs from one save to the next.
        others: as those of `keras.callbacks.ModelCheckpoint`.
    """

    def __init__(
        self,
        filepath,
        monitor="val_loss",
        verbose=0,
        save_best_only=False,
        save_weights_only=False,
        mode="auto",
        period=1,
        **kwargs,
    ):
        period = arguments.check_integer("period", period, minimum=1)
        known = "x.weights.h5" if save_weights_only else "x.keras"
        super().__init__(
            known,
            monitor,
            verbose,
            save_best_only,
            save_weights_only,
            _direction(monitor, mode),
            **kwargs,
        )
        self.filepath = str(filepath)
        self.period = period
        self._epochs_since_save = 0

    def on_epoch_end(self, epoch, logs=None):
        self._epochs_since_save += 1
        if self._epochs_since_save >= self.period:
            self._epochs_since_save = 0
            super().on_epoch_end(epoch, logs)


class TensorBoard(keras.callbacks.TensorBoard):
    """`TensorBoard` that takes, and does not need, arguments of Keras 2."""

    def __init__(self, log_dir="./logs", histogram_freq=0, **kwargs):
        for name in ("batch_size", "write_grads", "embeddings_layer_names"):
            kwargs.pop(name, None)
        kwargs.pop("embeddings_data", None)
        super().__init__(log_dir, histogram_freq, **kwargs)
