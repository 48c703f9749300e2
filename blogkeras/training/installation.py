"""Makes one model train by a hook, and gives it back its own train step."""

import functools
import types

import keras

from blogkeras import backend
from blogkeras.training.parts import drop_parts, replace_parts, show_parts
from blogkeras.training.steps import fill_variables, keep_state, make_step


def install(model, hook):
    """Makes `fit` and `train_on_batch` of this very model train by `hook`.

    The model keeps its class. `compile` may come before or after. `save`,
    `load_model`, pickle and `clone_model` ignore the hook: they give a model
    with Keras's own train step. Installing again replaces the hook, also from a
    callback in the middle of `fit`.

    Args:
        model: A `keras.Model` with Keras's own train step.
        hook: Pure function, see `blogkeras.training`. It may have an
            attribute `version`: where that has changed, the step is traced
            anew, since a compiled step keeps the numbers it was traced with.
            And an attribute `parts`, the names of parts of its loss, which
            are then in the logs of `fit`, as means over the epoch.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a `keras.Model`, since the training step of `fit` is "
            f"what changes. Received: {model!r}"
        )
    for name in ("train_step", "make_train_function"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"{type(model).__name__} has a `{name}` of its own, which "
                "would be bypassed. Express it through `compute_loss` or "
                "`add_loss`, or call the method's function inside it. "
                f"Received: {model!r}"
            )
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "Keras's NNX mode takes the train step from the class and would "
            "ignore this one. Unset KERAS_NNX_ENABLED. Received: "
            "keras.config.is_nnx_enabled()=True"
        )

    made_for = None

    def make_train_function(self, force=False):
        nonlocal made_for
        version = getattr(hook, "version", None)
        if self.train_function is None or force or made_for != version:
            made_for = version
            # A new function every time: `jax.jit` caches by function, so the
            # same one would keep the optimizer and loss of the last `compile`.
            self.train_step = types.MethodType(make_step(hook), self)
            try:
                type(self).make_train_function(self, force=True)
            finally:
                del self.train_step
            step = keep_state(self, self.train_function)
            self.train_function = _keep_version(
                self, hook, show_parts(self, step)
            )

    make_train_function.hook = hook
    model.make_train_function = types.MethodType(make_train_function, model)
    parts = getattr(hook, "parts", ())
    model.__dict__.pop("train_on_batch", None)
    if parts:
        model.train_on_batch = types.MethodType(_train_on_batch, model)
    _start_anew(model, parts)


def installed(model):
    """The hook that the model trains by, or `None`."""
    function = model.__dict__.get("make_train_function")
    return getattr(function, "hook", None)


def uninstall(model):
    """Gives the model back its own train step."""
    if installed(model) is not None:
        del model.make_train_function
        model.__dict__.pop("train_on_batch", None)
        _start_anew(model)


def _start_anew(model, parts=()):
    """Drops the compiled step; inside of `fit` a new one takes its place."""
    has_step = model.train_function is not None
    if has_step and backend.BACKEND == "jax":
        # Within `fit` the variables are empty; this fills them.
        model.jax_state_sync()
    replace_parts(model, parts)
    if has_step:
        model.train_function = None
        model.make_train_function()


def _train_on_batch(
    self, x, y=None, sample_weight=None, class_weight=None, return_dict=False
):
    """Keras's own, whose list does not hold the parts of the loss."""
    logs = type(self).train_on_batch(
        self, x, y, sample_weight, class_weight, return_dict=True
    )
    if return_dict:
        return logs
    return self._flatten_metrics_in_order(drop_parts(self, logs))


def _keep_version(model, hook, train_function):
    """The step, traced again where the hook's version has changed."""
    if not hasattr(hook, "version"):
        return train_function
    version = hook.version

    def current(*args):
        if hook.version == version:
            return train_function(*args)
        # On JAX, under a distribution, the new step takes the layout of the
        # state from the variables, which Keras has emptied.
        fill_variables(model, args[0])
        model.make_train_function(force=True)
        return model.train_function(*args)

    return current


def step_memory(model, x, y):
    """The peak memory of a training step of a model, in bytes.

    On TensorFlow a step is run to measure it, which trains the model.

    Args:
        model: A compiled `keras.Model`, built, its optimizer too.
        x: One batch of inputs.
        y: Its targets.

    Returns:
        Number of bytes, weights and batch included. NaN on TensorFlow without a
        GPU, where it cannot be measured.
    """
    hook, step = installed(model), model.train_step
    if hook is not None:
        step = functools.partial(make_step(hook), model)
    return backend.step_memory(model, step, x, y)
