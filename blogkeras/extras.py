"""Optional libraries: imported where they are used, named where they lack."""

import importlib

# What installs each library, where that is not `pip install` and its name.
_COMMANDS = {
    "bert4keras": "pip install --no-deps bert4keras==0.11.5",
    "faiss": "pip install faiss-cpu",
    "keras_hub": "pip install keras-hub",
    "ot": "pip install pot",
    "sklearn": "pip install scikit-learn",
}


def require(name: str):
    """Imports a library that not every user of blogkeras needs.

    Args:
        name: String. The module, such as `"matplotlib.figure"`.

    Returns:
        The module.

    Raises:
        ImportError: where the library is not installed. The message has the
            command that installs it.

    Example:

    >>> require("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        missing = (getattr(error, "name", None) or library).partition(".")[0]
        raise ImportError(
            f"{name} is needed here: {command(missing)}. Received: {error}",
            name=missing,
        ) from error


def command(library: str) -> str:
    """The command that installs a library, by the name one imports."""
    return _COMMANDS.get(library, f"pip install {library}")
