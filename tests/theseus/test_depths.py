"""Several depths in one call, and the frontier of what they cost and reach."""

import inspect
import itertools
import re

import keras
import numpy as np
import pytest
from keras import layers
from kit import slow_on_tensorflow, value

from blogkeras.compression import CompressionReport
from blogkeras.theseus import (
    Distillation,
    Theseus,
    bert_of_theseus,
    compare_depths,
    keep_blocks,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 4)).astype("float32")
Y = RNG.integers(0, 3, 12)
LOSS = "sparse_categorical_crossentropy"


def transformer(blocks=4):
    inputs = keras.Input((4,))
    x = layers.Dense(5, name="embedding")(inputs)
    for i in range(blocks):
        x = layers.Dense(5, "tanh", name=f"transformer_layer_{i}")(x)
    return keras.Model(inputs, x)


def numpy_outputs(large, head, blocks):
    """What the first blocks and the head of the large model say of X."""
    x = X
    for layer in [*large.layers[1:][: blocks + 1], head]:
        kernel, bias = map(value, layer.weights)
        x = x @ kernel + bias
        x = np.tanh(x) if "transformer" in layer.name else x
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def compare(train, depths=(2, 1), **kwargs):
    large, head = transformer(), layers.Dense(3, "softmax")
    head.build((None, 5))
    options = {"loss": LOSS, "metrics": ["accuracy"], "rounds": 1}
    options |= {"batch_size": 4, "verbose": 0, **kwargs}
    report = compare_depths(large, head, depths, train, X, Y, **options)
    return large, head, report


@slow_on_tensorflow
def test_every_method_at_every_depth():
    """`train` changes nothing here, so that NumPy knows every prediction."""
    trained, models = [], {}
    large, head, report = compare(
        trained.append,
        methods=["theseus", "distillation", "direct"],
        models=models,
    )
    kinds = [type(model) for model in trained]
    assert kinds[::2][:2] == [Theseus] * 2
    assert kinds[4:6] == [Distillation] * 2
    assert len(trained) == 2 * 2 + 2 + 2
    assert report.column("method") == [
        "predecessor",
        *["theseus"] * 2,
        *["distillation"] * 2,
        *["direct"] * 2,
    ]
    assert report.column("blocks") == [4, 2, 1, 2, 1, 2, 1]
    assert report.column("model")[:3] == [
        "predecessor",
        "theseus, 2 blocks",
        "theseus, 1 block",
    ]
    for row in report.rows:
        expected = numpy_outputs(large, head, row["blocks"])
        model = models[row["model"]]
        np.testing.assert_allclose(value(model(X)), expected, rtol=1e-5)
        accuracy = np.mean(expected.argmax(-1) == Y)
        np.testing.assert_allclose(row["accuracy"], accuracy, rtol=1e-6)
        assert row["parameters"] == 25 + (5 * 6) * row["blocks"] + 18


