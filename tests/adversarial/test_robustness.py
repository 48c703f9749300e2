"""Losses under attack against closed forms and a recomputation in NumPy."""

import collections

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import slow_on_jax

import blogkeras
from blogkeras import backend
from blogkeras.adversarial import robustness
from blogkeras.adversarial.robustness import evaluate_robustness

RNG = np.random.default_rng(2)
X = RNG.normal(size=(7, 3)).astype("float32")
# Tokens repeat within and across samples; 0 is padding.
TOKENS = np.array(
    [[1, 2, 2, 0], [3, 2, 1, 4], [1, 1, 0, 0], [4, 4, 3, 0], [2, 0, 0, 0]],
    "int32",
)
LABELS = np.array([0, 1, 1, 0, 1], "int32")
EPSILONS = (0.0, 0.3, 1.5)
# Where jit is not the point: XLA takes longest to compile on TensorFlow, and
# JAX is no faster operation by operation.
CHEAPLY = {"run_eagerly": backend.BACKEND == "tensorflow"}


def evaluated(model, x, y=None, epsilons=EPSILONS, **kwargs):
    return evaluate_robustness(model, x, y, epsilons, verbose=0, **kwargs)


def mean_output(y, y_pred):
    return ops.mean(y_pred, axis=-1)


def linear_model(loss, metrics=(), **kwargs):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, **kwargs)])
    model.compile("sgd", loss, metrics=[*metrics], **CHEAPLY)
    return model


def test_loss_of_a_linear_model_rises_by_epsilon_times_the_norm():
    model = linear_model(mean_output)
    w, b = model.get_weights()
    result = evaluated(model, X, np.zeros((7, 1)))
    expected = (X @ w + b).mean() + np.array(EPSILONS) * np.linalg.norm(w)
    np.testing.assert_allclose(result.column("loss"), expected, atol=1e-6)
    assert result.column("epsilon") == list(EPSILONS)


@pytest.mark.parametrize("attack", ["fgm", "pgd"])
def test_logistic_regression_loses_its_margin(attack):
    model = linear_model(
        keras.losses.BinaryCrossentropy(from_logits=True),
        [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)],
    )
    w, b = (v.astype("float64") for v in model.get_weights())
    y = np.array([0, 1, 1, 0, 1, 0, 0])
    result = evaluated(model, X, y[:, None], attack=attack, batch_size=3)
    margins = (2 * y - 1) * (X @ w + b)[:, 0]
    for row in result.rows:
        left = margins - row["epsilon"] * np.linalg.norm(w)
        np.testing.assert_allclose(
            row["loss"], np.log1p(np.exp(-left)).mean(), atol=1e-6
        )
        np.testing.assert_allclose(
            row["accuracy"], (left > 0).mean(), rtol=1e-6
        )
    np.testing.assert_allclose(
        result.mean_norm, np.linalg.norm(X, axis=1).mean(), rtol=1e-6
    )


def token_model(**kwargs):
    """softmax(W · masked mean of tanh(E[tokens]))."""
    tokens = keras.Input((None,), dtype="int32")
    h = layers.Embedding(5, 3, name="embedding", mask_zero=True)(tokens)
    h = layers.Activation("tanh")(h)
    h = layers.GlobalAveragePooling1D()(h)
    outputs = layers.Dense(2, use_bias=False, activation="softmax")(h)
    model = keras.Model(tokens, outputs)
    model.set_weights([RNG.normal(size=w.shape) for w in model.get_weights()])
    model.compile(
        "sgd",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **kwargs,
    )
    return model


def recomputed(E, W, epsilon, steps):
    """Loss and accuracy of `token_model` sample by sample, in float64."""
    losses, hits = [], []
    for tokens, label in zip(TOKENS, LABELS, strict=True):
        embedded = E[tokens[tokens != 0]]

        def forward(delta, embedded=embedded, label=label):
            h = np.tanh(embedded + delta)
            logits = h.mean(0) @ W
            p = np.exp(logits) / np.exp(logits).sum()
            d = p - np.eye(2)[label]
            gradient = (d @ W.T / len(h)) * (1 - h**2)
            return -np.log(p[label]), p.argmax() == label, gradient

        delta = np.zeros_like(embedded)
        for _ in range(steps):
            gradient = forward(delta)[2]
            size = epsilon * min(1, 2.5 / steps)
            delta = delta + size * gradient / np.linalg.norm(gradient)
            if np.linalg.norm(delta) > epsilon:
                delta = delta * epsilon / np.linalg.norm(delta)
        loss, hit, _ = forward(delta)
        losses.append(loss)
        hits.append(hit)
    return np.mean(losses), np.mean(hits)


