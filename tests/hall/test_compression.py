"""Compression reports: operations counted, bytes, latency, figures."""

import math

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import close_in_ulps, value

from blogkeras import backend, compression_report
from blogkeras.compression import (
    CompressionReport,
    Operations,
    count_operations,
    measure,
)

X = toy.DENSE[:16]
Y = toy.LABELS[:16]


def dense(units=3, activation="tanh", **kwargs):
    layer = layers.Dense(
        units, activation, kernel_initializer="random_normal", **kwargs
    )
    layer.build((None, 3))
    return layer


def test_flops():
    """2·8·3·5 for the product; 2·(2·6·6·4)·(3·3·2) for the convolution.

    And 4·2·8·5·5 for what a loop repeats four times.
    """
    kernel = np.ones((3, 3, 2, 4), "float32")

    def run(x, image):
        y = ops.matmul(x, ops.ones((3, 5)))
        return (
            ops.fori_loop(0, 4, lambda _, y: ops.matmul(y, ops.eye(5)), y),
            ops.conv(image, kernel, padding="same"),
        )

    text = backend.hlo_text(run, ops.ones((8, 3)), ops.ones((2, 6, 6, 2)))
    products = 8 * 3 * 5 + 4 * 8 * 5 * 5 + 2 * 6 * 6 * 4 * 3 * 3 * 2
    assert count_operations(text) == Operations(2 * products)


def test_flops_of_a_transposed_convolution():
    """Each number of the input meets the kernel once: 2·(4·4)·(4·4)·2·3."""

    def run(image):
        return ops.conv_transpose(
            image, np.ones((4, 4, 3, 2), "float32"), 2, padding="same"
        )

    text = backend.hlo_text(run, ops.ones((1, 4, 4, 2)))
    assert count_operations(text).count == 2 * 4 * 4 * 4 * 4 * 2 * 3


def test_compression_report(tmp_path, capsys):
    def model(*widths):
        parts = [layers.Dense(w, "relu") for w in widths]
        model = keras.Sequential([keras.Input((3,)), *parts, layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=["accuracy"], jit_compile=False)
        return model

    models = {"large": model(96, 96), "small": model(96)}
    report = compression_report(
        models,
        X,
        Y,
        training_seconds={"small": 2.0},
        batch_size=8,
        rounds=3,
        verbose=0,
    )
    # (3 + 1)·96 + (96 + 1)·96 + (96 + 1)·3, without the middle layer's.
    assert report.column("parameters") == [9987, 675]
    np.testing.assert_allclose(
        report.column("gflops"),
        [2e-9 * 8 * (576 + 96 * 96), 2e-9 * 8 * 576],
        rtol=1e-12,
    )
    # Four bytes a number, and for each of 6 and 4 arrays a head of 128 bytes
    # and two entries in the list of the file.
    for bytes_, arrays, mb in zip(
        [4 * 9987, 4 * 675], [6, 4], report.column("megabytes"), strict=True
    ):
        assert 128 * arrays < 1e6 * mb - bytes_ < 450 * arrays
    assert math.isnan(report.rows[0]["training seconds"])
    assert report.rows[1]["training seconds"] == 2
    assert all(ms > 0 for ms in report.column("milliseconds"))
    accuracy = models["small"].evaluate(X, Y, verbose=0)[1]
    assert report.rows[1]["accuracy"] == accuracy
    report.table()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ["small", "9987", *report.rows[0]])
    assert report.plot(tmp_path / "a.png").endswith("a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"Expected one of.*name='nope'"):
        report.plot(tmp_path / "a.png", metric="nope")
    unlike = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    unlike.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"same metrics.*'unlike': .'loss'."):
        compression_report({**models, "unlike": unlike}, X, Y, verbose=0)
    for wrong in ({}, [models["small"]]):
        with pytest.raises(ValueError, match="Expected a dict from names"):
            compression_report(wrong, X, Y)
    with pytest.raises(ValueError, match="Received: name='speed'"):
        report.column("speed")
    with pytest.raises(ValueError, match="built and compiled"):
        compression_report({"a": keras.Sequential([layers.Dense(1)])}, X, Y)


def test_latency_and_its_figure(monkeypatch):
    """The median of each model's turns, in milliseconds, in the figure."""
    seconds = [9, 9, 0.002, 0.001, 0.004, 0.003, 0.1, 0.2]  # two to warm up
    monkeypatch.setattr(measure, "_timed", lambda *_: seconds.pop(0))
    figures = []
    monkeypatch.setattr(
        "blogkeras.report.save_figure", lambda f, p: figures.append(f) or p
    )
    models = {}
    for name in ("a", "b"):
        models[name] = keras.Sequential(
            [
                keras.Input((3,)),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                dense(name=name),
            ]
        )
        models[name].compile(loss="mse", metrics=["mae"], jit_compile=False)
    found = compression_report(
        models, X, X, training_seconds={"a": 7.2}, rounds=3, verbose=0
    )
    np.testing.assert_allclose(found.column("milliseconds"), [4.0, 3.0])
    # BatchNormalization has two vectors more, that do not learn.
    assert found.column("parameters") == [24, 24]
    found.plot("a.png")
    plain = [{**row} for row in found.rows]
    assert plain[0]["training seconds"] == 7.2
    for row in plain:
        del row["training seconds"]
    CompressionReport(plain, 16).plot("a.png", "loss")
    # Differences that are within the noise of an accuracy look small.
    close = [{**plain[0], "acc": 0.861}, {**plain[1], "acc": 0.863}]
    CompressionReport(close, 16).plot("a.png", "acc")
    bottom, top = figures.pop().axes[0].get_ylim()
    np.testing.assert_allclose([bottom, top], [0.8345, 0.8895])
    for figure, metric in zip(figures, ("mae", "loss"), strict=True):
        axes = figure.axes[0]
        points = [p.get_offsets()[0] for p in axes.collections]
        expected = [[4.0, 3.0], found.column(metric)]
        np.testing.assert_allclose(np.transpose(points), expected)
        assert axes.get_ylabel() == metric
        assert "batch of 16" in axes.get_xlabel()
        assert [t.get_text() for t in figure.legends[0].get_texts()] == [
            f"{name}: 24 parameters" for name in "ab"
        ]
    assert [len(figure.axes) for figure in figures] == [2, 1]
    known, unknown = (
        np.ma.filled(p.get_offsets()[0], np.nan)
        for p in figures[0].axes[1].collections
    )
    np.testing.assert_allclose(known, [7.2, found.column("mae")[0]])
    assert np.isnan(unknown[0])
    run, state = measure._inference(models["a"])
    x = ops.convert_to_tensor(X)
    close_in_ulps(value(run(state, x)), value(models["a"](x)))


