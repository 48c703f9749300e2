"""Makes `keras` mean what bert4keras sees, for the rest of the process.

>>> import blogkeras.bert4keras.keras2
>>> from keras.models import Model  # takes `save_weights("best.weights")`

For an old script, or a notebook, that imports `Model`, `Lambda` and the like
from `keras` itself: from here on `import keras` gives Keras 3 with the habits
of Keras 2. Keras is not changed, and code that has imported it before keeps it.
In a script of your own write `import blogkeras.bert4keras` instead, and `keras`
is plain Keras 3.
"""

import sys
import types

import keras
from bert4keras.backend import keras as keras_of_scripts


def _stand_in():
    # Submodules that are not replaced are found where Keras has them.
    keras_of_scripts.__path__ = keras.__path__
    for name, value in vars(keras_of_scripts).items():
        if isinstance(value, types.ModuleType):
            sys.modules[f"keras.{name}"] = value
    sys.modules["keras"] = keras_of_scripts


_stand_in()
