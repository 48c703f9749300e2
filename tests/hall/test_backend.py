"""Gradients, branches with state, XLA and replicas under one name."""

import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import slow_on_jax, slow_on_tensorflow, value

from blogkeras import backend
from blogkeras.state import StepSeed

TENSORFLOW = backend.BACKEND == "tensorflow"


def test_value_and_grad():
    """d/dx x³y = 3x²y, d/dy = x³ at x = 2, y = 5."""

    def fn(args):
        return args["x"] ** 3 * args["y"], "aux"

    args = {"x": ops.convert_to_tensor(2.0), "y": ops.convert_to_tensor(5.0)}
    (loss, aux), gradients = backend.value_and_grad(fn, args)
    assert (float(loss), aux) == (40, "aux")
    assert {k: float(g) for k, g in gradients.items()} == {"x": 60, "y": 8}


def test_value_and_grad_of_second_order():
    """d/dx (d/dx 3x²)² = d/dx (6x)² = 72x = 144 at x = 2."""

    def squared_slope(x):
        (_, _), slope = backend.value_and_grad(lambda x: (3 * x**2, None), x)
        return slope**2, None

    (loss, _), gradient = backend.value_and_grad(
        squared_slope, ops.convert_to_tensor(2.0)
    )
    assert (float(loss), float(gradient)) == (144, 144)


def test_given_gradients():
    """d/dx of 2 v(x, y)², with v = 3 and the gradients 5 and 7 of v."""

    def fn(args):
        v = backend.with_gradients(
            ops.convert_to_tensor(3.0),
            [args["x"], args["y"]],
            [ops.full((2,), 5.0), ops.full((), 7.0)],
        )
        return 2 * v**2, None

    args = {"x": ops.zeros((2,)), "y": ops.zeros(())}
    (loss, _), gradients = backend.value_and_grad(fn, args)
    assert float(loss) == 18
    np.testing.assert_array_equal(value(gradients["x"]), [60, 60])
    assert float(gradients["y"]) == 84


@pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow's autograph")
def test_a_function_stays_as_it_is_written():
    import tensorflow as tf

    @backend.as_written
    def branch(x):
        # Autograph would make a condition of the graph of it.
        return 1 if x else 2

    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        tf.function(lambda x: branch(x))(tf.constant(True))


def test_what_is_differentiated_is_known():
    """Recorded on TensorFlow, not concrete on JAX."""
    x = ops.convert_to_tensor(2.0)
    seen = set()

    def fn(x):
        seen.add((backend.is_recorded(), backend.is_concrete(x)))
        return x**2, None

    backend.value_and_grad(fn, x)
    assert seen == {(True, True) if TENSORFLOW else (False, False)}
    assert (backend.is_recorded(), backend.is_concrete(x)) == (False, True)


def test_unconnected_gradients():
    x = [ops.ones((2,)), ops.ones((3,))]

    def fn(x):
        return ops.sum(x[0]), None

    _, gradients = backend.value_and_grad(fn, x)
    np.testing.assert_array_equal(value(gradients[1]), np.zeros(3))
    _, gradients = backend.value_and_grad(fn, x, unconnected="none")
    assert (gradients[1] is None) == TENSORFLOW


def test_sparse_gradients():
    """Rows 1, 1, 2 gathered: 2, 1 and 0 times the gradient 1."""
    table = ops.ones((4, 2))

    def fn(rows):
        def loss(table):
            return ops.sum(ops.take(table, np.array(rows), axis=0)), None

        return backend.value_and_grad(loss, table)[1]

    first, second = fn([1, 1, 2]), fn([3])
    np.testing.assert_array_equal(
        value(backend.dense(first)), [[0, 0], [2, 2], [1, 1], [0, 0]]
    )
    expected = [[0, 0], [1, 1], [0.5, 0.5], [3, 3]]
    mixed = backend.weighted_sum([first, second], [0.5, 3.0])
    np.testing.assert_array_equal(value(backend.dense(mixed)), expected)
    assert hasattr(mixed, "indices") == TENSORFLOW
    half_dense = backend.weighted_sum(
        [first, backend.dense(second)], [0.5, 3.0]
    )
    np.testing.assert_array_equal(value(half_dense), expected)


def test_jit():
    fn = backend.jit(lambda x: ops.sum(x**2))
    assert float(fn(ops.convert_to_tensor([3.0, 4.0]))) == 25


