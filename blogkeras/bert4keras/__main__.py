"""Runs an old bert4keras script without any change to it.

    python -m blogkeras.bert4keras old_script.py [arguments]

The script gets the same `keras` as bert4keras: Keras 3 with the interface of
Keras 2, as after `import blogkeras.bert4keras.keras2`.
"""

import os
import runpy
import sys


def main(arguments):
    """Runs the script `arguments[0]` with the arguments that follow."""
    if not arguments:
        raise SystemExit(__doc__)
    import blogkeras.bert4keras.keras2  # noqa: F401

    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