@slow_on_jax
@pytest.mark.parametrize(("attack", "steps"), [("fgm", 1), ("pgd", 4)])
def test_tokens_against_numpy(attack, steps):
    model = token_model()
    E, W = (w.astype("float64") for w in model.get_weights())
    result = evaluated(
        model, TOKENS, LABELS, attack=attack, steps=steps, batch_size=2
    )
    for row in result.rows:
        expected = recomputed(E, W, row["epsilon"], steps)
        np.testing.assert_allclose(
            (row["loss"], row["accuracy"]), expected, atol=1e-5
        )
    assert result.attack == attack
    assert result.unmoved == 0


def test_several_steps_are_worse_than_one():
    model = token_model(**CHEAPLY)
    kwargs = {"x": TOKENS, "y": LABELS, "epsilons": (1.0, 2.0)}
    one, several = (
        evaluated(model, attack=attack, **kwargs).column("loss")
        for attack in ("fgm", "pgd")
    )
    assert np.all(np.array(several) > one)


def test_many_steps_stay_in_the_ball():
    model = keras.Sequential([keras.Input((1,)), layers.Rescaling(1.0)])
    model.compile("sgd", lambda y, p: ops.sum(ops.square(p), -1), **CHEAPLY)
    for attack, steps in (("fgm", 1), ("pgd", 7)):
        result = evaluated(
            model, np.ones((1, 1)), np.ones(1), attack=attack, steps=steps
        )
        expected = [(1 + e) ** 2 for e in EPSILONS]
        np.testing.assert_allclose(result.column("loss"), expected, rtol=1e-6)


def test_epsilon_relative_to_the_mean_norm_of_the_tokens():
    model = token_model(**CHEAPLY)
    E, W = (w.astype("float64") for w in model.get_weights())
    norms = np.linalg.norm(E[TOKENS[TOKENS != 0]], axis=1)
    result = evaluated(model, TOKENS, LABELS, relative=True, batch_size=2)
    np.testing.assert_allclose(result.mean_norm, norms.mean(), rtol=1e-6)
    for row, epsilon in zip(result.rows, EPSILONS, strict=True):
        absolute = epsilon * norms.mean()
        np.testing.assert_allclose(row["relative_epsilon"], epsilon)
        np.testing.assert_allclose(row["epsilon"], absolute, rtol=1e-6)
        np.testing.assert_allclose(
            row["loss"], recomputed(E, W, absolute, 1)[0], atol=1e-5
        )


def test_one_norm_for_all_that_a_sample_embeds():
    """loss = Σ w·E[a] + Σ w·E[b]: the gradient is w at every position."""
    a, b = keras.Input((2,), dtype="int32"), keras.Input((3,), dtype="int32")
    embedding = layers.Embedding(9, 4)
    dense = layers.Dense(1, use_bias=False)
    total = [ops.sum(dense(embedding(t)), axis=1) for t in (a, b)]
    model = keras.Model([a, b], total[0] + total[1])
    model.compile("sgd", mean_output, **CHEAPLY)
    x = [RNG.integers(0, 9, (4, n)).astype("int32") for n in (2, 3)]
    losses = evaluated(model, x, np.zeros((4, 1))).column("loss")
    norm = np.linalg.norm(dense.get_weights()[0])
    expected = losses[0] + np.sqrt(5) * norm * np.array(EPSILONS)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_padding_is_left_alone():
    """loss = Σ w·E[token] over all positions, padding too."""
    tokens = keras.Input((4,), dtype="int32")
    dense = layers.Dense(1, use_bias=False)
    h = dense(layers.Embedding(5, 3, mask_zero=True)(tokens))
    model = keras.Model(tokens, ops.sum(h, axis=1))
    model.compile("sgd", mean_output, **CHEAPLY)
    losses = evaluated(model, TOKENS, np.zeros((5, 1))).column("loss")
    norm = np.linalg.norm(dense.get_weights()[0])
    roots = np.sqrt((TOKENS != 0).sum(1)).mean()
    expected = losses[0] + roots * norm * np.array(EPSILONS)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def full_model(name):
    if name == "two outputs":
        tokens = keras.Input((5,), dtype="int32")
        h = layers.Flatten()(layers.Embedding(toy.VOCABULARY, 4)(tokens))
        outputs = {
            "a": layers.Dense(3, activation="softmax")(h),
            "b": layers.Dense(1)(h),
        }
        model = keras.Model(tokens, outputs)
        model.compile(
            "sgd",
            {"a": "sparse_categorical_crossentropy", "b": "mse"},
            metrics={"a": ["accuracy"], "b": ["mae"]},
            weighted_metrics={"a": ["accuracy"]},
            **CHEAPLY,
        )
        return model, {"a": toy.LABELS, "b": toy.TARGETS}
    model = {
        "functional": toy.classifier,
        "own loss": lambda: toy.classifier(toy.OwnLoss),
        "subclassed": toy.Subclassed,
        "old style": toy.OldStyle,
    }[name]()
    compile = {} if name == "functional" else CHEAPLY
    return toy.compiled(model, **compile), toy.LABELS


