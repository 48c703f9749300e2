"""Finite scalars and residuals: formulas, counts, old files (post 9826)."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from kit import nearest_rows, slow_on_jax

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    CodebookUsage,
    FiniteScalarQuantizer,
    ResidualVectorQuantizer,
    perplexity,
    usage,
)

RNG = np.random.default_rng(0)
DIM, CODES = 4, 8
Z = RNG.normal(size=(5, 3, 2, DIM)).astype("float32")
E = RNG.normal(size=(CODES, DIM)).astype("float32")


def numpy(x):
    return keras.tree.map_structure(ops.convert_to_numpy, x)


def run(layer, z):
    """`(quantized, codes, loss)`, pure: nothing is assigned."""
    with keras.StatelessScope(collect_losses=True) as scope:
        quantized, codes = layer(z, return_codes=True)
    return quantized, codes, sum(scope.losses)


# Finite scalars.


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_finite_scalars_are_the_formula(activation):
    levels = [3, 4, 5, 8]
    layer = FiniteScalarQuantizer(levels, activation)
    z = (3 * Z).astype("f8")
    quantized, codes = numpy(layer(z.astype("f4"), return_codes=True))
    top = np.array(levels) - 1.0
    if activation == "sigmoid":
        bounded = top / (1 + np.exp(-z))
        digits, width, zero = np.round(bounded), top, 0
    else:
        half, offset = top / 2 * 0.999, np.array([0, 0.5, 0, 0.5])
        bounded = half * np.tanh(z + np.arctanh(offset / half)) - offset
        width = zero = np.array([1, 2, 2, 4])
        digits = np.round(bounded) + zero
    np.testing.assert_allclose(quantized, (digits - zero) / width, atol=1e-6)
    radix = np.array([1, 3, 12, 60])
    assert np.abs(np.abs(bounded - np.round(bounded)) - 0.5).min() > 1e-5
    np.testing.assert_array_equal(codes, (digits * radix).sum(-1))

    def output(z):
        return ops.sum(layer(z)), None

    slope = numpy(backend.value_and_grad(output, z.astype("f4"))[1])
    step = 1e-6  # the activation's derivative, by central differences

    def smooth(z):
        if activation == "sigmoid":
            return 1 / (1 + np.exp(-z))
        shift = np.arctanh(offset / half)
        return half * np.tanh(z + shift) / width

    expected = (smooth(z + step) - smooth(z - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, atol=1e-5)
    assert layer.losses == []


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_every_finite_code_is_reached_and_its_own(activation, policy):
    # 1000 codes: more than bfloat16 has integers.
    layer = FiniteScalarQuantizer([8, 5, 5, 5], activation, dtype=policy)
    part = np.linspace(0.002, 0.998, 24)
    part = np.log(part / (1 - part)) / (2 if activation == "tanh" else 1)
    z = np.stack(np.meshgrid(*[part.astype("f4")] * 4), -1).reshape(-1, 4)
    assert len(np.unique(numpy(layer.encode(z)))) == 1000
    codes = np.arange(1000, dtype="int32")
    digits = codes[:, None] // [1, 8, 40, 200] % [8, 5, 5, 5]
    zero = np.array([4, 2, 2, 2]) if activation == "tanh" else 0
    width = [4, 2, 2, 2] if activation == "tanh" else [7, 4, 4, 4]
    np.testing.assert_allclose(
        numpy(ops.cast(layer.decode(codes), "float32")),
        (digits - zero) / np.array(width, "f4"),
        atol=2e-3 if policy == "mixed_bfloat16" else 1e-6,
    )


def test_zero_is_quantized_to_zero_by_tanh():
    layer = FiniteScalarQuantizer([3, 4, 5, 8])
    np.testing.assert_allclose(numpy(layer(0 * Z)), 0, atol=1e-6)


# Residuals.


@slow_on_jax
def test_residual_codes_add_up():
    layer = ResidualVectorQuantizer(3, CODES)
    layer.build(Z.shape)
    books = [E, 0.5 * E[::-1], 0.2 * E]
    for stage, book in zip(layer.stages, books, strict=True):
        stage.embeddings.assign(book)
    quantized, codes, loss = numpy(run(layer, Z))
    rest, expected, total = Z.astype("f8"), [], 0
    for book in books:
        expected.append(nearest_rows(rest, book))
        error = rest - book[expected[-1]]
        total, rest = total + 1.25 * np.mean(error**2), error
    np.testing.assert_array_equal(codes, np.stack(expected, -1))
    np.testing.assert_allclose(quantized, Z - rest, atol=1e-6)
    np.testing.assert_allclose(loss, total, rtol=1e-5)

    # A stage's loss pulls its own codes, and the vectors: no other stage's.
    def losses(args):
        z, *values = args
        mapping = [
            (stage.embeddings, value)
            for stage, value in zip(layer.stages, values, strict=True)
        ]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            layer(z)
        return sum(scope.losses), None

    slopes = numpy(backend.value_and_grad(losses, (Z, *books))[1])
    rest, pull = Z.astype("f8"), 0
    for book, slope in zip(books, slopes[1:], strict=True):
        k = nearest_rows(rest, book)
        rest = rest - book[k]
        push = np.zeros(book.shape)
        np.add.at(push, k, -2 * rest / rest.size)
        np.testing.assert_allclose(slope, push, atol=1e-6)
        pull = pull + 0.25 * 2 * rest / rest.size
    np.testing.assert_allclose(slopes[0], pull, atol=1e-6)
    np.testing.assert_array_equal(numpy(layer.encode(Z)), codes)
    np.testing.assert_allclose(numpy(layer.decode(codes)), quantized, atol=1e-6)
    np.testing.assert_array_equal(
        numpy(layer.decode(codes[..., :1])), E[codes[..., 0]]
    )

    def output(z):
        return ops.sum(run(layer, z)[0]), None

    slope = numpy(backend.value_and_grad(output, Z)[1])
    np.testing.assert_array_equal(slope, 1)


def test_residual_stages_start_apart_and_adapt_in_turn():
    layer = ResidualVectorQuantizer(2, CODES, ema_decay=0.9)
    layer.build(Z.shape)
    first, second = (numpy(stage.embeddings) for stage in layer.stages)
    assert np.abs(first - second).max() > 0.01
    layer.adapt(Z)
    coarse = numpy(layer.stages[0].decode(layer.encode(Z)[..., 0]))
    fine = numpy(layer.decode(layer.encode(Z)))
    assert np.mean((Z - fine) ** 2) < 0.5 * np.mean((Z - coarse) ** 2)
    layer(Z, training=True)
    assert len(layer.losses) == 1


# Finite scalars have no codebook: memory and counts are by component.


def levels_of(codes, levels):
    """How often each level of each component is in some codes."""
    counts = np.zeros((len(levels), max(levels)))
    for code in np.ravel(codes):
        for place, level in enumerate(levels):
            code, digit = divmod(int(code), level)
            counts[place, digit] += 1
    return counts


def test_levels_are_counted_by_component():
    levels = [3, 4, 5, 8]
    layer = FiniteScalarQuantizer(levels)
    mask = np.ones(Z.shape[:-1], bool)
    mask[0], mask[2, 1] = False, False
    _, codes = layer(2 * Z, training=True, return_codes=True, mask=mask)
    counts = levels_of(numpy(codes)[mask], levels)
    np.testing.assert_array_equal(numpy(layer.batch_counts), counts)
    layer(2 * Z, training=True)
    total = counts + levels_of(numpy(codes), levels)
    np.testing.assert_array_equal(numpy(layer.total_counts), total)
    shares = usage(layer.total_counts, levels)
    np.testing.assert_allclose(
        numpy(shares), (total > 0).sum(1) / np.array(levels), rtol=1e-6
    )
    # Whole codes are counted where they are asked for.
    joint = np.bincount(numpy(codes).ravel(), minlength=480)
    np.testing.assert_array_equal(numpy(layer.count(codes)), joint)


def scalar_autoencoder(levels):
    dim = len(levels)
    encoder = keras.Sequential([keras.Input((6,)), layers.Dense(dim)])
    decoder = keras.Sequential([keras.Input((dim,)), layers.Dense(6)])
    return VQVAE(encoder, FiniteScalarQuantizer(levels), decoder)


@pytest.mark.parametrize("number", [7, 10, 11, 12, 30])
def test_memory_does_not_grow_with_the_number_of_codes(number, tmp_path):
    model = scalar_autoencoder([8] * number)
    model.build((None, 6))
    size = sum(np.prod(w.shape) for w in model.weights)
    assert size + np.prod(model.usage.counts.shape) < 2000
    model.save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 60_000
    if number <= 10:
        codes = model.encode(np.ones((3, 6), "float32"))
        assert codes.min() >= 0
        assert codes.max() < 8**number


def test_more_codes_than_int32_can_number():
    x = RNG.normal(size=(16, 6)).astype("float32")
    model = scalar_autoencoder([8] * 11)
    model.compile("sgd", jit_compile=True)
    history = model.fit(x, verbose=0, validation_data=(x,)).history
    assert np.isfinite([v for values in history.values() for v in values]).all()
    # By component, in NumPy.
    z = numpy(model.encoder(x)).astype("float64")
    half, offset = 3.5 * 0.999, 0.5
    bounded = half * np.tanh(z + np.arctanh(offset / half)) - offset
    digits = np.round(bounded).astype(int) + 4
    assert np.abs(np.abs(bounded - np.round(bounded)) - 0.5).min() > 1e-5
    counts = np.stack([np.bincount(d, minlength=8) for d in digits.T])
    p = counts / len(x)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    logs = model.evaluate(x, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        logs["perplexity"], np.exp(entropy).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(logs["usage"], np.mean(counts > 0), rtol=1e-6)
    quantized = numpy(model.quantizer(z.astype("float32")))
    np.testing.assert_allclose(quantized, (digits - 4) / 4, atol=1e-6)
    assert model.reconstruct(x).shape == model.interpolate(x, x, 2)[:, 0].shape
    z = z.astype("float32")
    for call in (
        lambda: model.encode(x),
        lambda: model.decode(np.zeros((1,), "int32")),
        lambda: model.quantizer.encode(z),
        lambda: model.quantizer.decode([0]),
        lambda: model.quantizer(z, return_codes=True),
        lambda: model.quantizer(keras.Input((11,)), return_codes=True),
    ):
        with pytest.raises(ValueError, match="at most 2³¹ codes"):
            call()
    largest = FiniteScalarQuantizer([8] * 10 + [2], "sigmoid")  # 2³¹ codes
    assert int(largest.encode(np.full((1, 11), 9.0))[0]) == 2**31 - 1


def test_files_that_count_whole_codes_still_load(tmp_path):
    import h5py

    levels = [3, 5, 4]
    codes = RNG.integers(0, 60, 200)
    layer = FiniteScalarQuantizer(levels)
    layer.build((None, 3))
    joint = np.bincount(codes, minlength=60).astype("float32")
    with h5py.File(tmp_path / "old.h5", "w") as store:
        store["0"], store["1"] = joint, 2 * joint
        layer.load_own_variables(store)
    expected = levels_of(codes, levels)
    np.testing.assert_array_equal(numpy(layer.batch_counts), expected)
    np.testing.assert_array_equal(numpy(layer.total_counts), 2 * expected)
    with h5py.File(tmp_path / "other.h5", "w") as store:
        store["0"], store["1"] = joint[:9], joint[:9]
        with pytest.raises(ValueError, match="60 codes"):
            layer.load_own_variables(store)


def test_the_callback_counts_components():
    layer = FiniteScalarQuantizer([3, 5], name="fsq")
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = RNG.normal(size=(20, 2)).astype("float32")
    logs = model.fit(x, x, verbose=0, callbacks=[CodebookUsage()]).history
    counts = levels_of(numpy(layer.encode(model.layers[0](x))), [3, 5])
    np.testing.assert_allclose(
        logs["fsq_usage"], [np.mean((counts > 0).sum(1) / [3, 5])], rtol=1e-6
    )
    np.testing.assert_allclose(
        logs["fsq_perplexity"], [np.mean(numpy(perplexity(counts)))], rtol=1e-5
    )
