"""Weights and models in files of any name, as Keras 2 wrote them.

Keras 3 insists on `.weights.h5` and `.keras`. Under any other name weights are
written here in the HDF5 format of Keras 2, which Keras 3 still reads and
writes; such a file can be exchanged with a script that runs on Keras 2. It
holds no state of the optimizer. A model is written in the format of Keras 3
under the name that was given.
"""

import os
import pathlib
import tempfile
import zipfile

import h5py
import keras

# Not public: `model.save_weights` writes this format no longer.
from keras.src.legacy.saving import legacy_h5_format

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
    if path.endswith(".weights.json") or not os.path.exists(path):
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
    with _named(path, "model.h5" if old else "model.weights.h5") as name:
        if by_name:
            kwargs["by_name"] = True
        keras.Model.load_weights(
            model, name, skip_mismatch=skip_mismatch, **kwargs
        )


def save_model(model, filepath, overwrite=True, **kwargs):
    """Writes `model` to the file of exactly this name."""
    path = str(filepath)
    kwargs.pop("save_format", None)
    if path.endswith((".keras", *_HDF5)):
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
    if os.path.isfile(path) and not path.endswith((".keras", *_HDF5)):
        name = "model.keras" if zipfile.is_zipfile(path) else "model.h5"
    with _named(path, name) as path:
        return keras.models.load_model(path, custom_objects, compile, safe_mode)


class _named:
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
    """Asks before a file is overwritten that should not be."""
    if overwrite or not os.path.exists(path):
        return True
    answer = input(f"[WARNING] {path} already exists - overwrite? [y/n] ")
    return answer.strip().lower() == "y"
