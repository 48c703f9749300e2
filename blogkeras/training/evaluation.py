"""Runs a function on the batches that `evaluate` would see."""

import keras
from keras import ops

from blogkeras import backend


def evaluate_with(model, visit, **data):
    """Hands the batches that `model.evaluate` would see to a function.

    So the function works on everything that `evaluate` takes: arrays,
    `tf.data`, `PyDataset`, raw texts of a model that preprocesses. The model's
    variables have their old values afterwards, also after an error.

    Args:
        model: A compiled `keras.Model` with Keras's own test step.
        visit: Function `(mapping, batch) -> logs`. `mapping` is a list of pairs
            `(variable, value)`: on JAX the variables are empty meanwhile.
            `batch` is `(x, y, sample_weight)`; `logs` is a dict of numbers, for
            the progress bar.
        data: Arguments of `evaluate`.

    Raises:
        ValueError: If the model has a test step of its own.
    """
    for name in ("test_step", "make_test_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"{type(model).__name__} has a `{name}` of its own, which "
                "would be bypassed. Express it through `compute_loss` or "
                f"`compute_metrics`. Received: {model!r}"
            )
    saved = [(v, ops.copy(v.value)) for v in model.metrics_variables]
    if backend.BACKEND == "jax":
        saved += [(v, v.value) for v in model.variables]
    test_function = model.test_function

    def visit_all(mapping, iterator):
        logs = None
        for _, data in zip(
            range(model.steps_per_execution), iterator, strict=False
        ):
            batch = keras.utils.unpack_x_y_sample_weight(
                backend.whole_batch(data)
            )
            logs = visit(mapping, batch)
        if logs is None:
            raise StopIteration
        return logs

    if backend.BACKEND == "jax":

        def function(state, iterator):
            variables = (
                model.trainable_variables,
                model.non_trainable_variables,
                model.metrics_variables,
            )
            mapping = [
                pair
                for part, values in zip(variables, state, strict=True)
                for pair in zip(part, values, strict=True)
            ]
            return visit_all(mapping, iterator), state

    else:

        def function(iterator):
            return visit_all(
                [(v, backend.read(v)) for v in model.variables],
                iterator,
            )

    model.make_test_function = lambda force=False: None
    model.test_function = function
    try:
        model.evaluate(**data)
    finally:
        del model.make_test_function
        model.test_function = test_function
        if backend.BACKEND == "jax":
            model._jax_state = None
        for variable, value in saved:
            variable.assign(value)
