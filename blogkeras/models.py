"""What models that are made of models have in common."""

import keras
import numpy as np
from keras import ops, tree

from blogkeras.arguments import as_numpy, check_integer, check_verbose


class CompositeModel(keras.Model):
    """A model whose `compile` is overridden and is still saved and restored.

    Keras compiles a loaded model by itself only where `compile` is its own.
    """

    def compile_from_config(self, config):
        """Compiles a loaded model as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    # Keras leaves the states of `SeedGenerator`s out of its files, so dropout
    # of a loaded model would begin anew. Here they are saved as well.

    def _seed_states(self):
        weights = {id(v) for v in self.weights}
        return [v for v in self.variables if id(v) not in weights]

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for number, state in enumerate(self._seed_states()):
            store[f"seed_{number}"] = state

    def load_own_variables(self, store):
        names = list(store.keys())
        seeds = [name for name in names if name.startswith("seed_")]
        super().load_own_variables(
            {name: store[name] for name in names if name not in seeds}
        )
        states = self._seed_states()
        if len(seeds) == len(states):
            for number, state in enumerate(states):
                state.assign(store[f"seed_{number}"])


def map_batches(program, arrays, batch_size=32, verbose=0):
    """Applies a compiled function to rows, a batch at a time.

    All batches have one shape, so the function is compiled once. The last batch
    is filled up with copies of its last row, whose results are dropped.

    Args:
        program: Function of as many tensors as there are arrays, each with
            `batch_size` rows; returns a structure of tensors with as many rows.
        arrays: List of arrays with equally many rows, at least one.
        batch_size: Integer.
        verbose: `"auto"`, 0, 1 or 2: Keras's progress bar.

    Returns:
        The structure of NumPy arrays for all rows.
    """
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    verbose = check_verbose(verbose)
    arrays = [as_numpy(array) for array in arrays]
    rows = len(arrays[0])
    if not rows or any(len(array) != rows for array in arrays):
        raise ValueError(
            "Expected arrays with equally many rows, at least one. Received: "
            f"shapes {[array.shape for array in arrays]}"
        )
    batch_size = min(batch_size, rows)
    starts = range(0, rows, batch_size)
    bar = None
    if verbose:
        bar = keras.utils.Progbar(len(starts), verbose=verbose)
    results = []
    for number, start in enumerate(starts, start=1):
        batch = [array[start : start + batch_size] for array in arrays]
        size = len(batch[0])
        if size < batch_size:
            batch = [
                np.concatenate([x, np.repeat(x[-1:], batch_size - size, 0)])
                for x in batch
            ]
        outputs = program(*map(ops.convert_to_tensor, batch))
        results.append(
            tree.map_structure(
                lambda x, size=size: ops.convert_to_numpy(x)[:size], outputs
            )
        )
        if bar is not None:
            bar.update(number)
    return tree.map_structure(lambda *parts: np.concatenate(parts), *results)
