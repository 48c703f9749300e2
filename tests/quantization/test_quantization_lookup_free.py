"""Signs as codes (LFQ, BSQ), against the table of all codes in NumPy."""

import itertools

import keras
import numpy as np
import pytest
import toy
from keras import ops
from kit import SLOW_FILE_ON_JAX, slow_on_jax, value

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    GroupedQuantizer,
    LookupFreeQuantizer,
)

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
BITS = 4
Z = RNG.normal(size=(5, 3, BITS)).astype("float32")
CODES = np.array(list(itertools.product([-1.0, 1.0], repeat=BITS)))
each_kind = pytest.mark.parametrize(
    "spherical", [False, True], ids=["lfq", "bsq"]
)


def terms(z, spherical, temperature):
    """Entropies by the table of all codes: `(of a vector, of single bits)`."""
    z = z.astype("f8").reshape(-1, BITS)
    codes = CODES
    if spherical:
        z = z / np.linalg.norm(z, axis=-1, keepdims=True)
        codes = CODES / np.sqrt(BITS)
    logits = -((z[:, None] - codes) ** 2).sum(-1) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True)
    of_vectors = -(p * np.log(np.maximum(p, 1e-300))).sum(1).mean()
    mean = p.mean(0)
    bits = np.stack([mean[CODES[:, i] > 0].sum() for i in range(BITS)])
    of_bits = -(bits * np.log(bits) + (1 - bits) * np.log(1 - bits)).sum()
    of_all = -(mean * np.log(np.maximum(mean, 1e-300))).sum()
    nearest = codes[logits.argmax(1)]
    return of_vectors, of_bits, of_all, np.mean((z - nearest) ** 2)


@each_kind
def test_the_loss_is_that_of_the_table_of_all_codes(spherical):
    layer = LookupFreeQuantizer(
        BITS, 0.3, 0.7, 0.2, temperature=1.5, spherical=spherical
    )
    output, codes = layer(Z, return_codes=True)
    of_vectors, of_bits, of_all, error = terms(Z, spherical, 1.5)
    expected = 0.3 * (of_vectors - 0.7 * of_bits) + 0.2 * error
    np.testing.assert_allclose(float(layer.losses[0]), expected, rtol=1e-5)
    assert of_all <= of_bits + 1e-12  # the bound
    size = 0.5 if spherical else 1.0
    signs = np.where(Z > 0, 1, -1)
    np.testing.assert_array_equal(value(output), size * signs)
    np.testing.assert_array_equal(value(codes), (Z > 0) @ [1, 2, 4, 8])
    np.testing.assert_array_equal(value(layer.encode(Z)), value(codes))
    np.testing.assert_array_equal(value(layer.decode(codes)), size * signs)


def test_the_bound_is_the_entropy_where_bits_are_independent():
    z = CODES * RNG.uniform(0.1, 1, BITS)  # each sign with each other one
    _, of_bits, of_all, _ = terms(z, False, 2.0)
    np.testing.assert_allclose(of_bits, of_all, rtol=1e-12)


@each_kind
def test_gradients_by_finite_differences(spherical):
    options = {"temperature": 0.8, "spherical": spherical}
    layer = LookupFreeQuantizer(BITS, 0.3, 0.7, 0.2, **options)

    def loss(z):
        with keras.StatelessScope(collect_losses=True) as scope:
            layer(z)
        return sum(scope.losses), None

    slope = value(backend.value_and_grad(loss, Z)[1])

    def reference(z):
        of_vectors, of_bits, _, error = terms(z, spherical, 0.8)
        return 0.3 * (of_vectors - 0.7 * of_bits) + 0.2 * error

    for index in [(0, 0, 0), (1, 2, 3), (4, 1, 2)]:
        ends = []
        for step in (1e-5, -1e-5):
            z = Z.astype("f8")
            z[index] += step
            ends.append(reference(z))
        expected = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(slope[index], expected, atol=2e-6)


def test_the_output_is_straight_through():
    layer = LookupFreeQuantizer(BITS)
    u = RNG.normal(size=Z.shape).astype("f4")

    def output(z):
        with keras.StatelessScope():
            return ops.sum(u * layer(z)), None

    slope = backend.value_and_grad(output, Z)[1]
    np.testing.assert_array_equal(value(slope), u)


@pytest.mark.parametrize("bits", [31, 32, 200])
def test_memory_does_not_grow_with_the_number_of_codes(bits):
    layer = LookupFreeQuantizer(bits)
    z = RNG.normal(size=(6, bits)).astype("f4")
    z[0], z[1] = 1, -1
    output, codes = layer(z, training=True, return_codes=True)
    assert sum(np.prod(w.shape) for w in layer.weights) == 4 * bits
    assert np.isfinite(float(layer.losses[0]))
    codes = value(codes)
    spec = layer(keras.Input((bits,)), return_codes=True)[1]
    assert spec.shape == (None, *codes.shape[1:])
    if bits == 31:
        assert codes[0] == 2**31 - 1
        assert codes[1] == 0
    else:
        np.testing.assert_array_equal(codes, z > 0)
        with pytest.raises(ValueError, match=rf"codes of {bits} bits"):
            layer.decode([[0, 1]])
        with pytest.raises(ValueError, match="at most 1"):
            layer.decode(2 * codes)
    np.testing.assert_array_equal(value(layer.decode(codes)), value(output))
    counts = value(layer.stacked_counts("batch_counts"))
    np.testing.assert_array_equal(counts[:, 1], (z > 0).sum(0))
    np.testing.assert_array_equal(counts.sum(1), 6)


