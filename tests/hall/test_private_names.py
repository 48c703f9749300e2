"""Every private name of Keras, TensorFlow, POT and bert4keras in use.

Such a name may change with any version. So all of them are listed here: a new
one fails until it is added, and `make matrix` tells on the lowest and on the
newest versions which of them exist. A name that a subclass of one of Keras's
classes gives to something of its own must not be one of Keras's either.
"""

import ast
import importlib
import pathlib
import re

import keras
import numpy as np
import pytest
from kit import TENSORFLOW

PACKAGE = pathlib.Path(__file__).parents[2] / "blogkeras"

# Names in modules that are private themselves.
IMPORTED = {
    "keras._tf_keras": {"keras"},
    "keras._tf_keras.keras": {"backend", "losses"},
    "keras.src.backend": {"get_keras_mask", "set_keras_mask"},
    "keras.src.backend.common": {"global_state"},
    "keras.src.backend.common.tensor_attributes": {
        "get_tensor_attr",
        "set_tensor_attr",
    },
    "keras.src.legacy.saving": {"legacy_h5_format"},
    "keras.src.trainers.data_adapters.data_adapter": {"DataAdapter"},
    "ot.lp.emd_wrap": {"emd_c"},
    "tensorflow.python.eager": {"record"},
    "tensorflow.python.framework": {"ops"},
}
PRIVATE_MODULES = (
    "keras.src",
    "keras._",
    "tensorflow.python",
    "jax._",
    "ot.lp",
)

# Attributes, by the object of `objects` that has them.
ATTRIBUTES = {
    "model": {
        "_compile_config",
        "_compile_metrics",
        "_flatten_metrics_in_order",
        "_get_own_losses",
        "_inputs_struct",
        "_loss_tracker",
        "_nodes_by_depth",
        "_outputs_struct",
    },
    "layer": {
        "_clear_losses",
        "_flatten_layers",
        "_inbound_nodes",
        "_metrics",
        "_non_trainable_variables",
        "_track_variable",
        "_tracker",
        "_untrack_variable",
    },
    "optimizer": {
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
        "_get_variable_index",
        "_learning_rate",
        "_lock",
        "_trainable_variables",
        "_variables",
    },
    "loss": {"_fn_kwargs"},
    "compiled loss": {"_user_loss"},
    "symbolic tensor": {"_keras_history"},
}
if TENSORFLOW:
    ATTRIBUTES["model"].add("_default_save_signature")
    ATTRIBUTES["gradient graph"] = {
        "_capture_helper",
        "_captured_constants",
        "_create_op_internal",
        "_forward_graph",
        "_get_function",
        "_is_function",
    }
else:
    ATTRIBUTES["model"] |= {
        "_get_jax_state",
        "_jax_state",
        "_update_metrics_variables",
    }
    ATTRIBUTES["traced tensor"] = {"_trace"}
# What exists with the other backend only, and methods of bert4keras 0.11.5,
# the one version that is supported.
ELSEWHERE = {
    "_capture_helper",
    "_captured_constants",
    "_create_op_internal",
    "_create_slots",
    "_default_save_signature",
    "_forward_graph",
    "_get_function",
    "_get_jax_state",
    "_is_function",
    "_jax_state",
    "_resource_apply_dense",
    "_resource_apply_sparse",
    "_trace",
    "_update_metrics_variables",
}
# Names of our own functions, and of attributes of classes that are not Keras's.
OURS = {
    "_copy",
    "_defaults",
    "_inputs",
    "_kernel",
    "_layers",
    "_losses",
    "_name",
    "_outputs",
    "_path",
    "_seed",
    "_value",
    "_version",
}
READERS = {"getattr", "hasattr", "setattr", "get", "pop", "setdefault"}


