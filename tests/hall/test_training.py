"""The train step in place: plain fit to the bit, and nothing left behind."""

import contextlib
import pickle

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import replica_run, replicated, slow_on_tensorflow

from blogkeras import backend, training
from blogkeras.optimizers import SkipNonFinite

TENSORFLOW = backend.BACKEND == "tensorflow"


def plain(objective, weights):
    return objective.value_and_grad(objective, weights)


def sgd(**kwargs):
    return lambda: keras.optimizers.SGD(0.1, **kwargs)


def adam(**kwargs):
    return lambda: keras.optimizers.Adam(0.01, **kwargs)


def run(make, hook, x=toy.TOKENS, y=toy.LABELS, how="fit", **fit):
    toy.reset()
    model = make()
    if hook:
        training.install(model, hook)
    if how == "fit":
        fit = {"batch_size": 32, "epochs": 2, **fit}
        history = model.fit(x, y, verbose=0, shuffle=False, **fit).history
    else:
        for start in range(0, 64, 32):
            rows = slice(start, start + 32)
            logs = model.train_on_batch(x[rows], y[rows], return_dict=True)
        history = {name: [float(value)] for name, value in logs.items()}
    return model, toy.state(model), history


def assert_identical(make, hook=plain, **kwargs):
    """Plain `fit` and that of a hook give the same weights and history.

    To the bit where operations run one by one. Two compiled programs may add
    in another order, and differ by rounding.
    """
    model, state, history = run(make, None, **kwargs)
    _, ours, our_history = run(make, hook, **kwargs)
    assert history.keys() == our_history.keys()
    if model.run_eagerly:
        assert toy.difference(state, ours) == 0
        assert history == our_history
        return
    half = model.dtype_policy.compute_dtype != "float32"
    rtol = 2e-2 if half else 1e-5
    toy.assert_near(ours, state, rtol)
    for name, values in history.items():
        np.testing.assert_allclose(our_history[name], values, rtol=rtol)


def eager(model, optimizer=None, **kwargs):
    return toy.compiled(model, optimizer, run_eagerly=True, **kwargs)


JIT, EAGERLY = {"jit_compile": True}, {"run_eagerly": True}


@pytest.mark.parametrize(
    ("optimizer", "policy", "compile"),
    [
        (adam(), "float32", JIT),
        (adam(weight_decay=0.1, clipnorm=0.1), "float32", EAGERLY),
        (
            sgd(global_clipnorm=0.1, use_ema=True, ema_overwrite_frequency=3),
            "float32",
            EAGERLY,
        ),
        (sgd(gradient_accumulation_steps=2), "float32", {}),
        (sgd(), "float32", {"steps_per_execution": 2}),
        (sgd(), "mixed_bfloat16", {}),
        (sgd(gradient_accumulation_steps=2), "mixed_float16", JIT),
    ],
)
def test_equals_fit(optimizer, policy, compile):
    def make():
        keras.config.set_dtype_policy(policy)
        return toy.compiled(toy.classifier(), optimizer(), **compile)

    assert_identical(make, sample_weight=toy.WEIGHTS)


def test_equals_fit_with_a_smaller_last_batch():
    """The reported loss weighs batches by their size."""
    assert_identical(
        lambda: toy.compiled(toy.classifier()), batch_size=48, epochs=1
    )


def test_equals_fit_with_sparse_gradients():
    """Without a regularizer TensorFlow's embedding gradient is sparse."""
    assert_identical(
        lambda: eager(
            toy.classifier(regularizer=None), keras.optimizers.Adam(0.01)
        )
    )


def test_equals_train_on_batch():
    assert_identical(lambda: eager(toy.classifier()), how="batches")


def test_equals_fit_with_class_weight():
    assert_identical(
        lambda: eager(toy.classifier()),
        class_weight={0: 1.0, 1: 2.0, 2: 0.5},
    )


def test_equals_fit_with_own_compute_loss():
    assert_identical(lambda: eager(toy.classifier(toy.OwnLoss)))


