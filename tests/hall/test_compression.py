"""Compression reports: operations counted, bytes, latency, figures."""

import math

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import value

from blogkeras import backend, compression, compression_report
from blogkeras.compression import matmul_flops

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

    And 2·8·5·5 for what a loop repeats.
    """
    kernel = np.ones((3, 3, 2, 4), "float32")

    def run(x, image):
        y = ops.matmul(x, ops.ones((3, 5)))
        return (
            ops.fori_loop(0, 4, lambda _, y: ops.matmul(y, ops.eye(5)), y),
            ops.conv(image, kernel, padding="same"),
        )

    text = backend.hlo_text(run, ops.ones((8, 3)), ops.ones((2, 6, 6, 2)))
    products = 8 * 3 * 5 + 8 * 5 * 5 + 2 * 6 * 6 * 4 * 3 * 3 * 2
    assert matmul_flops(text) == 2 * products


def test_flops_of_a_transposed_convolution():
    """Each number of the input meets the kernel once: 2·(4·4)·(4·4)·2·3."""

    def run(image):
        return ops.conv_transpose(
            image, np.ones((4, 4, 3, 2), "float32"), 2, padding="same"
        )

    text = backend.hlo_text(run, ops.ones((1, 4, 4, 2)))
    assert matmul_flops(text) == 2 * 4 * 4 * 4 * 4 * 2 * 3


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
    with pytest.raises(ValueError, match="Expected one of.*name='nope'"):
        report.plot(tmp_path / "a.png", metric="nope")
    unlike = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    unlike.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="same metrics.*'unlike': .'loss'."):
        compression_report({**models, "unlike": unlike}, X, Y, verbose=0)
    with pytest.raises(ValueError, match=r"Received: \['other'\]"):
        compression_report(models, X, Y, training_seconds={"other": 1.0})
    for wrong in ({}, [models["small"]]):
        with pytest.raises(ValueError, match="Expected a dict from names"):
            compression_report(wrong, X, Y)
    with pytest.raises(ValueError, match="batch_size=32, rounds=0"):
        compression_report(models, X, Y, rounds=0)
    with pytest.raises(ValueError, match="Received: name='speed'"):
        report.column("speed")
    with pytest.raises(ValueError, match="built and compiled"):
        compression_report({"a": keras.Sequential([layers.Dense(1)])}, X, Y)


def test_latency_and_its_figure(monkeypatch):
    """The median of each model's turns, in milliseconds, in the figure."""
    seconds = [9, 9, 0.002, 0.001, 0.004, 0.003, 0.1, 0.2]  # two to warm up
    monkeypatch.setattr(compression, "_timed", lambda *_: seconds.pop(0))
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
    assert [row.pop("training seconds") for row in plain][0] == 7.2
    compression.CompressionReport(plain, 16).plot("a.png", "loss")
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
    run, state = compression._inference(models["a"])
    x = ops.convert_to_tensor(X)
    np.testing.assert_array_equal(value(run(state, x)), value(models["a"](x)))