@each_kind
def test_degenerate_vectors_have_finite_losses_and_gradients(spherical):
    layer = LookupFreeQuantizer(BITS, spherical=spherical)
    for z in (0 * Z, 1e18 * Z, 1e-30 * Z, np.ones_like(Z), Z[:0]):

        def loss(z):
            with keras.StatelessScope(collect_losses=True) as scope:
                output = layer(z)
            return sum(scope.losses) + ops.sum(output), None

        found, slope = backend.value_and_grad(loss, z)
        assert np.isfinite(float(found[0]))
        assert np.isfinite(value(slope)).all()
    output, codes = layer(0 * Z[0], return_codes=True)
    np.testing.assert_array_equal(value(codes), 0)
    assert value(output).max() < 0


def test_masked_vectors_have_no_say():
    layer = LookupFreeQuantizer(BITS, temperature=1.0)
    mask = np.ones(Z.shape[:-1], bool)
    mask[1], mask[3, 2] = False, False
    hidden = np.where(mask[..., None], Z, np.nan)
    layer(hidden, training=True, mask=mask)
    (loss,) = layer.losses
    clean = LookupFreeQuantizer(BITS, temperature=1.0)
    clean(Z[mask], training=True)
    np.testing.assert_allclose(float(loss), float(clean.losses[0]), rtol=1e-5)
    np.testing.assert_array_equal(
        value(layer.batch_counts), value(clean.batch_counts)
    )
    layer(Z, mask=np.zeros(Z.shape[:-1], bool))
    assert float(layer.losses[0]) == 0


def autoencoder(quantizer, **options):
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential([keras.Input((6,)), keras.layers.Dense(BITS)])
    decoder = keras.Sequential([keras.Input((BITS,)), keras.layers.Dense(6)])
    model = VQVAE(encoder, quantizer, decoder)
    options = {"jit_compile": ON_JAX, **options}
    model.compile(keras.optimizers.Adam(0.02), **options)
    return model


def test_the_entropy_term_balances_the_bits():
    x = RNG.normal(size=(256, BITS)).astype("f4") + 1.5
    shares = []
    for diversity in (0.0, 2.0):
        layer = LookupFreeQuantizer(BITS, 1.0, diversity, temperature=1.0)
        model = keras.Sequential(
            [
                keras.Input((BITS,)),
                keras.layers.Dense(BITS, kernel_initializer="identity"),
                layer,
            ]
        )
        model.compile(keras.optimizers.Adam(0.05), jit_compile=ON_JAX)
        model.fit(np.tile(x, (60, 1)), batch_size=256, verbose=0)
        counts = value(layer.stacked_counts("batch_counts"))
        shares.append(counts[:, 1] / counts.sum(1))
    assert shares[0].min() > 0.9  # decided, but all alike
    np.testing.assert_allclose(shares[1], 0.5, atol=0.15)


@slow_on_jax
def test_groups_of_bits_in_half_precision():
    layer = GroupedQuantizer(LookupFreeQuantizer(2, spherical=True), 2)
    model = autoencoder(layer)
    x = RNG.normal(size=(16, 6)).astype("f4")
    model.fit(x, verbose=0)
    assert model.encode(x).shape == (16, 2)
    half = LookupFreeQuantizer(BITS, dtype="mixed_float16")
    output, codes = half(ops.cast(Z, "float16"), return_codes=True)
    assert keras.backend.standardize_dtype(output.dtype) == "float16"
    np.testing.assert_array_equal(
        value(codes), value(LookupFreeQuantizer(BITS).encode(Z))
    )


@pytest.mark.verify
def test_two_replicas_are_one():
    x = (RNG.normal(size=(8, 6)) + 0.5).astype("f4")

    def fit():
        model = autoencoder(
            LookupFreeQuantizer(BITS, temperature=1.0), run_eagerly=False
        )
        return model.fit(x, epochs=3, batch_size=8, verbose=0).history, model

    expected, one = fit()
    if ON_JAX:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        found, two = fit()
    else:
        with toy.mirrored().scope():
            found, two = fit()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4)
    for ours, theirs in zip(two.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bad_arguments():
    for args, kwargs, message in (
        ([0], {}, "num_bits=0"),
        ([4.0], {}, "num_bits=4.0"),
        ([4, -1], {}, "entropy_cost=-1"),
        ([4], {"diversity": np.inf}, "diversity=inf"),
        ([4], {"commitment_cost": "1"}, "commitment_cost='1'"),
        ([4], {"temperature": 0}, "temperature=0"),
        ([4], {"spherical": 1}, "spherical=1"),
    ):
        with pytest.raises(ValueError, match=message):
            LookupFreeQuantizer(*args, **kwargs)
    with pytest.raises(ValueError, match=r"one component for each bit"):
        LookupFreeQuantizer(4)(np.zeros((2, 3)))
