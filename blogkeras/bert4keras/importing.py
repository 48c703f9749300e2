"""Imports the unmodified package bert4keras, once, on top of Keras 3."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import types
import warnings

from blogkeras.extras import command

VERSION = "0.11.5"
INSTALL = command("bert4keras")

# The modules that replace Keras's, once bert4keras has been imported.
STAND_INS = {}

_MODULES = (
    "backend",
    "snippets",
    "layers",
    "models",
    "optimizers",
    "tokenizers",
)


def _is_bert4keras(name):
    return name.partition(".")[0] == "bert4keras"


def check():
    """Raises an ImportError that says what to do if bert4keras cannot run."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ImportError(
            "bert4keras is written in TensorFlow and needs Keras's TensorFlow "
            "backend. Set it before Keras is imported: "
            "KERAS_BACKEND=tensorflow python your_script.py. "
            f"Received: backend={keras.backend.backend()}"
        )
    if int(keras.__version__.partition(".")[0]) < 3:
        raise ImportError(
            "blogkeras.bert4keras expects Keras 3: pip install 'keras>=3'. "
            f"Received: keras=={keras.__version__}"
        )
    try:
        version = importlib.metadata.version("bert4keras")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version != VERSION:
        raise ImportError(
            f"blogkeras.bert4keras expects bert4keras {VERSION}. "
            f"Install it with: {INSTALL}. Received: bert4keras=={version}"
        )
    if _strtobool(os.environ.get("RECOMPUTE", "0")):
        raise ImportError(
            "bert4keras's recomputation does not work on Keras 3: layers would "
            "not see the padding mask. Unset RECOMPUTE, and take smaller "
            "batches with `gradient_accumulation_steps` of a Keras optimizer. "
            f"Received: RECOMPUTE={os.environ['RECOMPUTE']}"
        )
    if any(_is_bert4keras(name) for name in sys.modules):
        raise ImportError(
            "bert4keras was imported before blogkeras.bert4keras and runs on "
            "another Keras. Write `import blogkeras.bert4keras` above the "
            "first `import bert4keras`. Received: sys.modules['bert4keras']="
            f"{sys.modules.get('bert4keras')}"
        )


def _strtobool(text):
    return int(text.lower() in ("y", "yes", "t", "true", "on", "1"))


def _distutils():
    """Replaces the part of distutils that bert4keras uses."""
    package = types.ModuleType("distutils")
    package.util = types.ModuleType("distutils.util")
    package.util.strtobool = _strtobool
    return {"distutils": package, "distutils.util": package.util}


@contextlib.contextmanager
def _installed_first():
    """Finds the installed bert4keras before a folder of that name.

    Old repositories hold a copy of some version beside their scripts.
    """
    found = importlib.util.find_spec("bert4keras")
    distribution = importlib.metadata.distribution("bert4keras")
    folder = pathlib.Path(distribution.locate_file(""))
    installed = folder / "bert4keras" / "__init__.py"
    if not installed.exists():  # installed in another way, as editable
        yield
        return
    if (
        found is None
        or not found.origin
        or (pathlib.Path(found.origin).resolve() != installed.resolve())
    ):
        where = found and (
            found.origin or list(found.submodule_search_locations)
        )
        warnings.warn(
            f"The installed bert4keras {VERSION} is used, not the copy that "
            f"comes first on the path: {where}. Move away the copy if you do "
            "not need it.",
            stacklevel=2,
        )
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _standing_in(modules, environment):
    """Puts `modules` into `sys.modules`, and restores it afterwards."""
    names = [*modules, "tensorflow.keras.backend"]  # written by bert4keras
    old_modules = {name: sys.modules.get(name) for name in names}
    old_environment = {name: os.environ.get(name) for name in environment}
    sys.modules.update(modules)
    os.environ.update(environment)
    try:
        yield
    finally:
        for mapping, old in (
            (sys.modules, old_modules),
            (os.environ, old_environment),
        ):
            for name, value in old.items():
                if value is None:
                    mapping.pop(name, None)
                else:
                    mapping[name] = value


def import_bert4keras():
    """Imports bert4keras and registers its classes with Keras."""
    check()
    from blogkeras.bert4keras import adapt, names, namespace

    stand_ins = namespace.make_keras()
    STAND_INS.update(stand_ins)
    stand_ins["tensorflow"] = namespace.make_tensorflow(stand_ins["keras"])
    stand_ins.update(_distutils())
    try:
        # TF_KERAS=1: bert4keras's code for `tf.keras`, the newer of its two.
        with (
            _installed_first(),
            _standing_in(stand_ins, {"TF_KERAS": "1"}),
            warnings.catch_warnings(),
        ):
            # Its strings contain invalid escape sequences.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            modules = {
                name: importlib.import_module(f"bert4keras.{name}")
                for name in _MODULES
            }
    except BaseException:
        for name in [name for name in sys.modules if _is_bert4keras(name)]:
            del sys.modules[name]
        raise
    adapt.adapt(types.SimpleNamespace(**modules))
    names.register_all(modules.values())