class Branch(layers.Layer):
    """One of two stacks, each with dropout, moving averages and a loss."""

    def __init__(self, by_hand=None, **kwargs):
        super().__init__(**kwargs)
        self.by_hand = by_hand
        self.left, self.right = (
            keras.Sequential(
                [
                    layers.Dense(3, name=f"{side}_dense"),
                    layers.BatchNormalization(name=f"{side}_normalization"),
                    layers.Dropout(0.5, seed=1, name=f"{side}_dropout"),
                    toy.ActivityLoss(name=f"{side}_loss"),
                ],
                name=side,
            )
            for side in ("left", "right")
        )

    def build(self, input_shape):
        self.left.build(input_shape)
        self.right.build(input_shape)

    def call(self, x, training=False):
        if self.by_hand is not None:
            chosen = self.left if self.by_hand else self.right
            return chosen(x, training=training)
        outputs, loss = backend.cond(
            ops.sum(x) > 0,
            lambda: self.left(x, training=training),
            lambda: self.right(x, training=training),
            [self.left, self.right],
        )
        self.add_loss(loss)
        return outputs


def trained(by_hand, sign, jit=True, policy="float32"):
    toy.reset()
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, layers.Dense(1, dtype="float32")(Branch(by_hand)(inputs))
    )
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    x = sign * np.abs(toy.DENSE)
    history = model.fit(x, toy.TARGETS, verbose=0, shuffle=False).history
    return toy.weights(model), history["loss"]


# TensorFlow misses the gradient of the branch that is not there by hand.
no_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize("sign", [1, -1])
def test_cond_equals_the_chosen_branch(sign):
    """Weights, moving averages and seeds of both branches, and the loss."""
    expected, losses = trained(by_hand=sign > 0, sign=sign)
    ours, our_losses = trained(by_hand=None, sign=sign)
    # The branch is a program of its own to the compiler: equal but rounding.
    assert toy.difference(expected, ours) <= 1e-6
    np.testing.assert_allclose(our_losses, losses, rtol=1e-6)


@slow_on_jax
@no_gradient
def test_cond_without_jit_and_in_half_precision():
    expected, losses = trained(True, 1, jit=False)
    ours, _our_losses = trained(None, 1, jit=False)
    assert toy.difference(expected, ours) <= 1e-6
    ours, half = trained(None, 1, policy="mixed_bfloat16")
    expected, losses = trained(True, 1, policy="mixed_bfloat16")
    np.testing.assert_allclose(half, losses, rtol=2e-2)
    # State travels through the branch exactly, not in the compute dtype.
    assert toy.difference(expected, ours) < 2e-2


class Counter(layers.Layer):
    """Counts in steps of 2⁻²⁰, which bfloat16 cannot hold beside 1."""

    def build(self, input_shape):
        self.count = self.add_weight(
            initializer="ones", trainable=False, name="count"
        )

    def call(self, x):
        outputs, _ = backend.cond(ops.sum(x) > 0, self.add, lambda: 0, [self])
        return x + ops.cast(0 * outputs, x.dtype)

    def add(self):
        value = ops.cast(self.count.value, "float32")
        self.count.assign(value + 2.0**-20)
        return 0


def test_cond_keeps_the_precision_of_state():
    layer = Counter(dtype="mixed_bfloat16")
    x = ops.ones((2,))
    layer.build(x.shape)
    start = np.float32(1 + 2**-20)
    layer.count.assign(start)
    layer(-x)
    assert float(layer.count.value) == start


def test_cond_computes_one_branch_only():
    """Both branches would cost two products; the compiler counts one."""
    if TENSORFLOW:
        pytest.skip("JAX tells the cost of a compiled program")
    import jax

    dense = layers.Dense(256, use_bias=False)
    dense.build((1, 256))
    kernel = dense.kernel.value

    def both(flag, x, kernel):
        with keras.StatelessScope([(dense.kernel, kernel)]):
            outputs, _ = backend.cond(
                flag, lambda: dense(dense(x)), lambda: x, [dense]
            )
        return outputs

    x = np.ones((8, 256), "float32")
    text = jax.jit(both).lower(True, x, kernel).compile().as_text()
    assert "conditional" in text


def test_second_order_is_scoped_and_thread_local():
    if not TENSORFLOW:
        pytest.skip("jax.nn has no such approximation")
    import tensorflow as tf

    original = tf.nn.moments
    seen = []
    x = tf.constant([1.0, 2.0, 6.0])

    def other():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                _, variance = tf.nn.moments(x, 0)
            slope = tape.gradient(variance, x)[0]
        seen.append(outer.gradient(slope, x).numpy())

    def interrupted():
        with backend.second_order():
            assert tf.nn.moments is not original
            other()
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tf.nn.moments is original
    # variance = Σ(x−m)²/3: ∂²/∂x₁∂x = 2/3 (1 − 1/3, −1/3, −1/3).
    np.testing.assert_allclose(
        seen[0], 2 / 3 * np.array([2 / 3, -1 / 3, -1 / 3]), rtol=1e-6
    )
    assert np.abs(seen[1] - seen[0]).max() > 0.1


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
def test_sums_and_gathers_across_replicas():
    x = ops.convert_to_tensor([1.0, 2.0])
    if not TENSORFLOW:
        assert backend.num_replicas() == 1
        assert backend.replica() == 0
        assert backend.all_reduce_sum(x) is x
        assert backend.all_gather(x) is x
        return
    import tensorflow as tf

    assert backend.num_replicas() == 1
    assert backend.replica() == 0
    assert backend.all_reduce_sum(x) is x
    assert backend.all_gather(x) is x

    def replica():
        i = tf.distribute.get_replica_context().replica_id_in_sync_group
        mine = x + 10.0 * tf.cast(i, "float32")
        return (
            backend.all_reduce_sum(mine),
            backend.all_gather(mine),
            tf.convert_to_tensor(backend.replica()),
            backend.num_replicas(),
        )

    strategy = toy.mirrored()
    with strategy.scope():
        results = tf.function(lambda: strategy.run(replica))()
    locally = strategy.experimental_local_results
    for i, (total, gathered, number) in enumerate(
        zip(*map(locally, results[:3]), strict=True)
    ):
        np.testing.assert_array_equal(total, [12, 14])
        np.testing.assert_array_equal(gathered, [1, 2, 11, 12])
        assert number == i
    assert results[3] == 2