@pytest.mark.parametrize(
    ("name", "weights", "batch_size"),
    [
        ("functional", None, 48),
        ("own loss", toy.WEIGHTS, 32),
        ("subclassed", toy.WEIGHTS, 32),
        ("old style", None, 32),
        # Equal batches: on TensorFlow, Keras averages the losses of single
        # outputs over batches as if they were equally large.
        ("two outputs", {"a": toy.WEIGHTS, "b": toy.WEIGHTS}, 32),
    ],
)
@slow_on_jax
def test_epsilon_zero_is_evaluate(name, weights, batch_size):
    model, y = full_model(name)
    data = {"sample_weight": weights, "batch_size": batch_size}
    expected = model.evaluate(
        toy.TOKENS, y, verbose=0, return_dict=True, **data
    )
    for variable in model.metrics_variables:
        variable.assign(variable + 1)  # left over, must not shine through
    result = evaluated(model, toy.TOKENS, y, (0.0,), **data)
    row = dict(result.rows[0])
    assert row.pop("epsilon") == row.pop("relative_epsilon") == 0
    assert row.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(row[key], value, rtol=2e-6, err_msg=key)


def rows(result):
    return np.array([list(row.values()) for row in result.rows])


@slow_on_jax
def test_batch_size_changes_nothing():
    model = toy.compiled(toy.Subclassed(), **CHEAPLY)
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    results = [
        rows(
            evaluated(
                model,
                toy.TOKENS,
                toy.LABELS,
                sample_weight=toy.WEIGHTS,
                attack="pgd",
                steps=3,
                batch_size=size,
            )
        )
        for size in (48, 1000)
    ]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


@slow_on_jax
def test_eager_is_the_same():
    compiled, eager = token_model(), token_model(run_eagerly=True)
    eager.set_weights(compiled.get_weights())
    np.testing.assert_allclose(
        rows(evaluated(eager, TOKENS, LABELS)),
        rows(evaluated(compiled, TOKENS, LABELS)),
        rtol=1e-5,
    )


def test_nothing_of_the_model_changes(monkeypatch):
    model = toy.compiled(toy.classifier())
    blogkeras.adversarial_training(model)
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)
    before = toy.state(model)
    instances = [dict(vars(layer)) for layer in model.layers]

    def unchanged():
        assert toy.difference(before, toy.state(model)) == 0
        for layer, attributes in zip(model.layers, instances, strict=True):
            assert vars(layer).keys() == attributes.keys()

    evaluated(model, toy.TOKENS, toy.LABELS, batch_size=64)
    unchanged()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    # In the middle of the model, under the gradient.
    monkeypatch.setattr(layers.Dense, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, toy.TOKENS, toy.LABELS, batch_size=64)
    unchanged()
    monkeypatch.undo()
    model.fit(toy.TOKENS, toy.LABELS, verbose=0)


def test_few_shapes_are_compiled(monkeypatch):
    traces = collections.Counter()

    def jit(fn, xla):
        def counted(*args):
            traces[fn.__name__] += 1
            return fn(*args)

        return compiler(counted, xla)

    compiler = backend.jit
    monkeypatch.setattr(backend, "jit", jit)
    kwargs = {"attack": "pgd", "steps": 3}
    evaluated(token_model(), TOKENS, LABELS, batch_size=2, **kwargs)
    assert traces == {"_measure": 2, "_ascend": 2, "_evaluate": 2}
    traces.clear()
    evaluated(token_model(), TOKENS, LABELS, batch_size=5, **kwargs)
    assert traces == {"_measure": 1, "_ascend": 1, "_evaluate": 1}


def test_half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    model = toy.compiled(toy.classifier(), **CHEAPLY)
    result = evaluated(model, toy.TOKENS, toy.LABELS, (0.0, 0.5), batch_size=32)
    clean, attacked = result.column("loss")
    expected = model.evaluate(toy.TOKENS, toy.LABELS, verbose=0)[0]
    np.testing.assert_allclose(clean, expected, rtol=1e-3)
    assert attacked > clean + 0.05
    assert result.unmoved == 0


