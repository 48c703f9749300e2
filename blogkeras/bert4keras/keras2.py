"""Makes `keras` the module that bert4keras uses, in the whole process.

>>> import blogkeras.bert4keras.keras2
>>> from keras.models import Model  # takes `save_weights("best.weights")`
>>> from tensorflow.keras.layers import Lambda  # the same Keras

For an old script, or a notebook, that imports `Model`, `Lambda` and the like
from `keras` or `tensorflow.keras`: from here on `import keras` gives Keras 3
with the interface of Keras 2. `import tensorflow` gives TensorFlow, whose
`keras` is the same, and where names of TensorFlow 1 are those of
`tf.compat.v1`. Keras and TensorFlow are not changed, and code that has imported
them before keeps them. In a script of your own write `import
blogkeras.bert4keras` instead, and `keras` is plain Keras 3.
"""

import sys

import keras

import blogkeras.bert4keras  # noqa: F401
from blogkeras.bert4keras import importing, namespace


def _stand_in():
    modules = dict(importing.STAND_INS)
    root = modules["keras"]
    # Submodules that are not replaced are found where Keras has them.
    root.__path__ = keras.__path__
    for name, module in list(modules.items()):
        if any(other.startswith(f"{name}.") for other in modules):
            module.__dict__.setdefault("__path__", [])  # a package
        modules[f"tensorflow.{name}"] = module
        modules[f"tensorflow.python.{name}"] = module
    modules["tensorflow"] = namespace.make_tensorflow(root, compatible=True)
    sys.modules.update(modules)


_stand_in()