class Mixing(layers.Layer):
    """Attention, a product over two axes and a broadcast sum over positions.

    Their gradients need shapes that XLA must know when it compiles.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(1, 2)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.dense.build(input_shape)

    def call(self, x):
        total = ops.sum(x, axis=1, keepdims=True)
        attended = self.dense(self.attention(x, x))
        return attended + ops.broadcast_to(total, ops.shape(x))


class MixingBranch(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.left, self.right = Mixing(), Mixing()

    def build(self, input_shape):
        self.left.build(input_shape)
        self.right.build(input_shape)

    def call(self, x):
        return backend.cond(
            ops.sum(x) > 0,
            lambda: self.left(x),
            lambda: self.right(x),
            [self.left, self.right],
        )[0]


def test_branches_of_unknown_shape_compile():
    """Batches of 4 and 2 rows: the batch size is not known when traced."""
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(1)(MixingBranch()(inputs)))
    model.compile("sgd", "mse", jit_compile=True)
    x = np.ones((6, 5, 3), "float32")
    before = toy.weights(model)
    model.fit(x, x[..., :1], batch_size=4, verbose=0)
    assert all(np.isfinite(w).all() for w in toy.weights(model))
    assert toy.difference(before, toy.weights(model)) > 0


def test_importing_changes_nothing_of_tensorflow():
    """The attributes of TensorFlow's modules and classes are its own."""
    if not TENSORFLOW:
        pytest.skip("TensorFlow's own modules")
    code = """
import sys, keras, tensorflow as tf
from tensorflow.python.ops import cond_v2, nn_impl
def everything():
    return {
        (module, name): id(value)
        for module in (tf, tf.nn, tf.math, cond_v2, nn_impl, keras, keras.ops)
        for name, value in vars(module).items()
    } | {
        (cls, name): id(value)
        for cls in vars(cond_v2).values() if isinstance(cls, type)
        for name, value in vars(cls).items()
    }
before = everything()
import blogkeras
after = everything()
print(sorted(str(k) for k in before if before[k] != after.get(k)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("noise_shape", [None, (None, 1, 6), (4, 5, 1)])
def test_dropout_is_that_of_keras(noise_shape):
    """The same numbers from the same seeds, and as many seeds."""
    x = ops.ones((4, 5, 6))
    ours, theirs = (keras.random.SeedGenerator(3) for _ in range(2))
    for _ in range(2):
        np.testing.assert_array_equal(
            value(backend.dropout(x, 0.3, noise_shape, ours)),
            value(keras.random.dropout(x, 0.3, noise_shape, theirs)),
        )
    assert (value(backend.dropout(x, 1.0, noise_shape, ours)) == 0).all()


@slow_on_tensorflow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("normal", ()),
        ("normal", (2.0, 0.5, "float16")),
        ("uniform", ()),
        ("uniform", (-1.0, 3.0, "bfloat16")),
        ("randint", (2, 9)),
    ],
)
def test_random_numbers_are_those_of_keras(name, arguments):
    """From an integer, from a generator, and in a program of XLA."""

    def draw(module, seed):
        return getattr(module, name)((4, 5), *arguments, seed=seed)

    generator = keras.random.SeedGenerator
    for make in (lambda: 7, lambda: generator(3)):
        ours = draw(backend, make())
        theirs = draw(keras.random, make())
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(
            value(ours, "float32"), value(theirs, "float32")
        )
    # The seed is an input, so that nothing is computed before the program runs.
    ours, theirs = (
        backend.jit(lambda step: draw(module, StepSeed(7, step)))(  # noqa: B023
            ops.convert_to_tensor(3)
        )
        for module in (backend, keras.random)
    )
    np.testing.assert_array_equal(
        value(ours, "float32"), value(theirs, "float32")
    )
