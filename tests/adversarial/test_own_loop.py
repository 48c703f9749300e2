"""Training loops of your own give the weights that `fit` gives."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, jax_only, slow_on_jax, tensorflow_only, value

import blogkeras
from blogkeras import (
    FGM,
    PGD,
    TRADES,
    AdversarialWeightPerturbation,
    FreeLB,
    GradientPenalty,
    NoiseStability,
    RDrop,
    VirtualAdversarialTraining,
    adversarial_loss,
    adversarial_training,
)

STEPS, ROWS = 3, 8
X = toy.TOKENS[: STEPS * ROWS]
Y = toy.LABELS[: STEPS * ROWS]
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, len(X)).astype("float32")
LOSS = "sparse_categorical_crossentropy"


def make(cls=keras.Model):
    toy.reset()
    return toy.classifier(dropout=0.3, cls=cls)


def optimizer():
    return keras.optimizers.Adam(0.05)


def batches():
    for start in range(0, len(X), ROWS):
        rows = slice(start, start + ROWS)
        yield X[rows], Y[rows], WEIGHTS[rows]


def tape_loop(model, fn, rule, decorate=lambda step: step):
    import tensorflow as tf

    @decorate
    def step(x, y, weights):
        with tf.GradientTape() as tape:
            result = fn(x, y, weights, step=rule.iterations)
        variables = model.trainable_variables
        gradients = tape.gradient(result.loss, variables)
        rule.apply(gradients, variables)
        return result

    return [step(*map(tf.convert_to_tensor, batch)) for batch in batches()]


def stateless_loop(model, fn, rule, decorate=lambda step: step):
    import jax

    def loss(trainable, state, step, *batch):
        result, state = fn.stateless(trainable, state, *batch, step=step)
        return result.loss, (result, state)

    @decorate
    def step(trainable, state, slots, *batch):
        (_, (result, state)), gradients = jax.value_and_grad(
            loss, has_aux=True
        )(trainable, state, slots[0], *batch)
        return result, state, *rule.stateless_apply(slots, gradients, trainable)

    rule.build(model.trainable_variables)
    assert rule.variables[0] is rule.iterations
    trainable, state, slots = (
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            rule.variables,
        )
    )
    results = []
    for batch in batches():
        result, state, trainable, slots = step(trainable, state, slots, *batch)
        results.append(result)
    for variables, values in (
        (model.trainable_variables, trainable),
        (model.non_trainable_variables, state),
    ):
        for variable, new in zip(variables, values, strict=True):
            variable.assign(new)
    return results


loop = tape_loop if TENSORFLOW else stateless_loop


def fitted(method, rule=None):
    """A model, and the logs of its steps, by `fit`."""
    model = make()
    model.compile(rule or optimizer(), LOSS, run_eagerly=True)
    adversarial_training(model, method=method)
    logs = [
        model.train_on_batch(*batch, return_dict=True) for batch in batches()
    ]
    return model, logs


METHODS = [
    FGM(0.5),
    FGM(0.5, "token", "output", clean_weight=0.3),
    PGD(0.5, steps=1, random_start=True, site="output", seed=5),
    FreeLB(keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5), steps=1),
    GradientPenalty(0.5),
    NoiseStability(0.5),
    VirtualAdversarialTraining(0.5, seed=7),
    TRADES(0.5, steps=1),
    RDrop(2.0),
    AdversarialWeightPerturbation(0.1, attack=FGM(0.5)),
]
MARKS = {method: pytest.mark.verify for method in METHODS[1:]}


@slow_on_jax
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=MARKS.get(m, ())) for m in METHODS],
    ids=lambda method: type(method).__name__,
)
def test_equals_fit(method):
    expected, logs = fitted(method)
    model = make()
    results = loop(model, adversarial_loss(model, LOSS, method), optimizer())
    for variable, other in zip(
        model.variables, expected.variables, strict=True
    ):
        np.testing.assert_allclose(
            value(variable), value(other), atol=1e-5, err_msg=variable.path
        )
    for result, log in zip(results, logs, strict=True):
        np.testing.assert_allclose(value(result.loss), log["loss"], rtol=1e-5)
        for name in method.parts:
            if name in log:
                np.testing.assert_allclose(
                    value(result.parts[name]), log[name], rtol=1e-5, atol=1e-7
                )


def test_compiled_by_the_loop():
    """`tf.function`, `jax.jit`."""
    # Adam would make much of rounding, where a gradient is 0 as of a bias in
    # front of BatchNormalization.
    expected, _ = fitted(FGM(0.5), keras.optimizers.SGD(0.1))
    model = make()
    if TENSORFLOW:
        import tensorflow as tf

        decorate = tf.function
    else:
        import jax

        decorate = jax.jit
    fn = adversarial_loss(model, LOSS, FGM(0.5))
    loop(model, fn, keras.optimizers.SGD(0.1), decorate)
    for variable, other in zip(
        model.variables, expected.variables, strict=True
    ):
        np.testing.assert_allclose(value(variable), value(other), atol=1e-5)


@tensorflow_only
def test_gradients_of_a_tape():
    import tensorflow as tf

    model = make()
    fn = adversarial_loss(model, LOSS)
    with tf.GradientTape() as tape:
        result = fn(X[:4], Y[:4])
        loss = 3.0 * result.loss
    gradients = tape.gradient(loss, model.trainable_variables)
    toy.reset()
    other = make()
    fn = adversarial_loss(other, LOSS)
    with tf.GradientTape() as tape:
        loss = fn(X[:4], Y[:4]).loss
    for g, h in zip(
        gradients, tape.gradient(loss, other.trainable_variables), strict=True
    ):
        # An embedding has a sparse gradient, as in Keras's own step.
        assert type(g) is type(h)
        np.testing.assert_allclose(value(g), 3 * value(h), rtol=1e-5)
    with tf.GradientTape() as tape:
        predictions = fn(X[:4], Y[:4]).y_pred
    assert all(
        g is None for g in tape.gradient(predictions, other.trainable_variables)
    )


@jax_only
def test_stateless_changes_nothing():
    model = make()
    before = [value(v) for v in model.variables]
    fn = adversarial_loss(model, LOSS)
    state = [v.value for v in model.non_trainable_variables]
    _, after = fn.stateless(
        [v.value for v in model.trainable_variables], state, X[:4], Y[:4]
    )
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(value(variable), old)
    assert any(
        np.any(value(a) != value(b)) for a, b in zip(state, after, strict=True)
    )


def test_the_call_assigns_the_state():
    model = make()
    fn = adversarial_loss(model, LOSS)
    trainable = [value(v) for v in model.trainable_variables]
    state = [value(v) for v in model.non_trainable_variables]
    fn(X[:4], Y[:4])
    for variable, old in zip(model.trainable_variables, trainable, strict=True):
        np.testing.assert_array_equal(value(variable), old)
    assert all(
        np.any(value(v) != old)
        for v, old in zip(model.non_trainable_variables, state, strict=True)
    )


@pytest.mark.verify
@tensorflow_only
def test_in_a_train_step_of_its_own():
    import tensorflow as tf

    class Own(keras.Model):
        def train_step(self, data):
            x, y, weights = data
            with tf.GradientTape() as tape:
                result = self.fn(x, y, weights, self.optimizer.iterations)
            self.optimizer.apply(
                tape.gradient(result.loss, self.trainable_variables),
                self.trainable_variables,
            )
            return {"loss": result.loss, **result.parts}

    expected, _ = fitted(FGM(0.5))
    model = make(Own)
    model.fn = adversarial_loss(model, LOSS, FGM(0.5))
    model.compile(optimizer(), run_eagerly=True)
    history = model.fit(
        X, Y, sample_weight=WEIGHTS, batch_size=ROWS, shuffle=False, verbose=0
    ).history
    assert "clean_loss" in history
    for variable, other in zip(
        model.variables, expected.variables, strict=True
    ):
        np.testing.assert_allclose(value(variable), value(other), atol=1e-5)


# The loss

A = np.array([[1.0, 2.0], [3.0, 0.0]], "float32")
B = np.array([[1.0], [2.0]], "float32")


def linear(**kwargs):
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(1, use_bias=False, **kwargs)]
    )
    model.set_weights([np.array([[3.0], [4.0]])])
    return model


def error(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


@pytest.mark.parametrize(
    "loss", ["mse", error, keras.losses.MeanSquaredError()], ids=str
)
def test_losses_by_hand(loss):
    # f = 11 and 9; the errors 10 and 7 have the gradients 10 w and 7 w.
    fn = adversarial_loss(linear(), loss, FGM(0.0))
    np.testing.assert_allclose(value(fn(A, B).loss), (100 + 49) / 2)
    weighted = fn(A, B, np.array([1.0, 0.0], "float32"))
    np.testing.assert_allclose(value(weighted.loss), 100 / 2)
    fn = adversarial_loss(linear(), loss, FGM(0.5, "sample", "output"))
    result = fn(A, B)
    np.testing.assert_allclose(
        value(result.loss), (12.5**2 + 9.5**2) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        value(result.parts["clean_loss"]), (100 + 49) / 2, rtol=1e-5
    )


@slow_on_jax
@pytest.mark.parametrize(
    ("loss", "activation", "units", "shape"),
    [
        (error, None, 1, (4,)),
        (error, None, 1, (4, 1)),
        ("mse", None, 1, (4,)),
        ("MeanSquaredError", None, 1, (4,)),
        (keras.losses.MeanSquaredError, None, 1, (4,)),
        ("binary_crossentropy", "sigmoid", 1, (4,)),
        (keras.losses.binary_crossentropy, "sigmoid", 1, (4,)),
        ("crossentropy", "sigmoid", 1, (4,)),
        ("CrossEntropy", "sigmoid", 1, (4, 1)),
        ("ce", "softmax", 3, (4,)),
        ("ce", "softmax", 3, (4, 1)),
        ("CE", "softmax", 3, (4, 3)),
        (LOSS, "softmax", 3, (4, 1)),
        ("categorical_crossentropy", "softmax", 3, (4, 3)),
    ],
)
def test_a_loss_is_that_of_compile(loss, activation, units, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2)).astype("float32")
    y = np.eye(4, dtype="float32")[:, : shape[1]] if shape[1:] else np.eye(4)[0]
    weight = np.array([0.5, 1.0, 2.0, 0.0], "float32")
    model = keras.Sequential([keras.Input((2,))])
    model.add(layers.Dense(units, activation=activation))
    fn = adversarial_loss(model, loss, FGM(0.0))
    model.compile(loss=loss)
    for weights in (None, weight):
        expected = model.evaluate(x, y, sample_weight=weights, verbose=0)
        result = fn(x, y.astype("float32"), weights)
        np.testing.assert_allclose(value(result.loss), expected, rtol=1e-5)


def test_targets_of_one_axis_by_hand():
    # f = 11 and 9, y = 1 and 2; the mean over all four pairs is 73.5.
    fn = adversarial_loss(linear(), error, FGM(0.0))
    np.testing.assert_allclose(value(fn(A, B[:, 0]).loss), (100 + 49) / 2)


class Adds(layers.Layer):
    def call(self, x):
        self.add_loss(ops.convert_to_tensor(2.0))
        return x


def model_of_three_losses():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            Adds(),
            layers.Dense(1, use_bias=False, kernel_regularizer="l2"),
        ]
    )
    model.set_weights([np.array([[3.0], [4.0]])])
    return model


@tensorflow_only
def test_the_shares_of_two_replicas_add_up():
    import tensorflow as tf

    strategy = toy.mirrored()
    with strategy.scope():
        model = model_of_three_losses()
        fn = adversarial_loss(model, "mse", FGM(0.0))

    @tf.function
    def total(x, y):
        return strategy.run(lambda x, y: fn(x, y).loss, args=(x, y))

    rows = tf.data.Dataset.from_tensor_slices((A, B)).batch(2)
    [batch] = strategy.experimental_distribute_dataset(rows)
    shares = strategy.experimental_local_results(total(*batch))
    # One row each: the halves of its loss, of the 2 and of the regularizer.
    expected = [(100 + 2 + 0.25) / 2, (49 + 2 + 0.25) / 2]
    np.testing.assert_allclose([value(x) for x in shares], expected, rtol=1e-5)


def test_regularizers_and_added_losses_count():
    model = model_of_three_losses()
    fn = adversarial_loss(model, "mse", FGM(0.0))
    np.testing.assert_allclose(
        value(fn(A, B).loss), (100 + 49) / 2 + 2 + 0.01 * 25, rtol=1e-5
    )


def test_a_method_reads_the_given_loss():
    model = linear()
    method = VirtualAdversarialTraining(0.5, norm_scope="sample")
    result = adversarial_loss(model, "mse", method)(A, B)
    # (w · d)² for d of norm 0.5 along w.
    np.testing.assert_allclose(
        value(result.parts["penalty"]), 2.5**2, rtol=1e-4
    )


def test_the_compiled_loss_of_several_outputs():
    x = keras.Input((2,))
    model = keras.Model(x, [layers.Dense(1)(x), layers.Dense(1)(x)])
    with pytest.raises(ValueError, match="several outputs"):
        adversarial_loss(model, "mse")
    model.compile("sgd", ["mse", "mae"])
    expected = model.evaluate(A, [B, B], verbose=0, return_dict=True)["loss"]
    result = adversarial_loss(model, method=FGM(0.0))(A, [B, B])
    np.testing.assert_allclose(value(result.loss), expected, rtol=1e-6)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_the_one_output_in_a_list_or_dict(structure):
    x = keras.Input((2,))
    dense = layers.Dense(1, use_bias=False, name="out")
    wrap = {"list": lambda t: [t], "dict": lambda t: {"out": t}}[structure]
    model = keras.Model(x, wrap(dense(x)))
    dense.set_weights([np.array([[3.0], [4.0]])])
    fn = adversarial_loss(model, "mse", FGM(0.0))
    for y, weight in ((wrap(B), None), (B, np.ones(2, "float32"))):
        result = fn(A, y, weight)
        np.testing.assert_allclose(value(result.loss), (100 + 49) / 2)
    with pytest.raises(ValueError, match=r"one output.*Received: 2 ten"):
        fn(A, [B, B])


@tensorflow_only
def test_weights_in_what_is_computed_again_are_refused():
    class Again(layers.Layer):
        def build(self, shape):
            self.dense = layers.Dense(1, name="inner")
            self.dense.build(shape)

        def call(self, x):
            return keras.remat(self.dense)(x)

    model = keras.Sequential([keras.Input((2,)), Again(), layers.Dense(1)])
    fn = adversarial_loss(model, "mse", FGM(0.0))
    with pytest.raises(ValueError, match="inner/kernel"):
        fn(A, B)


@pytest.mark.parametrize("subclassed", [False, True])
def test_a_regularizer_beside_a_weight_that_is_not_used(subclassed):
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = layers.Dense(
                1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1)
            )
            self.idle = layers.Dense(1)

        def call(self, x):
            self.idle(x)
            return self.used(x)

    if subclassed:
        model = Idle()
        model(A)
    else:
        x, used = keras.Input((2,)), Idle().used
        model = keras.Model(x, [used(x), layers.Dense(1)(x)])
        model.compile("sgd", ["mse", None])
    model.trainable_variables[0].assign([[3.0], [4.0]])
    fn = adversarial_loss(model, "mse" if subclassed else None, FGM(0.0))
    result = fn(A, B if subclassed else [B, B])
    # The squares of the test above, and 0.1 (3² + 4²).
    np.testing.assert_allclose(
        value(result.loss), (100 + 49) / 2 + 2.5, rtol=1e-6
    )


def test_errors():
    with pytest.raises(ValueError, match="not as a list of numbers"):
        adversarial_loss(linear(), "mse")(A, [0.0, 1.0])
    with pytest.raises(ValueError, match="Received: loss=None"):
        adversarial_loss(linear())
    with pytest.raises(ValueError, match="Received: loss=3"):
        adversarial_loss(linear(), 3)
    for several in (["mse"], {"dense": "mse"}, "no_such_loss"):
        with pytest.raises(ValueError, match=r"one output.* Received: loss="):
            adversarial_loss(linear(), several)
    with pytest.raises(ValueError, match="built=False"):
        adversarial_loss(keras.Sequential([layers.Dense(1)]), "mse")
    with pytest.raises(ValueError, match="Received: model="):
        adversarial_loss(layers.Dense(1), "mse")
    with pytest.raises(ValueError, match="Received: method="):
        adversarial_loss(linear(), "mse", "fgm2")
    with pytest.raises(ValueError, match="no such layer"):
        blogkeras.adversarial_loss(linear(), "mse", embedding_name="words")