def nodes():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported():
    found = {}
    for node in nodes():
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.".startswith(PRIVATE_MODULES):
                    found.setdefault(node.module, set()).add(alias.name)
                elif f"{node.module}.{alias.name}".startswith(PRIVATE_MODULES):
                    found.setdefault(node.module, set()).add(alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith(PRIVATE_MODULES), alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A module that is imported by its name.
            dotted = re.fullmatch(r"[\w.]*\w", node.value)
            if dotted and node.value.startswith(PRIVATE_MODULES):
                found.setdefault(node.value, set())
    return found


def strings(node):
    """The names in a call such as `getattr(x, "_name")`, or in a tuple."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        parts = node.args if name in READERS else ()
    else:
        parts = node.elts if isinstance(node, ast.Tuple) else ()
    parts = [getattr(part, "value", None) for part in parts]
    return {part for part in parts if isinstance(part, str)}


def used_and_defined():
    """The private names in use, and those that blogkeras defines."""
    used, defined = set(), set()
    for node in nodes():
        used |= strings(node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
    used, defined = (
        {n for n in names if re.fullmatch(r"_[a-zA-Z]\w*", n)}
        for names in (used, defined)
    )
    return used | defined, defined


@pytest.fixture(scope="module")
def objects():
    """An object of each kind of which private attributes are used."""
    x = np.ones((2, 3), "float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model = keras.Model(model.inputs[0], model.outputs[0])
    model.compile("sgd", "mse", jit_compile=False)
    model.optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.fit(x, x[:, :1], verbose=0)
    found = {
        "model": model,
        "layer": model.layers[-1],
        "optimizer": model.optimizer,
        "loss": keras.losses.MeanSquaredError(),
        "compiled loss": model._compile_loss,
        "metric": keras.metrics.Mean(),
        "schedule": keras.optimizers.schedules.CosineDecay(1.0, 2),
        "symbolic tensor": model.inputs[0],
    }
    if TENSORFLOW:
        found["gradient graph"] = gradient_graph()
    else:
        import jax

        jax.eval_shape(lambda x: found.update({"traced tensor": x}), x)
    return found


def gradient_graph():
    """The graph of the gradient of a branch of TensorFlow's `cond`."""
    import tensorflow as tf

    graphs = []

    @tf.custom_gradient
    def mark(x):
        def gradient(dy):
            graphs.append(tf.compat.v1.get_default_graph())
            return dy

        return tf.identity(x), gradient

    @tf.function
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(x > 0, lambda: mark(2 * x), lambda: x)
        return tape.gradient(y, x)

    assert float(slope(tf.constant(1.0))) == 2
    return graphs[0]


def test_imports():
    found = imported()
    assert found.keys() == IMPORTED.keys()
    for module, names in found.items():
        assert names <= IMPORTED[module], module


def test_attributes(objects):
    used, defined = used_and_defined()
    listed = set().union(*ATTRIBUTES.values()) | ELSEWHERE
    # No class of ours is a tensor, so names of tensors may be ours as well.
    kinds = [kind for kind in objects if "tensor" not in kind]
    foreign = set().union(*(dir(objects[kind]) for kind in kinds))
    # Foreign is what blogkeras does not define itself, or what Keras has too.
    foreign = (used - defined) | (used & foreign)
    assert sorted(foreign - listed - OURS) == []
    assert sorted((listed | OURS) - used) == []


@pytest.mark.parametrize("kind", sorted(ATTRIBUTES))
def test_attributes_exist(kind, objects):
    missing = [n for n in ATTRIBUTES[kind] if not hasattr(objects[kind], n)]
    assert sorted(missing) == []


@pytest.mark.parametrize("module", sorted(IMPORTED))
def test_imports_exist(module):
    if "ot.lp" in module:
        pytest.importorskip("ot")
    if "tf_keras" in module and not TENSORFLOW:
        pytest.skip("a part of Keras for TensorFlow")
    found = importlib.import_module(module)
    assert sorted(n for n in IMPORTED[module] if not hasattr(found, n)) == []