def operations(run, *args):
    return count_operations(
        backend.hlo_text(run, *map(ops.convert_to_tensor, args))
    )


SQUARE = np.ones((4, 4), "float32")


def square(x):
    """2·4·4·4 = 128 operations."""
    return ops.matmul(x, x)


def test_branches_are_followed():
    """The larger branch counts: 128 and 3·128 operations."""

    def run(x, chosen):
        return ops.cond(
            chosen, lambda: square(x), lambda: square(square(square(x)))
        )

    assert operations(run, SQUARE, True) == Operations(3 * 128)

    def several(x, number):
        return ops.switch(number, [square, lambda y: square(square(y))], x)

    assert operations(several, SQUARE, 0) == Operations(2 * 128)


def test_loops_count_all_their_rounds():
    """Up, down, by steps, one in another; by while and for."""

    def looped(start, test, change):
        def run(x):
            return ops.while_loop(
                lambda i, y: test(i),
                lambda i, y: (change(i), square(y)),
                (start, x),
            )[1]

        return run

    for start, test, change, rounds in (
        (0, lambda i: i < 7, lambda i: i + 1, 7),
        (7, lambda i: i > 0, lambda i: i - 2, 4),
        (1, lambda i: i <= 64, lambda i: i * 2, 7),
        (0, lambda i: ops.logical_and(i < 9, i != 5), lambda i: i + 1, 5),
        (3, lambda i: i < 3, lambda i: i + 1, 0),
    ):
        found = operations(looped(start, test, change), SQUARE)
        assert found == Operations(128 * rounds)

    def nested(x):
        return ops.fori_loop(
            0,
            3,
            lambda i, y: ops.fori_loop(0, 5, lambda j, z: square(z), y),
            x,
        )

    assert operations(nested, SQUARE) == Operations(15 * 128)


def test_a_loop_that_depends_on_the_data_is_a_lower_bound():
    def run(x):
        return ops.while_loop(
            lambda y: ops.sum(y) < 100.0, lambda y: (square(y),), (x,)
        )[0]

    assert operations(run, SQUARE) == Operations(128, exact=False)


def test_recurrent_layers():
    """An LSTM of 10 steps as unrolled: 10·2·(2·4·32 + 2·8·32) = 15360."""
    x = np.ones((2, 10, 4), "float32")
    for unroll in (False, True):
        layer = layers.LSTM(8, unroll=unroll)
        layer.build(x.shape)
        found = operations(layer, x)
        assert found == Operations(10 * 2 * (2 * 4 * 32 + 2 * 8 * 32))


def test_lower_bounds_are_marked(capsys):
    rows = [
        {"model": name, "gflops": 1.5, "milliseconds": 1.0, "loss": 0.5}
        for name in ("fixed", "open")
    ]
    CompressionReport(rows, 8, ("open",)).table()
    printed = capsys.readouterr().out
    assert printed.count("≥ 1.5") == 1


def report_of(**kwargs):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    model.compile("adam", "mse", jit_compile=False)
    arguments = {"models": {"a": model}, "x": X, "y": X, "verbose": 0}
    return model, lambda: compression_report(**{**arguments, **kwargs})


def test_a_step_of_training_is_measured_and_taken_back():
    model, measured = report_of(training_step=True, rounds=1, batch_size=8)
    model.fit(X, X, verbose=0)
    variables = [*model.variables, *model.optimizer.variables]
    before = [value(v).copy() for v in variables]
    report = measured()
    assert toy.difference(before, [value(v) for v in variables]) == 0
    assert report.column("step milliseconds")[0] > 0
    megabytes = report.column("step megabytes")[0]
    if backend.BACKEND == "jax":
        # Weights and two moments of each, batch and targets, at the least.
        assert megabytes >= 4e-6 * (3 * 12 + 2 * 8 * 3)
        assert megabytes < 1e-2
    else:
        assert math.isnan(megabytes)
    assert next(reversed(report.rows[0])) == "loss"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, value)
        for name, values in {
            "models": [{}, [], None, "a", {"a": None}, {"a": "bert"}],
            "batch_size": [0, -1, 2.0, "2", True, None],
            "rounds": [0, -1, 2.0, "2", True, None],
            "verbose": [3, "yes", None, 1.0],
            "training_step": [1, "yes", None],
            "training_seconds": [
                {"b": 1.0},
                {"a": -1},
                {"a": "1"},
                {"a": math.inf},
                [1.0],
            ],
        }.items()
        for value in values
    ],
)
def test_bad_arguments(name, wrong):
    _, measured = report_of(**{name: wrong})
    with pytest.raises(ValueError, match=r"Expected .*Received: "):
        measured()
