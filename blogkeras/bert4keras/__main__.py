"""Runs an old bert4keras script without any change to it.

    python -m blogkeras.bert4keras old_script.py [arguments]

The script sees as `keras` what bert4keras sees: Keras 3 with the habits of
Keras 2. In a script of your own write `import blogkeras.bert4keras` instead,
and `keras` is plain Keras 3.
"""

import os
import runpy
import sys
import types

import keras
from bert4keras.backend import keras as keras_of_scripts


def main(arguments):
    if not arguments:
        raise SystemExit(__doc__)
    # Submodules that are not replaced are found where Keras has them.
    keras_of_scripts.__path__ = keras.__path__
    for name, value in vars(keras_of_scripts).items():
        if isinstance(value, types.ModuleType):
            sys.modules[f"keras.{name}"] = value
    sys.modules["keras"] = keras_of_scripts
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