def test_a_depth_starts_from_what_was_given():
    """The training of one successor leaves head and predecessor alone."""

    def train(model):
        if not isinstance(model, Theseus):
            for weight in model.trainable_variables:
                weight.assign(weight + 1)

    models = {}
    large, head, _ = compare(train, methods="theseus", models=models)
    fresh = transformer(1)
    for new, old in zip(fresh.layers, large.layers, strict=False):
        new.set_weights(old.get_weights())
    for name, blocks in (("theseus, 2 blocks", 2), ("theseus, 1 block", 1)):
        moved = [value(w) - 1 for w in models[name].weights]
        given = [
            value(w) for x in large.layers[: blocks + 2] for w in x.weights
        ]
        given += [value(w) for w in head.weights]
        assert len(moved) == len(given) == 2 * (blocks + 2)
        for a, b in zip(moved, given, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


@slow_on_tensorflow
def test_methods_of_ones_own_and_other_successors():
    asked = []

    def successor(depth):
        asked.append(depth)
        return transformer(depth)

    def train(model):
        trained.append(model)

    trained, large = [], transformer()
    head = layers.Dense(3, "softmax")
    report = compare_depths(
        large,
        head,
        [3, 1],
        train,
        X,
        Y,
        loss=LOSS,
        methods={
            "rate .9": lambda small: bert_of_theseus(large, small, head, 0.9)
        },
        successor=successor,
        rounds=1,
        verbose=0,
    )
    assert asked == [3, 1]
    assert [m.get_config()["replacement_rate"] for m in trained[::2]] == [
        0.9
    ] * 2
    assert report.column("model")[1:] == [
        "rate .9, 3 blocks",
        "rate .9, 1 block",
    ]


def test_an_interrupted_comparison_goes_on():
    calls = []

    def train(model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt

    models = {}
    with pytest.raises(KeyboardInterrupt):
        compare(train, methods="direct", models=models)
    assert list(models) == ["predecessor", "direct, 2 blocks"]
    _, _, report = compare(train, methods="direct", models=models)
    assert len(calls) == 3
    assert report.column("model") == list(models)
    seconds = report.column("training seconds")
    assert np.isnan(seconds[:2]).all()
    assert seconds[2] >= 0


def test_what_is_wrong_is_refused_before_training(capsys):
    def never(model):
        raise AssertionError

    large, head = transformer(), layers.Dense(3, "softmax")

    def call(depths=(1,), train=never, x=X, y=Y, **kwargs):
        kwargs = {"loss": LOSS, **kwargs}
        return compare_depths(large, head, depths, train, x, y, **kwargs)

    for depths in ([], [1, 1], [5], [0], [1.5], 2, "12", [[1]]):
        with pytest.raises(ValueError, match=r"(?s)Expected.*: depths="):
            call(depths)
    with pytest.raises(ValueError, match="`train` to be a function"):
        call(train="fit")
    with pytest.raises(ValueError, match="`successor` to be a function"):
        call(successor=3)
    for methods in ("theseu", ["direct", 3], [], {}, {"a": "direct"}, None):
        with pytest.raises(ValueError, match=r"(?s)Expected.*: methods="):
            call(methods=methods)
    with pytest.raises(ValueError, match=r"earlier call.*'direct, 9 blocks'"):
        call(models={"direct, 9 blocks": large})
    with pytest.raises(ValueError, match="Received: batch_size=0"):
        call(batch_size=0)
    with pytest.raises(ValueError, match="Received: rounds=0"):
        call(rounds=0)
    with pytest.raises(ValueError, match=r"incompatible|shape"):
        call(x=X[:, :3])
    assert keep_blocks(large, 1).count_params() == 25 + 30
    assert capsys.readouterr().out == ""


def brute_force(rows, metric, sign):
    """Names of the rows that none is at least as good as in both, by cost."""
    left = []
    for i, a in enumerate(rows):
        beaten = any(
            b["milliseconds"] <= a["milliseconds"]
            and sign * b[metric] >= sign * a[metric]
            and (
                (b["milliseconds"], b[metric]) != (a["milliseconds"], a[metric])
                or j < i
            )
            for j, b in enumerate(rows)
            if j != i
        )
        if not beaten:
            left.append(a)
    left.sort(key=lambda row: row["milliseconds"])
    return [row["model"] for row in left]


BETTER = {
    "min": "categorical_hinge hinge squared_hinge binary_crossentropy "
    "categorical_crossentropy sparse_categorical_crossentropy kl_divergence "
    "poisson logcosh mean_absolute_error mean_absolute_percentage_error "
    "mean_squared_error mean_squared_logarithmic_error root_mean_squared_error "
    "false_negatives false_positives mse MSE mae mape msle bce",
    "max": "accuracy binary_accuracy categorical_accuracy "
    "sparse_categorical_accuracy sparse_top_k_categorical_accuracy "
    "top_k_categorical_accuracy auc precision recall true_negatives "
    "true_positives concordance_correlation pearson_correlation f1_score "
    "fbeta_score binary_io_u one_hot_io_u mean_io_u cosine_similarity r2_score",
}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_better_of_keras_metrics(mode):
    for name in BETTER[mode].split():
        rows = [
            {"model": mode, "milliseconds": 1.0, name: 1.0},
            {"model": "max", "milliseconds": 2.0, name: 2.0},
        ]
        frontier = CompressionReport(rows, 8).frontier()
        assert len(frontier) == (1 if mode == "min" else 2), name


def test_the_table_above_has_all_metrics_of_keras():
    """Those that are made without arguments, by their names."""
    known = " ".join(BETTER.values()).split()
    for cls in vars(keras.metrics).values():
        if not inspect.isclass(cls):
            continue
        try:
            name = cls().name
        except TypeError:
            continue
        # Further ones of the same name get a number.
        name = re.sub(r"_\d+$", "", name)
        assert name in [*known, "mean", "sum", "metric"], name


def test_the_frontier():
    rng = np.random.default_rng(1)
    for trial, size in itertools.product(range(30), (1, 2, 7)):
        # Small integers, so that ties occur.
        rows = [
            {"model": str(i), "milliseconds": a, "loss": b, "accuracy": c}
            for i, (a, b, c) in enumerate(
                rng.integers(1, 5, (size, 3)).astype(float)
            )
        ]
        report = CompressionReport(rows, 8)
        found = report.frontier()
        assert found == brute_force(rows, "accuracy", 1), trial
        assert report.frontier("loss") == brute_force(rows, "loss", -1)
        assert report.frontier("loss", mode="max") == brute_force(
            rows, "loss", 1
        )
    rows[0]["accuracy"] = float("nan")
    assert CompressionReport(rows, 8).frontier() == brute_force(
        rows[1:], "accuracy", 1
    )
    with pytest.raises(ValueError, match="Received: mode="):
        report.frontier(mode="best")
    with pytest.raises(ValueError, match="Received: name='speed'"):
        report.frontier("speed")


def test_the_figure_has_a_line_for_each_method(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "blogkeras.report.save_figure",
        lambda figure, path: figures.append(figure) or path,
    )
    names = ("model", "method", "blocks", "parameters", "milliseconds")
    rows = [
        dict(zip((*names, "accuracy"), row, strict=True))
        for row in [
            ("predecessor", "predecessor", 4, 9, 8.0, 0.9),
            ("theseus, 2 blocks", "theseus", 2, 5, 4.0, 0.8),
            ("theseus, 1 block", "theseus", 1, 3, 2.0, 0.6),
            ("direct, 2 blocks", "direct", 2, 5, 4.5, 0.7),
        ]
    ]
    report = CompressionReport(rows, 8)
    report.plot(tmp_path / "a.png")
    axes = figures[0].axes[0]
    lines = {
        line.get_label(): [tuple(p) for p in line.get_xydata()]
        for line in axes.lines
    }
    assert lines == {
        "Pareto frontier": [(2.0, 0.6), (4.0, 0.8), (8.0, 0.9)],
        "predecessor": [(8.0, 0.9)],
        "theseus": [(2.0, 0.6), (4.0, 0.8)],
        "direct": [(4.5, 0.7)],
    }
    assert sorted(t.get_text() for t in axes.texts) == ["1", "2", "2", "4"]
