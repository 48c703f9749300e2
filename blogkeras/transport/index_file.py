"""The file format of `TransportIndex`, of which nothing is taken unchecked."""

import itertools
import json
import zipfile

import numpy as np

from blogkeras.arguments import check_choice, check_integer
from blogkeras.transport import measures

WEIGHTS = ("uniform", "norm", "idf")
# 1, without a number: no counts of words. 2: with them.
VERSION = 2
_ARRAYS = {
    "vectors": "f",
    "idf": "f",
    "ids": "i",
    "counts": "i",
    "masses": "f",
    "starts": "i",
    "centroids": "f",
}


def read(file):
    """`(config, arrays)` of a file, each array of the right kind."""
    require(zipfile.is_zipfile(file), "there is no archive of arrays")
    file.seek(0)
    with np.load(file, allow_pickle=False) as data:
        config = _config(data["config"])
        names = set(_ARRAYS)
        if config["version"] == 1:
            names.remove("counts")
        require(
            set(data.files) == {"config", *names},
            f"the arrays are {sorted(data.files)}",
        )
        arrays = {name: data[name] for name in names}
    for name, array in arrays.items():
        if _ARRAYS[name] == "i":
            right = array.dtype.kind in "iu"
            right = right and (array < 2**62).all()
            arrays[name] = array.astype("int64")
        else:
            right = array.dtype in ("float64", "float32")
            if name != "vectors":
                right = right and array.dtype == "float64"
        require(right, f"`{name}` has the dtype {array.dtype}")
        if array.dtype.kind == "f" and not array.dtype.isnative:
            arrays[name] = array.astype(array.dtype.newbyteorder("="))
    return config, arrays


def _config(array):
    require(array.shape == () and array.dtype.kind == "U", "`config` is none")
    config = json.loads(str(array))
    require(isinstance(config, dict), "`config` is none")
    config.setdefault("version", 1)
    version = check_integer("version", config["version"], minimum=1)
    require(
        version <= VERSION,
        f"the format's version is {version}: it needs a newer blogkeras",
    )
    require(
        set(config) == {"version", "cost", "weights", "by_id"},
        f"`config` has {sorted(config)}",
    )
    check_choice("cost", config["cost"], measures.COSTS)
    check_choice("weights", config["weights"], WEIGHTS)
    require(isinstance(config["by_id"], bool), "`by_id` is no truth value")
    require(
        config["by_id"] or config["weights"] != "idf",
        '"idf" weighs vectors without ids',
    )
    return config


def counts_of(ratios, starts):
    """The least integers with these ratios, document by document.

    Files of version 1 have no counts. A common factor makes no difference.
    """
    factors = np.arange(1, 1001)
    counts = []
    for first, last in itertools.pairwise(starts):
        ratio = ratios[first:last, None]
        ratio = ratio / ratio.min()
        multiples = ratio * factors
        whole = np.abs(multiples - np.round(multiples)) <= 1e-9 * multiples
        whole = whole.all(0)
        require(whole.any(), "`masses` do not follow from the weights")
        counts.append(np.round(multiples[:, whole.argmax()]).astype("int64"))
    return np.concatenate(counts)


def require(condition, otherwise):
    """Raises a `ValueError` that says `otherwise`, unless the condition."""
    if not condition:
        raise ValueError(otherwise)
