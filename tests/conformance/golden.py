"""Writes the golden files of a version, which later versions must load.

    KERAS_BACKEND=tensorflow python tests/conformance/golden.py tests/data/0.2.0
    KERAS_BACKEND=jax python tests/conformance/golden.py tests/data/0.2.0

The first call writes a file for each layer and model of the catalogue, the
configurations of what else can be serialized, and an index; each call writes
what they answer on its backend. A folder that exists is not written again: it
holds what the users of that version have.
"""

import json
import pathlib
import sys

import catalogue
import keras
import numpy as np
import toy

import blogkeras
from blogkeras.state import StepSeed

QUERY = np.array([0, 2])


def layer_model(cls, kwargs, inputs):
    """A functional model around a layer."""
    inputs = inputs if isinstance(inputs, list) else [inputs]
    symbols = [keras.Input(x.shape[1:], dtype=x.dtype) for x in inputs]
    keras.utils.set_random_seed(0)
    layer = cls(**kwargs)
    return keras.Model(symbols, layer(symbols if symbols[1:] else symbols[0]))


def models():
    """`(name, function that makes the model, x, y)` of all that save."""
    for cls, kwargs, inputs in catalogue.LAYERS:
        yield (
            cls.__name__,
            lambda cls=cls, kwargs=kwargs, x=inputs: layer_model(
                cls, kwargs, x
            ),
            inputs,
            None,
        )
    for make, x, y in catalogue.MODELS:
        yield make.__name__, make, x, y


def objects():
    """Losses, metrics, kernels and what else is saved within other things."""
    rows = [
        *catalogue.LOSSES,
        *catalogue.METRICS,
        *catalogue.KERNELS,
        *catalogue.SCHEDULES,
    ]
    for cls, kwargs, *_ in rows:
        yield cls.__name__, cls(**kwargs)
    yield "SkipNonFinite", blogkeras.SkipNonFinite(keras.optimizers.Adam(0.01))


def answers(model, x):
    """The outputs of a model as a list of arrays."""
    outputs = model.predict(x, batch_size=8, verbose=0)
    return [np.asarray(y) for y in keras.tree.flatten(outputs)]


def outputs(folder):
    """`{name/number: array}` of all that stands in a folder."""
    inputs = {name: x for name, _, x, _ in models()}
    found = {}
    for path in sorted(folder.glob("*.keras")):
        if path.stem not in inputs:  # an older Keras than the model needs
            continue
        model = keras.saving.load_model(path)
        if (path.stem, folder.name) == ("nvae", "0.2.0"):
            # All batches drew the same noise, numbered by the count of steps.
            model.draws.evaluation = lambda numbers, draws=model.draws: (
                StepSeed(draws.seed.value, draws.iterations.value)
            )
        if (path.stem, folder.name) == ("electra", "0.2.0"):
            model._without_padding = lambda logits: logits  # it was drawn, too
        for i, y in enumerate(answers(model, inputs[path.stem])):
            found[f"{path.stem}/{i}"] = y
    index = blogkeras.TransportIndex.load(folder / "index.npz")
    result = index.search(QUERY, k=2)
    found["index/0"], found["index/1"] = result.indices, result.distances
    return found


def write(folder):
    folder.mkdir(parents=True)
    for name, make, x, y in models():
        toy.reset()
        keras.utils.set_random_seed(0)
        model = make()
        if model.compiled:
            model.fit(x, y, batch_size=8, verbose=0)
        model.save(folder / f"{name}.keras")
    configs = {
        name: keras.saving.serialize_keras_object(instance)
        for name, instance in objects()
    }
    text = json.dumps(configs, indent=1, sort_keys=True) + "\n"
    (folder / "objects.json").write_text(text, encoding="utf-8")
    catalogue.FILES[0][1]().save(folder / "index.npz")


def main():
    folder = pathlib.Path(sys.argv[1])
    if not folder.exists():
        write(folder)
    backend = keras.backend.backend()
    np.savez_compressed(folder / f"{backend}.npz", **outputs(folder))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    main()
