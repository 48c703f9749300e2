"""Weights and models in files of any name, as Keras 2 wrote them.

Keras 3 requires the endings `.weights.h5` and `.keras`. Under any other name
weights are written here in the HDF5 format of Keras 2, which Keras 3 still
reads and writes; such a file can be exchanged with a script that runs on Keras
2. It holds no state of the optimizer. A model is written in the format of Keras
3 under the name that was given.
"""

import inspect
import os
import pathlib
import tempfile
import warnings
import zipfile

import h5py
import keras
from keras._tf_keras.keras import losses as legacy_losses

# This is not public: `model.save_weights` no longer writes this format.
from keras.src.legacy.saving import legacy_h5_format

from blogkeras.bert4keras import names
from blogkeras.bert4keras.optimizers import OPTIMIZERS

_HDF5 = (".h5", ".hdf5")


def save_weights(model, filepath, overwrite=True, **kwargs):
    """Writes the weights of `model` to the file of exactly this name."""
    path = str(filepath)
    if path.endswith((".weights.h5", ".weights.json")):
        keras.Model.save_weights(model, filepath, overwrite, **kwargs)
        return
    if not _may_write(path, overwrite):
        return
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


def load_weights(model, filepath, by_name=False, skip_mismatch=False, **kwargs):
    """Reads weights that `save_weights`, Keras 2 or Keras 3 has written."""
    path = str(filepath)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"Expected a file of weights. Received: filepath={filepath}"
        )
    if path.endswith(".weights.json") or os.path.isdir(path):
        keras.Model.load_weights(model, filepath, skip_mismatch, **kwargs)
        return
    try:
        with h5py.File(path, "r") as file:
            old = "layer_names" in file.attrs or "layer_names0" in file.attrs
            old = old or "model_weights" in file
    except OSError as error:
        raise ValueError(
            f"Expected an HDF5 file of weights. Received: filepath={filepath} "
            f"({error})"
        ) from None
    with _Named(path, "model.h5" if old else "model.weights.h5") as name:
        if by_name:
            kwargs["by_name"] = True
        keras.Model.load_weights(
            model, name, skip_mismatch=skip_mismatch, **kwargs
        )


def save_model(model, filepath, overwrite=True, **kwargs):
    """Writes `model` to the file of exactly this name."""
    path = str(filepath)
    kwargs.pop("save_format", None)
    if path.endswith(_HDF5):
        # Keras 3 takes the optimizer out of the model's own configuration
        # while it writes HDF5, and would not find it there the next time.
        compiled = getattr(model, "_compile_config", None)
        config = dict(compiled.config) if compiled else {}
        keras.Model.save(model, filepath, overwrite, **kwargs)
        if compiled:
            compiled.config.update(config)
        return
    if path.endswith(".keras"):
        keras.Model.save(model, filepath, overwrite, **kwargs)
        return
    kwargs.pop("include_optimizer", None)
    if not _may_write(path, overwrite):
        return
    temporary = f"{path}.{os.getpid()}.keras"
    try:
        keras.Model.save(model, temporary, **kwargs)
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)


def load_model(filepath, custom_objects=None, compile=True, safe_mode=False):
    """`keras.models.load_model` of a file of any name.

    As in Keras 2, the code of a `Lambda` of the user's own is run. So take
    only files that you trust, or `safe_mode=True`, which refuses such code.
    """
    path = str(filepath)
    name = pathlib.Path(path).name
    own = custom_objects
    if os.path.isfile(path) and not path.endswith((".keras", *_HDF5)):
        name = "model.keras" if zipfile.is_zipfile(path) else "model.h5"
    if name.endswith(_HDF5):
        # In HDF5 files Keras 3 does not find its own functions by their names.
        known = {
            key: keras.saving.get_registered_object(f"bert4keras>{key}")
            for key in ("Model", "Sequential")
        }
        known["Functional"] = known["Model"]
        # Keras looks for optimizers by names in small letters. Those of Keras 2
        # have arguments that Keras 3's do not know, such as `lr` and `decay`.
        for key, optimizer in OPTIMIZERS.items():
            known[key.lower()] = optimizer
        custom_objects = {
            **_loss_functions(),
            **known,
            **(custom_objects or {}),
        }
    with _Named(path, name) as link:
        model = keras.models.load_model(
            link, custom_objects, compile, safe_mode
        )
    if name.endswith(_HDF5):
        with h5py.File(path, "r") as file:
            version = file.attrs.get("keras_version", "")
        if isinstance(version, bytes):  # as Keras 2 writes it
            version = version.decode()
        if version.startswith("2."):
            names.set_old_activations(model)
    if compile and name.endswith(_HDF5) and model.compiled:
        # The model is compiled again, by the names of the user's functions.
        with keras.saving.custom_object_scope(own or {}):
            _restore_optimizer(model, path)
    return model


def _restore_optimizer(model, path):
    """Gives the optimizer its state, which Keras 3 leaves in an HDF5 file."""
    with h5py.File(path, "r") as file:
        group = file.get("optimizer_weights")
        paths = [] if group is None else group.attrs["weight_names"]
        values = [group[path][()] for path in paths]
    config = model.get_compile_config()
    if values and config:
        # Compile again: the loaded optimizer has been built without variables.
        model.compile_from_config(config)
        variables = model.optimizer.variables
        if [v.shape for v in values] == [tuple(v.shape) for v in variables]:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        else:
            warnings.warn(
                f"The state of the optimizer in {path} is of another kind, "
                "and is not read.",
                stacklevel=3,
            )


def _loss_functions():
    return {
        name: function
        for module in (keras.losses, keras.metrics, legacy_losses)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        if name not in ("get", "serialize", "deserialize")
    }


class _Named:
    """A context in which the file `path` has the ending that Keras wants."""

    def __init__(self, path, name):
        self._path, self._name = path, name

    def __enter__(self):
        suffix = "".join(pathlib.Path(self._name).suffixes)
        if self._path.endswith(suffix):
            self._folder = None
            return self._path
        self._folder = tempfile.TemporaryDirectory()
        link = os.path.join(self._folder.name, self._name)
        try:
            os.symlink(os.path.abspath(self._path), link)
        except OSError:  # a system without links
            link = os.path.join(self._folder.name, self._name)
            pathlib.Path(link).write_bytes(
                pathlib.Path(self._path).read_bytes()
            )
        return link

    def __exit__(self, *_):
        if self._folder is not None:
            self._folder.cleanup()


def _may_write(path, overwrite):
    """Whether a file may be written; asks the user unless `overwrite`."""
    if overwrite or not os.path.exists(path):
        return True
    answer = input(f"[WARNING] {path} already exists - overwrite? [y/n] ")
    return answer.strip().lower() == "y"
