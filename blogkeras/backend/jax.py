"""JAX's half of the backend; `__init__.py` says what each name does."""

import contextlib
import functools
import itertools
import os

import jax
import jax.experimental.sparse
import keras
from keras import ops

second_order = contextlib.nullcontext


def value_and_grad(fn, args, unconnected):
    return jax.value_and_grad(fn, has_aux=True)(args)


def dense(gradient):
    return gradient


@jax.custom_vjp
def with_gradients(value, args, gradients):
    return value


def _attach(value, args, gradients):
    return value, gradients


def _attached(gradients, upstream):
    of_args = [g * ops.cast(upstream, g.dtype) for g in gradients]
    return upstream, of_args, [ops.zeros_like(g) for g in gradients]


with_gradients.defvjp(_attach, _attached)


def check_second_order(gradients):
    pass


def dependencies(fn, args):
    inside = []

    def traced(*args):
        outputs = fn([*args])
        # A tensor of a loop's body cannot leave it, and one of an enclosing
        # program does not depend on anything here.
        trace = getattr(args[0], "_trace", None)
        inside[:] = [
            is_traced(x) and getattr(x, "_trace", None) is trace
            for x in outputs
        ]
        return list(itertools.compress(outputs, inside))

    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    jaxpr = jax.make_jaxpr(traced)(*specs).jaxpr
    found = {var: {index} for index, var in enumerate(jaxpr.invars)}

    def depends(var):
        # A literal number has a value, and no hash.
        return set() if hasattr(var, "val") else found.get(var, set())

    for equation in jaxpr.eqns:
        sources = set().union(*map(depends, equation.invars))
        found.update({var: sources for var in equation.outvars})
    results = iter([depends(var) for var in jaxpr.outvars])
    return [next(results) if is_inside else set() for is_inside in inside]


def weighted_sum(gradients, weights):
    return sum(
        g * ops.cast(w, g.dtype)
        for g, w in zip(gradients, weights, strict=True)
    )


def read(variable):
    return variable.value


def is_recorded():
    return False


def batch_normalization(x, scale, offset, epsilon):
    statistics = ops.moments(x, (0, 1, 2))
    outputs = ops.batch_normalization(
        x, *statistics, -1, offset, scale, epsilon
    )
    return outputs, *map(jax.lax.stop_gradient, statistics)


def depthwise_convolution(x, kernel):
    return ops.depthwise_conv(
        x, kernel, padding="same", data_format="channels_last"
    )


normal = keras.random.normal
uniform = keras.random.uniform
randint = keras.random.randint
dropout = keras.random.dropout


def jit(fn, xla=True):
    return jax.jit(fn) if xla else fn


def as_written(fn):
    return fn


def has_accelerator():
    return jax.default_backend() != "cpu"


def jit_layer(fn, layer, xla=True):
    def pure(values, *args):
        mapping = zip(layer.variables, values, strict=True)
        with keras.StatelessScope([*mapping]):
            return fn(*args)

    compiled = jit(pure, xla)
    return lambda *args: compiled([v.value for v in layer.variables], *args)


def hlo_text(fn, *args):
    return jax.jit(fn).lower(*args).compiler_ir("hlo").as_hlo_text()


def step_memory(model, step, x, y):
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    # As in `fit`, the new state takes the place of the old one.
    program = jax.jit(step, donate_argnums=0)
    memory = program.lower(state, (x, y)).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def full_precision():
    return jax.default_matmul_precision("highest")


def with_shape(x, shape):
    return x


def is_concrete(x):
    return not is_traced(x)


def is_traced(x):
    return isinstance(x, jax.core.Tracer)


def is_sparse(x):
    return isinstance(x, jax.experimental.sparse.JAXSparse)


@functools.cache
def distribution():
    if any(name.startswith("KERAS_DISTRIBUTION_") for name in os.environ):
        if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
            # For processes that have CPUs only; older versions have no default.
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keras.distribution.initialize()
    return keras.distribution.DataParallel()


# Arrays are global: whatever the number of devices, the step sees one batch.


def num_replicas():
    return 1


def replica():
    return 0


def all_reduce_sum(x):
    return x


def all_gather(x):
    return x


def whole_batch(data):
    return data


def is_compiled(fn):
    return False


def traced_anew(fn):
    return fn


# For `branches.py`.


def trace(fn):
    """Runs a function for its side effects on Python, computing nothing."""
    jax.eval_shape(fn)


def recomputed(fn):
    """A pure function whose gradient computes it once more."""
    return jax.checkpoint(fn)


def branch(predicate, true_fn, false_fn):
    """Runs one of two functions of the same structure."""
    return jax.lax.cond(predicate, true_fn, false_fn)


def with_zero_gradients(x, variables):
    """`x`; the gradient of what did not run is zero as it is."""
    return x


def inside_branch(x):
    """A weight, as the layers of a branch read it."""
    return x