class OwnNames(keras.Model):
    """Its `compute_loss` has names of its own for the arguments."""

    def compute_loss(self, inputs, targets, outputs, weights):
        return super().compute_loss(inputs, targets, outputs, weights)


def test_compute_loss_with_names_of_its_own():
    assert_identical(lambda: eager(toy.classifier(OwnNames)))


@pytest.mark.skipif(not TENSORFLOW, reason="Keras's JAX step does not call it")
def test_an_optimizer_with_its_own_apply_gradients():
    class Half(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            return super().apply_gradients(
                [(0.5 * g, v) for g, v in grads_and_vars]
            )

    assert_identical(lambda: eager(toy.classifier(), Half(0.1)), epochs=1)


def nested():
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 4, mask_zero=True)(tokens)
    encoder = keras.Model(tokens, layers.Dropout(0.2, seed=1)(h))
    tokens = keras.Input((5,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(encoder(tokens))
    head = keras.Sequential(
        [
            layers.Dense(4, activation="relu"),
            layers.BatchNormalization(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    return keras.Model(tokens, head(h))


def frozen():
    model = nested()
    model.layers[1].trainable = False
    return model


def built(model):
    model(toy.TOKENS)
    return model


@slow_on_tensorflow
@pytest.mark.parametrize(
    ("make", "compile"),
    [
        (nested, EAGERLY),
        (frozen, EAGERLY),
        (toy.Subclassed, {}),  # on TensorFlow built while traced
        (lambda: built(toy.Subclassed()), EAGERLY),
        (toy.OldStyle, EAGERLY),
    ],
)
def test_equals_fit_for_every_kind_of_model(make, compile):
    assert_identical(lambda: toy.compiled(make(), **compile))


def test_equals_fit_with_several_inputs_and_outputs():
    def make():
        a = keras.Input((5,), dtype="int32", name="a")
        b = keras.Input((3,), name="b")
        h = layers.GlobalAveragePooling1D()(
            layers.Embedding(toy.VOCABULARY, 4)(a)
        )
        h = layers.Concatenate()([h, b])
        model = keras.Model(
            {"a": a, "b": b},
            {
                "c": layers.Dense(3, activation="softmax", name="c")(h),
                "r": layers.Dense(1, name="r")(h),
            },
        )
        model.compile(
            keras.optimizers.SGD(0.1),
            {"c": "sparse_categorical_crossentropy", "r": "mse"},
            loss_weights={"c": 1.0, "r": 0.5},
            metrics={"c": "accuracy", "r": "mae"},
            run_eagerly=True,
        )
        return model

    assert_identical(
        make,
        x={"a": toy.TOKENS, "b": toy.DENSE},
        y={"c": toy.LABELS, "r": toy.TARGETS},
    )


def test_equals_fit_for_recurrent_layers():
    def make():
        return toy.compiled(
            keras.Sequential(
                [
                    keras.Input((5,), dtype="int32"),
                    layers.Embedding(toy.VOCABULARY, 4, mask_zero=True),
                    layers.GRU(4, dropout=0.2, seed=1),
                    layers.Dense(3, activation="softmax"),
                ]
            )
        )

    assert_identical(make, epochs=1)


def wasteful(objective, weights):
    """Evaluates thrice elsewhere, commits the plain pass."""
    for factor in (0.5, 2.0):
        objective([w * factor for w in weights])
    x, y, _sample_weight = objective.data
    objective(weights, data=(x[:1], y[:1], None))
    return objective.value_and_grad(objective, weights)


@slow_on_tensorflow
@pytest.mark.parametrize("eagerly", [False, True])
def test_only_the_committed_evaluation_leaves_a_trace(eagerly):
    """BatchNormalization, metrics and seeds advance once, losses add once."""
    assert_identical(
        lambda: toy.compiled(toy.classifier(toy.OwnLoss), run_eagerly=eagerly),
        hook=wasteful,
    )


@slow_on_tensorflow
def test_evaluations_share_the_dropout_mask():
    def hook(objective, weights):
        first, _ = objective(weights)
        evaluation, gradients = plain(objective, weights)
        return evaluation._replace(loss=first - evaluation.loss), gradients

    model = toy.compiled(toy.classifier(dropout=0.5))
    training.install(model, hook)
    history = model.fit(toy.TOKENS, toy.LABELS, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["loss"], [0, 0], atol=1e-6)


def evaluated(model, hook):
    """What a hook reports as the loss of one batch."""
    training.install(model, hook)
    return model.train_on_batch(toy.TOKENS, toy.LABELS, return_dict=True)


def mean_token_model():
    """The mean embedding, through an identity: every number by hand."""
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 1, name="embedding")(tokens)
    outputs = layers.GlobalAveragePooling1D(name="mean")(h)
    model = keras.Model(tokens, outputs)
    model.compile("sgd", loss=lambda y, y_pred: y_pred[:, 0])
    return model


@pytest.mark.parametrize("trainable", [False, True])
def test_values_of_variables(trainable):
    """With E[t] = t² the loss is the mean of t²."""
    model = mean_token_model()
    embedding = model.get_layer("embedding")
    embedding.trainable = trainable
    table = np.arange(toy.VOCABULARY, dtype="float32")[:, None] ** 2
    before = embedding.get_weights()[0]

    def hook(objective, weights):
        values = [(embedding.embeddings, table)]
        _, evaluation = objective(weights, values=values)
        gradients = [ops.zeros_like(w) for w in weights]
        return evaluation, gradients

    logs = evaluated(model, hook)
    np.testing.assert_allclose(
        logs["loss"], np.mean(toy.TOKENS.astype("float64") ** 2), rtol=1e-6
    )
    np.testing.assert_array_equal(embedding.get_weights()[0], before)


def test_value_tells_what_a_variable_is_in_this_step():
    model = mean_token_model()
    embedding = model.get_layer("embedding")
    for trainable in (True, False):
        embedding.trainable = trainable
        model.compile("sgd", loss=lambda y, y_pred: y_pred[:, 0])

        def hook(objective, weights):
            evaluation, gradients = plain(objective, weights)
            value = objective.value(weights, embedding.embeddings)
            return evaluation._replace(loss=ops.sum(value)), gradients

        embedding.set_weights([np.arange(toy.VOCABULARY)[:, None]])
        expected = 55
        np.testing.assert_allclose(
            evaluated(model, hook)["loss"], expected, rtol=1e-6
        )


def test_perturbed_output():
    """Adding the position to the embedding adds the mean position, 2."""
    model = mean_token_model()
    embedding = model.get_layer("embedding")
    seen = []

    def add_position(output, inputs):
        seen.append(inputs.shape[1])
        return output + np.arange(5, dtype="float32")[:, None]

    def hook(objective, weights):
        clean, _ = objective(weights)
        loss, evaluation = objective(weights, perturb={embedding: add_position})
        return (
            evaluation._replace(loss=loss - clean),
            [ops.zeros_like(w) for w in weights],
        )

    np.testing.assert_allclose(evaluated(model, hook)["loss"], 2, atol=1e-5)
    assert set(seen) == {5}
    assert "call" not in vars(embedding)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_set_on_the_layer_stays(fails):
    model = mean_token_model()
    embedding = model.get_layer("embedding")
    call = embedding.call

    def own(inputs):
        return 2 * call(inputs)

    def add(output, inputs):
        if fails:
            raise KeyboardInterrupt
        return output + 1

    embedding.call = own
    clean, moved = float(ops.max(embedding(toy.TOKENS))), None
    with contextlib.suppress(KeyboardInterrupt):
        with training.perturbed({embedding: add}):
            with training.perturbed({embedding: add}):
                moved = float(ops.max(embedding(toy.TOKENS)))
    if not fails:
        np.testing.assert_allclose(moved, clean + 2, rtol=1e-6)
    assert vars(embedding)["call"] is own


def test_other_data():
    model = mean_token_model()
    embedding = model.get_layer("embedding")
    embedding.set_weights([np.arange(toy.VOCABULARY)[:, None]])

    def hook(objective, weights):
        x, y, sample_weight = objective.data
        _, evaluation = objective(
            weights, data=(ops.full_like(x, 7), y, sample_weight)
        )
        return evaluation, [ops.zeros_like(w) for w in weights]

    np.testing.assert_allclose(evaluated(model, hook)["loss"], 7, rtol=1e-6)


def test_an_interrupt_leaves_the_model_clean():
    model = toy.compiled(toy.classifier())
    embedding = model.get_layer("embedding")
    before = toy.weights(model)

    def interrupt(output, inputs):
        raise KeyboardInterrupt

    def hook(objective, weights):
        objective(weights, perturb={embedding: interrupt})

    training.install(model, hook)
    with pytest.raises(KeyboardInterrupt):
        model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    assert "call" not in vars(embedding)
    assert "train_step" not in vars(model)
    training.uninstall(model)
    assert toy.difference(before, toy.weights(model)) == 0
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)


def test_compile_again_takes_the_new_loss():
    """jax.jit caches by function: a kept step would go on with the old one."""
    model = toy.compiled(nested())
    training.install(model, plain)
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    for factor in (1.0, 100.0):
        model.compile(
            keras.optimizers.SGD(0.0),
            loss=lambda y, p, factor=factor: factor + 0 * ops.sum(p, -1),
            jit_compile=not TENSORFLOW,
        )
        logs = model.train_on_batch(toy.TOKENS, toy.LABELS, return_dict=True)
        assert abs(float(logs["loss"]) - factor) < 0.5


def test_force_makes_the_train_function_anew():
    """As in Keras: kept from call to call, unless `force`."""
    model = toy.compiled(nested())
    training.install(model, plain)
    made = []
    for force in (False, False, True):
        model.make_train_function(force=force)
        made.append(model.train_function)
    assert made[0] is made[1]
    assert made[1] is not made[2]


def test_install_replaces_and_uninstall_restores():
    calls = []

    def named(name):
        def hook(objective, weights):
            calls.append(name)
            return plain(objective, weights)

        return hook

    model = eager(toy.classifier())
    for name in ("a", "b"):
        training.install(model, named(name))
        model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    assert set(calls) == {"a", "b"}
    assert calls == sorted(calls)
    training.uninstall(model)
    assert training.installed(model) is None
    assert "make_train_function" not in vars(model)
    calls.clear()
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    assert calls == []
    training.uninstall(model)


def test_fit_after_uninstall_equals_plain():
    def make(install):
        keras.utils.set_random_seed(0)
        model = eager(toy.classifier())
        if install:
            training.install(model, plain)
        model.fit(toy.TOKENS, toy.LABELS, verbose=0, shuffle=False)
        training.uninstall(model)
        model.fit(toy.TOKENS, toy.LABELS, verbose=0, shuffle=False)
        return toy.state(model)

    assert toy.difference(make(False), make(True)) == 0


def test_no_retracing():
    """One trace per batch shape on JAX; TensorFlow adds a relaxed one."""
    traces = []

    def hook(objective, weights):
        traces.append(1)
        return plain(objective, weights)

    model = toy.compiled(toy.classifier())
    training.install(model, hook)
    for _ in range(3):
        model.fit(toy.TOKENS, toy.LABELS, batch_size=16, epochs=2, verbose=0)
    assert 1 <= len(traces) <= 2


@slow_on_tensorflow
def test_copies_are_plain(tmp_path):
    model = eager(toy.classifier())
    training.install(model, plain)
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    custom = {"ActivityLoss": toy.ActivityLoss}
    with keras.saving.custom_object_scope(custom):
        copies = [
            keras.saving.load_model(tmp_path / "model.keras"),
            pickle.loads(pickle.dumps(model)),
        ]
        clone = keras.models.clone_model(model)
    expected = model.predict(toy.TOKENS, verbose=0)
    for copy in copies:
        assert training.installed(copy) is None
        np.testing.assert_array_equal(
            copy.predict(toy.TOKENS, verbose=0), expected
        )
    assert training.installed(clone) is None
    assert training.installed(model) is plain


def test_seeds_number_the_steps():
    """Draws differ between steps and repeat in a second run."""

    def draws():
        model = toy.compiled(toy.classifier())

        def hook(objective, weights):
            seed = objective.seed(7)
            a, b = (keras.random.uniform((), seed=seed) for _ in range(2))
            evaluation, gradients = plain(objective, weights)
            return evaluation._replace(loss=a + 10 * b), gradients

        training.install(model, hook)
        return [
            float(model.train_on_batch(toy.TOKENS, toy.LABELS)[0])
            for _ in range(3)
        ]

    first = draws()
    assert len(set(first)) == 3
    assert first == draws()


def test_refuses_a_train_step_of_its_own():
    class Own(keras.Model):
        def train_step(self, *args):
            return super().train_step(*args)

    with pytest.raises(ValueError, match="Own has a `train_step` of its own"):
        training.install(toy.classifier(Own), plain)


def test_refuses_what_is_not_a_model():
    with pytest.raises(ValueError, match=r"Expected a `keras.Model`"):
        training.install(layers.Dense(3), plain)


def test_refuses_nnx(monkeypatch):
    monkeypatch.setattr(keras.config, "is_nnx_enabled", lambda: True)
    with pytest.raises(ValueError, match="NNX"):
        training.install(toy.classifier(), plain)


def test_refuses_a_model_without_a_loss():
    model = nested()
    model.compile("sgd")
    training.install(model, plain)
    before = toy.weights(model)
    with pytest.raises(ValueError, match="no loss to train on"):
        model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    assert toy.difference(before, toy.weights(model)) == 0


def test_add_loss_alone_is_a_loss():
    tokens = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(toy.VOCABULARY, 4)(tokens)
    model = keras.Model(tokens, toy.ActivityLoss()(embedding))
    model.compile("sgd")
    training.install(model, plain)
    assert np.isfinite(model.fit(toy.TOKENS, verbose=0).history["loss"][0])


class Again(layers.Layer):
    """A layer whose forward pass is computed once more for its gradient."""

    def __init__(self, remat, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3, name="inner")
        self.remat = remat

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        if self.remat is backend.remat:
            return backend.remat(self.dense, [self.dense], x)
        # JAX goes on with the first trace of one function.
        return self.remat(lambda x: self.dense(x))(x)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


def recomputing(remat, **kwargs):
    inputs = keras.Input((3,))
    outputs = layers.Softmax()(Again(remat)(inputs))
    return toy.compiled(keras.Model(inputs, outputs), **kwargs)


@pytest.mark.parametrize("eagerly", [False, True])
def test_weights_in_what_is_computed_again(eagerly):
    model = recomputing(keras.remat, run_eagerly=eagerly)
    training.install(model, plain)
    before = toy.weights(model)
    if TENSORFLOW:
        with pytest.raises(ValueError, match=r"backend.remat.*inner/kernel"):
            model.fit(toy.DENSE, toy.LABELS, verbose=0)
        assert toy.difference(before, toy.weights(model)) == 0
    else:
        model.fit(toy.DENSE, toy.LABELS, verbose=0)
        assert toy.difference(before, toy.weights(model)) > 0


def test_remat_of_our_own_is_as_plain():
    def make():
        return recomputing(backend.remat, run_eagerly=True)

    assert_identical(make, x=toy.DENSE, epochs=1)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("eagerly", [False, True])
def test_a_weight_that_is_not_used_is_no_error(eagerly):
    inputs = keras.Input((3,))
    used, idle = (layers.Dense(3, "softmax", name=n) for n in ("used", "idle"))
    model = keras.Model(inputs, {"used": used(inputs), "idle": idle(inputs)})
    model.compile(
        keras.optimizers.SGD(0.1),
        {"used": "sparse_categorical_crossentropy"},
        run_eagerly=eagerly,
    )
    training.install(model, plain)
    before = toy.weights(model)
    model.fit(toy.DENSE, {"used": toy.LABELS}, verbose=0)
    assert toy.difference(before, toy.weights(model)) > 0


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("subclassed", [False, True])
def test_a_regularizer_beside_a_weight_that_is_not_used(subclassed, eagerly):
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = layers.Dense(3, "softmax", kernel_regularizer="l2")
            self.idle = layers.Dense(3)

        def call(self, x):
            self.idle(x)
            return self.used(x)

    def make():
        if subclassed:
            model = Idle()
        else:
            inputs = keras.Input((3,))
            used = layers.Dense(3, "softmax", kernel_regularizer="l2")(inputs)
            model = keras.Model(inputs, [used, layers.Dense(3)(inputs)])
        loss = "sparse_categorical_crossentropy"
        model.compile(
            keras.optimizers.SGD(0.1),
            loss if subclassed else [loss, None],
            run_eagerly=eagerly,
        )
        return model

    y = toy.LABELS if subclassed else [toy.LABELS, toy.LABELS]
    _, state, history = run(make, None, toy.DENSE, y)
    _, ours, our_history = run(make, plain, toy.DENSE, y)
    toy.assert_near(ours, state)
    np.testing.assert_allclose(our_history["loss"], history["loss"], rtol=1e-6)


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_regularizer_hides_no_weight_that_is_not_trained(eagerly):
    model = recomputing(keras.remat, run_eagerly=eagerly)
    (again,) = (layer for layer in model.layers if isinstance(layer, Again))
    again.dense.kernel.regularizer = keras.regularizers.L2(0.1)
    training.install(model, plain)
    if TENSORFLOW:
        with pytest.raises(ValueError, match=r"backend.remat.*inner/bias"):
            model.fit(toy.DENSE, toy.LABELS, verbose=0)


@pytest.mark.skipif(not TENSORFLOW, reason="tf.function")
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_call_that_is_a_function_of_tensorflow(eagerly, whole):
    """Two evaluations at other weights, and the model works afterwards."""
    import tensorflow as tf

    class Layer(layers.Dense):
        @tf.function
        def call(self, x):
            if tf.reduce_sum(x) > 1e9:
                x = 0 * x
            return super().call(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1, use_bias=False)
            self.dense.build((None, 3))

        @tf.function
        def call(self, x):
            return self.dense(x)

    model = keras.Sequential([Layer(1, use_bias=False)])
    if whole:
        model = Model()
    model.compile(
        keras.optimizers.SGD(0.1), lambda y, p: p[:, 0], run_eagerly=eagerly
    )
    x = np.ones((2, 3), "float32")
    model(x)
    model.set_weights([np.array([[1.0], [2.0], [3.0]])])
    before = model.predict(x, verbose=0)
    np.testing.assert_allclose(before, [[6.0], [6.0]], rtol=1e-6)

    def hook(objective, weights):
        loss, _ = objective(weights)
        evaluation, gradients = objective.value_and_grad(
            objective, [2 * w for w in weights]
        )
        both = 100 * loss + evaluation.loss
        return evaluation._replace(loss=both), gradients

    training.install(model, hook)
    loss = toy.batch_loss(model, x, x[:, :1])
    np.testing.assert_allclose(loss, 612, rtol=1e-6)
    (after,) = model.get_weights()
    np.testing.assert_allclose(after[:, 0], [0.9, 1.9, 2.9], rtol=1e-6)
    moved = model.predict(x, verbose=0)
    np.testing.assert_allclose(moved, before - 0.3, rtol=1e-6)
    model.evaluate(x, x[:, :1], verbose=0)


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
def test_two_replicas():
    plain_two, history = replica_run(None, 2)
    ours_two, our_history = replica_run(lambda model: plain, 2)
    assert toy.difference(plain_two, ours_two) <= 1e-6
    for name, values in history.items():
        np.testing.assert_allclose(our_history[name], values, rtol=1e-5)
    ours_one, _ = replica_run(lambda model: plain, 1)
    assert toy.difference(ours_one, ours_two) <= 1e-6


@pytest.mark.skipif(not TENSORFLOW, reason="MirroredStrategy is TensorFlow's")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
        lambda: SkipNonFinite(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        ),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ],
)
def test_refuses_what_keras_cannot_do_on_replicas(optimizer):
    model = replicated(lambda: toy.compiled(toy.classifier(), optimizer()))
    training.install(model, plain)
    with pytest.raises(ValueError, match="Received: "):
        model.fit(toy.TOKENS, toy.LABELS, verbose=0)