def test_samples_without_a_gradient_are_counted():
    model = linear_model(mean_output, use_bias=False)
    model.set_weights([np.zeros((3, 1))])
    result = evaluated(model, X, np.zeros((7, 1)), batch_size=4)
    assert result.unmoved == 1
    assert result.column("loss") == [0.0, 0.0, 0.0]


def test_samples_with_tiny_gradients_are_moved():
    model = linear_model(lambda y, p: 1e-27 * p[:, 0], use_bias=False)
    assert evaluated(model, X, np.zeros((7, 1)), batch_size=4).unmoved == 0


def test_a_named_layer_or_input():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    dense_a = layers.Dense(1, use_bias=False)
    dense_b = layers.Dense(1, use_bias=False, name="dense_b")
    model = keras.Model({"a": a, "b": b}, dense_a(a) + 2 * dense_b(b))
    model.compile("sgd", mean_output, **CHEAPLY)
    w_a, w_b = (
        np.linalg.norm(layer.get_weights()[0]) for layer in (dense_a, dense_b)
    )
    for name, slope in (
        ("a", w_a),
        ("b", 2 * w_b),
        (None, np.hypot(w_a, 2 * w_b)),
        ("dense_b", 2.0),
    ):
        losses = evaluated(
            model, {"a": X, "b": X}, np.zeros((7, 1)), embedding_name=name
        ).column("loss")
        expected = losses[0] + slope * np.array(EPSILONS)
        np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_a_layer_without_a_batch_axis_is_refused():
    class Positions(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.table = layers.Embedding(5, 4, name="table")

        def call(self, x):
            return x + self.table(ops.arange(5))[None]

    tokens = keras.Input((5,), dtype="int32")
    h = Positions()(layers.Embedding(toy.VOCABULARY, 4)(tokens))
    outputs = layers.Dense(3, activation="softmax")(layers.Flatten()(h))
    model = toy.compiled(keras.Model(tokens, outputs), **CHEAPLY)
    evaluated(model, toy.TOKENS[:8], toy.LABELS[:8])
    with pytest.raises(ValueError, match=r"first axis .* must be the batch"):
        evaluated(model, toy.TOKENS[:8], toy.LABELS[:8], embedding_name="table")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epsilons": (0.1, -1.0)}, r"Received: epsilons=\(0.1, -1.0\)"),
        ({"epsilons": ()}, r"at least one. Received: epsilons=\(\)"),
        ({"epsilons": (float("nan"),)}, "Received: epsilons"),
        ({"epsilons": "large"}, "Received: epsilons='large'"),
        ({"attack": "fgsm"}, "'fgm', 'pgd'. Received: attack='fgsm'"),
        ({"attack": "pgd", "steps": 0}, "Received: steps=0"),
        ({"batch_size": 2.5}, "Received: batch_size=2.5"),
        ({"x": X[:0], "y": np.zeros((0, 1))}, "at least one. Received"),
        ({"y": np.zeros((3, 1))}, r"shapes \[\(7, 3\), \(3, 1\)\]"),
        ({"embedding_name": "nowhere"}, "embedding_name='nowhere'"),
    ],
)
def test_wrong_arguments(kwargs, message):
    kwargs = {"x": X, "y": np.zeros((7, 1)), **kwargs}
    with pytest.raises(ValueError, match=message):
        evaluated(linear_model(mean_output), **kwargs)


def test_a_model_must_be_compiled():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="Call `compile` first"):
        evaluated(model, X, np.zeros((7, 1)))


def test_unknown_column():
    result = evaluated(linear_model(mean_output), X, np.zeros((7, 1)), 0.1)
    with pytest.raises(ValueError, match=r"'loss'.*Received: name='acc'"):
        result.column("acc")


def test_progress_table_and_figure(capsys, tmp_path):
    result = evaluate_robustness(
        token_model(), TOKENS, LABELS, (0.0, 0.5), batch_size=2
    )
    assert "3/3" in capsys.readouterr().out
    result.table()
    out = capsys.readouterr().out
    for text in ("relative_epsilon", "accuracy", "fgm", "0.5"):
        assert text in out
    path = tmp_path / "robustness.svg"
    assert result.plot(path) == str(path)
    drawn = path.read_text("utf-8")
    for text in ("accuracy", "epsilon: L2 norm", "Under attack (fgm)"):
        assert text in drawn


def test_the_result_is_a_plain_record():
    result = robustness.Robustness([{"epsilon": 0.0}], "fgm", 1.0, 0.0)
    assert result.column("epsilon") == [0.0]
