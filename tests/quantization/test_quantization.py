"""Quantizers against NumPy, closed forms and finite differences (post 6760)."""

import keras
import numpy as np
import pytest
import toy
from keras import ops
from kit import close_in_ulps, nearest_rows, slow_on_jax, slow_on_tensorflow

from blogkeras import backend
from blogkeras.quantization import (
    CodebookUsage,
    FiniteScalarQuantizer,
    ResidualVectorQuantizer,
    VectorQuantizer,
    perplexity,
    usage,
)

RNG = np.random.default_rng(0)
DIM, CODES = 4, 8
Z = RNG.normal(size=(5, 3, 2, DIM)).astype("float32")
E = RNG.normal(size=(CODES, DIM)).astype("float32")
ON_JAX = keras.backend.backend() == "jax"


def numpy(x):
    return keras.tree.map_structure(ops.convert_to_numpy, x)


def quantizer(embeddings=E, **kwargs):
    layer = VectorQuantizer(len(embeddings), **kwargs)
    layer.build((None, embeddings.shape[1]))
    layer.embeddings.assign(embeddings)
    return layer


def run(layer, z, embeddings=None, **kwargs):
    """`(quantized, codes, loss)`, pure: nothing is assigned."""
    mapping = [] if embeddings is None else [(layer.embeddings, embeddings)]
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        quantized, codes = layer(z, return_codes=True, **kwargs)
    return quantized, codes, sum(scope.losses)


# Quantizing, gradients.


@slow_on_jax
def test_the_output_is_the_code_and_the_loss_is_the_formula():
    layer = quantizer(codebook_cost=0.7, commitment_cost=0.3)
    quantized, codes, loss = numpy(run(layer, Z))
    expected = E[nearest_rows(Z, E)]
    np.testing.assert_array_equal(codes, nearest_rows(Z, E))
    np.testing.assert_array_equal(quantized, expected)
    np.testing.assert_allclose(loss, np.mean((Z - expected) ** 2), rtol=1e-6)
    np.testing.assert_array_equal(numpy(layer.encode(Z)), codes)
    np.testing.assert_array_equal(numpy(layer.decode(codes)), expected)
    far, codes = numpy(run(layer, 1e5 * Z))[:2]  # to the bit, however far
    np.testing.assert_array_equal(far, E[codes])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_gradient_of_the_output_is_exactly_the_identity(decay):
    weight = ops.convert_to_tensor(RNG.normal(size=Z.shape), "float32")

    def output(args):
        quantized, _, _ = run(quantizer(ema_decay=decay), *args)
        return ops.sum(weight * quantized), None

    layer_z, layer_e = backend.value_and_grad(output, (Z, E))[1]
    np.testing.assert_array_equal(numpy(layer_z), numpy(weight))
    np.testing.assert_array_equal(numpy(layer_e), 0)


def losses_gradient(layer):
    return numpy(
        backend.value_and_grad(lambda a: (run(layer, *a)[2], None), (Z, E))[1]
    )


def test_each_term_of_the_loss_moves_one_side_only():
    dz, de = losses_gradient(quantizer(commitment_cost=0.0))
    np.testing.assert_array_equal(dz, 0)
    assert np.abs(de).max() > 1e-3
    dz, de = losses_gradient(quantizer(codebook_cost=0.0))
    np.testing.assert_array_equal(de, 0)
    assert np.abs(dz).max() > 1e-3


@slow_on_jax
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_gradients_of_the_loss_by_finite_differences(metric):
    def norm(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    layer = quantizer(codebook_cost=0.7, commitment_cost=0.3, metric=metric)
    norm = norm if metric == "cosine" else lambda x: x
    k = nearest_rows(norm(Z), norm(E))
    gradients = losses_gradient(layer)
    z0, e0 = Z.astype("f8"), E.astype("f8")

    def value(z, e):  # the stopped halves stand still
        return 0.7 * np.mean((norm(z0) - norm(e)[k]) ** 2) + 0.3 * np.mean(
            (norm(z) - norm(e0)[k]) ** 2
        )

    for which, gradient in enumerate(gradients):
        for index in [(0,) * gradient.ndim, (1,) * gradient.ndim]:
            ends = []
            for sign in (1, -1):
                point = [z0.copy(), e0.copy()]
                point[which][index] += sign * 1e-5
                ends.append(value(*point))
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(gradient[index], slope, atol=1e-6)


def test_the_gradient_of_the_codebook_is_dense_for_the_optimizer():
    # Keras's Adam squares the slices of a sparse gradient one by one.
    layer = quantizer(commitment_cost=0.0)
    model = keras.Sequential([keras.Input((DIM,)), layer])
    model.compile(keras.optimizers.Adam(0.1), loss=None, jit_compile=ON_JAX)
    z = np.repeat(Z.reshape(-1, DIM)[:6], 5, axis=0)
    k, m, v, e = nearest_rows(z, E), 0, 0, E.astype("f8")
    for step in range(1, 4):
        model.train_on_batch(z, np.zeros(len(z)))
        k = nearest_rows(z, e)
        g = np.zeros_like(e)
        np.add.at(g, k, 2 * (e[k] - z) / z.size)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = 0.1 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        e = e - rate * m / (np.sqrt(v) + 1e-7)  # as Keras writes Adam
    np.testing.assert_allclose(numpy(layer.embeddings), e, atol=2e-5)


def test_cosine_compares_directions():
    layer = quantizer(metric="cosine", commitment_cost=0.25)
    z, e = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (Z, E))
    quantized, codes, loss = numpy(run(layer, Z))
    np.testing.assert_array_equal(codes, nearest_rows(z, e))
    np.testing.assert_allclose(quantized, e[codes], atol=1e-6)
    np.testing.assert_allclose(
        loss, 1.25 * np.mean((z - e[codes]) ** 2), rtol=1e-5
    )
    np.testing.assert_array_equal(numpy(layer.encode(7 * Z)), codes)
    assert np.isfinite(numpy(run(layer, 0 * Z)[0])).all()


def test_other_choices_are_methods_of_a_subclass():
    class Second(VectorQuantizer):
        """The second nearest code; gradients of 2 z, cut off (post 11328)."""

        def assign(self, z, codebook):
            d = ops.sum(ops.square(z[:, None] - codebook), axis=-1)
            return ops.argsort(d, axis=-1)[:, 1]

        def estimate_gradient(self, quantized, z):
            return super().estimate_gradient(quantized, 2 * z)

    layer = Second(CODES)
    layer.build((None, DIM))
    layer.embeddings.assign(E)
    second = ((Z[..., None, :] - E) ** 2).sum(-1).argsort(-1)[..., 1]
    quantized, codes, _ = numpy(run(layer, Z))
    np.testing.assert_array_equal(codes, second)
    np.testing.assert_array_equal(quantized, E[second])
    gradient = backend.value_and_grad(
        lambda z: (ops.sum(run(layer, z)[0]), None), Z
    )[1]
    np.testing.assert_array_equal(numpy(gradient), 2)


# The moving average. Sonnet's algorithm, recomputed in float64.


class SonnetEMA:
    """`VectorQuantizerEMA` of Sonnet 2, from its published description."""

    def __init__(self, embeddings, decay, cost=0.25, epsilon=1e-5):
        self.e, self.decay = embeddings.astype("f8"), decay
        self.cost, self.epsilon = cost, epsilon
        self.counts, self.sums, self.steps = 0, 0, 0

    def __call__(self, z):
        z, size = z.astype("f8").reshape(-1, self.e.shape[1]), len(self.e)
        k = nearest_rows(z, self.e)
        hot = np.eye(size)[k]
        loss = self.cost * np.mean((z - self.e[k]) ** 2)
        p = hot.mean(0)
        found = k, loss, np.exp(-(p * np.log(p + 1e-10)).sum())
        self.steps += 1
        new = 1 - self.decay
        self.counts = (1 - new) * self.counts + new * hot.sum(0)
        self.sums = (1 - new) * self.sums + new * hot.T @ z
        debias = 1 - self.decay**self.steps
        n, s = self.counts / debias, self.sums / debias
        smooth = n + self.epsilon
        smooth = smooth / (n.sum() + size * self.epsilon) * n.sum()
        self.e = s / smooth[:, None]
        return found


@slow_on_jax
def test_the_moving_average_is_sonnets():
    decay, steps = 0.95, 100
    layer, oracle = quantizer(ema_decay=decay), SonnetEMA(E, decay)
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(6, DIM))
    for _ in range(steps):
        picks = rng.integers(0, 6, (2, 10))
        z = (centers[picks] + 0.3 * rng.normal(size=(2, 10, DIM))).astype("f4")
        codes, loss, expected = oracle(z)
        _, ours = layer(z, training=True, return_codes=True)
        np.testing.assert_array_equal(numpy(ours).ravel(), codes)
        np.testing.assert_allclose(float(layer.losses[0]), loss, rtol=1e-6)
        np.testing.assert_allclose(
            float(perplexity(layer.batch_counts)), expected, rtol=1e-6
        )
    np.testing.assert_allclose(numpy(layer.embeddings), oracle.e, atol=1e-5)
    assert not layer.trainable_variables


def test_without_training_nothing_moves():
    layer = quantizer(ema_decay=0.9, restart_threshold=0.5)
    before = [numpy(w) for w in layer.weights]
    layer(Z)
    layer.encode(Z)
    for old, new in zip(before, layer.weights, strict=True):
        np.testing.assert_array_equal(old, numpy(new))


def test_an_averaged_cosine_codebook_is_of_unit_vectors():
    layer = quantizer(ema_decay=0.5, metric="cosine")
    unit = E / np.linalg.norm(E, axis=-1, keepdims=True)
    z = Z / np.linalg.norm(Z, axis=-1, keepdims=True)
    k = nearest_rows(z, unit)
    layer(Z, training=True)
    for code in range(CODES):
        mean = z[k == code].sum(0) if (k == code).any() else unit[code]
        np.testing.assert_allclose(
            numpy(layer.embeddings)[code],
            mean / np.linalg.norm(mean),
            atol=1e-5,
        )


# Masks and bad values.


@slow_on_jax
@pytest.mark.parametrize("decay", [None, 0.9])
def test_masked_vectors_have_no_say(decay):
    mask = np.ones(Z.shape[:-1], bool)
    mask[0, 1], mask[3:] = False, False
    changed = np.where(mask[..., None], Z, 50).astype("float32")
    layers = []
    for inputs, kwargs in (
        (Z[mask], {}),
        (Z, {"mask": mask}),
        (changed, {"mask": mask}),
    ):
        layer = quantizer(
            ema_decay=decay, restart_threshold=(decay and 0.3) or 0
        )
        layer(inputs, training=True, **kwargs)
        layers.append((layer, float(layer.losses[0])))
    for layer, loss in layers[1:]:
        np.testing.assert_allclose(loss, layers[0][1], rtol=1e-6)
        for ours, theirs in zip(
            layer.weights, layers[0][0].weights, strict=True
        ):
            np.testing.assert_allclose(numpy(ours), numpy(theirs), atol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nan_under_the_mask_has_no_gradient(metric):
    mask = np.ones(Z.shape[:-1], bool)
    mask[0, 1], mask[3:] = False, False
    z = np.where(mask[..., None], Z, np.nan).astype("float32")
    layer = quantizer(metric=metric)

    def gradients(z, **kwargs):
        def loss(args):
            return run(layer, *args, **kwargs)[2], None

        return numpy(backend.value_and_grad(loss, (z, E))[1])

    dz, de = gradients(z, mask=mask)
    expected_dz, expected_de = gradients(Z[mask])
    np.testing.assert_array_equal(dz[~mask], 0)
    np.testing.assert_allclose(dz[mask], expected_dz, atol=1e-7)
    np.testing.assert_allclose(de, expected_de, atol=1e-7)
    with pytest.raises(ValueError, match=r"mask.shape=\(5, 3, 2, 1\)"):
        layer(Z, mask=mask[..., None])


@slow_on_jax
def test_a_mask_of_sequences_arrives_by_itself():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    layer = VectorQuantizer(CODES, ema_decay=0.9)
    embedded = keras.layers.Embedding(5, DIM, mask_zero=True)(tokens)
    layer(embedded, training=True)
    assert float(ops.sum(layer.batch_counts)) == 3


def test_nothing_unmasked_leaves_the_codebook():
    layer = quantizer(ema_decay=0.9, restart_threshold=0.5)
    layer(Z, training=True)
    before = {w.name: numpy(w) for w in layer.weights}
    out = layer(Z, training=True, mask=np.zeros(Z.shape[:-1], bool))
    assert np.isfinite(numpy(out)).all()
    assert float(layer.losses[0]) == 0
    for weight in layer.weights:
        if weight.name != "batch_counts":
            np.testing.assert_array_equal(numpy(weight), before[weight.name])
    assert float(ops.sum(layer.batch_counts)) == 0


@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
def test_in_a_compiled_step_nan_stays_out_of_the_codebook():
    bad = Z.copy()
    bad[0, 0, 0, 0], bad[1, 0, 0, 1] = np.nan, np.inf
    clean = np.isfinite(bad).all(-1)
    layer = quantizer(ema_decay=0.9)
    model = keras.Sequential([keras.Input(Z.shape[1:]), layer])
    model.compile("sgd", "mse", jit_compile=True)
    model.fit(bad, bad, verbose=0, batch_size=len(Z))
    expected = quantizer(ema_decay=0.9)
    expected(Z, training=True, mask=clean)
    np.testing.assert_allclose(
        numpy(layer.embeddings), numpy(expected.embeddings), atol=1e-6
    )
    assert float(ops.sum(layer.total_counts)) == clean.sum()
    out = model.predict(bad, verbose=0)
    assert np.isfinite(out[clean]).all()
    assert np.isnan(out[0, 0, 0, 0])


# Against collapse.


def test_dead_codes_go_to_vectors_of_the_batch():
    embeddings = np.full((CODES, DIM), 100, "float32")
    embeddings[:2] = E[:2]
    layer = quantizer(embeddings, ema_decay=0.9, restart_threshold=0.2)
    layer(Z, training=True)
    found, flat = numpy(layer.embeddings), Z.reshape(-1, DIM)
    k = nearest_rows(flat, embeddings)
    for code in range(2):  # alive: the mean of its vectors
        mean = flat[k == code].mean(0)
        np.testing.assert_allclose(found[code], mean, atol=1e-3)
    near = ((found[2:, None] - flat) ** 2).sum(-1)
    np.testing.assert_array_equal(near.min(-1), 0)
    assert len(set(near.argmin(-1))) == CODES - 2, "twice the same vector"
    # They start with the threshold's share of the 30 vectors, in the average.
    share = 0.2 * len(flat) / CODES * (1 - 0.9)
    np.testing.assert_allclose(numpy(layer.ema_counts)[2:], share, rtol=1e-5)
    np.testing.assert_allclose(
        numpy(layer.ema_sums)[2:], share * found[2:], rtol=1e-5
    )


@slow_on_jax
def test_restarts_prevent_the_collapse():
    rng = np.random.default_rng(2)
    shares = {}
    for threshold in (0.0, 0.1):
        layer = VectorQuantizer(128, ema_decay=0.9, restart_threshold=threshold)
        for _ in range(15):
            z = 2 + rng.normal(size=(512, DIM)).astype("float32")
            layer(z, training=True)
        layer.reset_counts()
        layer(z, training=True)
        shares[threshold] = float(usage(layer.total_counts))
    assert shares[0.0] < 0.3
    assert shares[0.1] >= 0.9


@slow_on_jax
@pytest.mark.parametrize("decay", [None, 0.99])
def test_adapt_is_k_means(decay):
    rng = np.random.default_rng(3)
    z = rng.normal(size=(60, DIM)).astype("float32")
    means = z[np.random.default_rng(7).permutation(60)[:CODES]].astype("f8")
    for _ in range(4):
        labels = nearest_rows(z, means)
        means = np.stack([z[labels == j].mean(0) for j in range(CODES)])
    layer = VectorQuantizer(CODES, ema_decay=decay)
    layer.adapt(z.reshape(6, 10, DIM), iterations=4, seed=7)
    np.testing.assert_allclose(numpy(layer.embeddings), means, atol=1e-5)
    if decay is None:
        return
    # The clusters are the first step of the moving average, a batch the second;
    # a code that has no vectors there stays where it is.
    labels = nearest_rows(z, means)
    chosen = (labels > 0) & (np.arange(60) % 2 == 0)
    layer(z[chosen], training=True)
    for j in range(CODES):
        size, new = decay * np.sum(labels == j), z[chosen & (labels == j)]
        means[j] = (size * means[j] + new.sum(0)) / (size + len(new))
    np.testing.assert_allclose(numpy(layer.embeddings), means, atol=1e-4)


def test_an_empty_cluster_goes_to_the_farthest_vector():
    z = np.zeros((5, 2), "float32")
    z[2] = 9
    layer = VectorQuantizer(2)
    layer.adapt(z, iterations=2, seed=1)  # seed 1 draws two equal vectors
    drawn = np.random.default_rng(1).permutation(5)[:2]
    assert 2 not in drawn
    np.testing.assert_allclose(
        sorted(numpy(layer.embeddings).tolist()), [[0, 0], [9, 9]]
    )


def test_adapt_to_fewer_vectors_than_codes_says_so():
    layer = quantizer(ema_decay=0.9)
    with pytest.warns(UserWarning, match="k-means of 3 vectors fills 3 of 8"):
        layer.adapt(10 + Z.reshape(-1, DIM)[:3])
    found = numpy(layer.embeddings)
    np.testing.assert_allclose(
        np.sort(found[:3], 0), np.sort(10 + Z.reshape(-1, DIM)[:3], 0)
    )
    np.testing.assert_array_equal(found[3:], E[3:])
    layer(10 + Z, training=True)
    assert np.isfinite(numpy(layer.embeddings)).all()


# Counts.


@slow_on_jax
def test_counts_and_their_measures():
    layer = quantizer()
    k = nearest_rows(Z, E)
    counts = np.bincount(k.ravel(), minlength=CODES)
    layer(Z, training=True)
    layer(Z[:2], training=True)
    first = np.bincount(k[:2].ravel(), minlength=CODES)
    np.testing.assert_array_equal(numpy(layer.batch_counts), first)
    np.testing.assert_array_equal(numpy(layer.total_counts), counts + first)
    layer.reset_counts()
    assert float(ops.sum(layer.total_counts)) == 0
    # Closed forms: equal shares of m codes have perplexity m.
    np.testing.assert_allclose(
        float(perplexity(np.array([3, 3, 3, 0]))), 3, rtol=1e-6
    )
    assert float(usage(np.array([3, 3, 3, 0]))) == 0.75
    assert float(perplexity(np.zeros(4))) == 1
    many = np.array([[3, 3, 3, 0], [0.1, 0, 0, 0.1], [0, 0, 0, 0]])
    np.testing.assert_allclose(numpy(perplexity(many)), [3, 2, 1], rtol=1e-6)
    np.testing.assert_array_equal(numpy(usage(many)), [0.75, 0.5, 0])


def test_the_callback_reports_the_epoch():
    inputs = keras.Input(Z.shape[1:])
    first = quantizer(name="first")
    second = ResidualVectorQuantizer(2, CODES, ema_decay=0.9, name="second")
    model = keras.Model(inputs, second(first(inputs)))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=ON_JAX)
    history = model.fit(
        Z, Z, epochs=2, batch_size=5, verbose=0, callbacks=[CodebookUsage()]
    ).history
    counts = np.bincount(nearest_rows(Z, E).ravel(), minlength=CODES)
    p = counts[counts > 0] / counts.sum()
    expected = np.exp(-(p * np.log(p)).sum())
    np.testing.assert_allclose(history["first_perplexity"], expected, rtol=1e-5)
    np.testing.assert_allclose(history["first_usage"], np.mean(counts > 0))
    of_stages = np.mean([numpy(usage(s.total_counts)) for s in second.stages])
    np.testing.assert_allclose(history["second_usage"][-1], of_stages)
    assert not any("stage" in key for key in history)


# Precision, replicas, resuming.


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_quantizes_in_float32(policy):
    layer = VectorQuantizer(CODES, ema_decay=0.9, dtype=policy)
    layer.build(Z.shape)
    layer.embeddings.assign(200 * E)
    big = 200 * Z  # squares overflow float16; float32 inputs stay float32
    quantized, codes = layer(big, return_codes=True, training=True)
    np.testing.assert_array_equal(numpy(codes), nearest_rows(big, 200 * E))
    dtype = keras.backend.standardize_dtype
    assert dtype(quantized.dtype) == layer.compute_dtype
    assert dtype(layer.losses[0].dtype) == "float32"
    assert np.isfinite(float(layer.losses[0]))
    assert all(w.dtype == "float32" for w in layer.weights)
    single = quantizer(200 * E, ema_decay=0.9)
    single(big, training=True)
    close_in_ulps(layer.embeddings, single.embeddings)


def small_model():
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input(Z.shape[1:]),
            keras.layers.Dense(DIM),
            VectorQuantizer(CODES, ema_decay=0.8, restart_threshold=0.5),
            keras.layers.Dense(DIM),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=ON_JAX)
    return model


def test_two_replicas_are_one():
    x = RNG.normal(size=(8, *Z.shape[1:])).astype("float32")
    one = small_model()
    one.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
    if ON_JAX:
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        two = small_model()
    else:
        with toy.mirrored().scope():
            two = small_model()
    two.fit(x, x, batch_size=8, epochs=3, shuffle=False, verbose=0)
    moved = np.abs(two.get_weights()[3] - small_model().get_weights()[3]).max()
    assert moved > 0.01
    for ours, theirs in zip(two.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@slow_on_tensorflow
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole, part = small_model(), small_model()
    for _ in range(4):
        whole.train_on_batch(Z, Z)
    for _ in range(2):
        part.train_on_batch(Z, Z)
    part.save(tmp_path / "part.keras")
    part = keras.saving.load_model(tmp_path / "part.keras")
    for _ in range(2):
        part.train_on_batch(Z, Z)
    assert part.layers[1].ema_steps.value == 4
    for ours, theirs in zip(
        part.get_weights(), whole.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


# Bad input.


@pytest.mark.parametrize(
    ("cls", "args", "kwargs", "message"),
    [
        (VectorQuantizer, [1], {}, "at least 2.*num_codes=1"),
        (VectorQuantizer, [8, -1.0], {}, "codebook_cost=-1"),
        (VectorQuantizer, [8], {"commitment_cost": -1}, "commitment_cost=-1"),
        (VectorQuantizer, [8, np.inf], {}, "codebook_cost=inf"),
        (VectorQuantizer, [8, True], {}, "codebook_cost=True"),
        (VectorQuantizer, [8], {"commitment_cost": "1"}, "cost='1'"),
        (VectorQuantizer, [8], {"commitment_cost": np.nan}, "cost=nan"),
        (VectorQuantizer, [8.0], {}, "num_codes=8.0"),
        (VectorQuantizer, [True], {}, "num_codes=True"),
        (VectorQuantizer, ["8"], {}, "num_codes='8'"),
        (VectorQuantizer, [8], {"ema_decay": 1.0}, "ema_decay=1.0"),
        (VectorQuantizer, [8], {"ema_decay": True}, "ema_decay=True"),
        (VectorQuantizer, [8], {"metric": None}, "metric=None"),
        (VectorQuantizer, [8], {"metric": "dot"}, "metric='dot'"),
        (VectorQuantizer, [8], {"restart_threshold": 0.1}, "set `ema_decay`"),
        (
            VectorQuantizer,
            [8],
            {"restart_threshold": 2, "ema_decay": 0.9},
            "restart_threshold=2",
        ),
        (FiniteScalarQuantizer, [[2, 4]], {}, "at least 3"),
        (FiniteScalarQuantizer, [[1], "sigmoid"], {}, "at least 2"),
        (FiniteScalarQuantizer, [[3], "relu"], {}, "activation='relu'"),
        (FiniteScalarQuantizer, [[3.0, 4]], {}, "levels=.3.0, 4."),
        (FiniteScalarQuantizer, [["3"]], {}, "levels="),
        (FiniteScalarQuantizer, [None], {}, "levels=None"),
        (FiniteScalarQuantizer, [[[3, 3]]], {}, "levels="),
        (ResidualVectorQuantizer, [0, 8], {}, "num_quantizers=0"),
        (ResidualVectorQuantizer, [True, 8], {}, "num_quantizers=True"),
        (ResidualVectorQuantizer, [2, 8, np.inf], {}, "codebook_cost=inf"),
    ],
)
def test_bad_arguments(cls, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(*args, **kwargs)


def test_bad_inputs():
    layer = quantizer()
    with pytest.raises(ValueError, match="Expected finite vectors"):
        layer(np.full((1, DIM), np.nan, "float32"))
    with pytest.raises(ValueError, match="Expected finite vectors"):
        layer.encode(np.full((1, DIM), np.inf, "float32"))
    with pytest.raises(ValueError, match=f"axis -1.*value {DIM}"):
        layer(np.zeros((1, DIM + 1), "float32"))
    with pytest.raises(ValueError, match=f"size {DIM} along the last axis"):
        layer.encode(np.zeros((1, DIM + 1), "float32"))
    with pytest.raises(
        ValueError, match=r"at least 0 and at most 7.*from -1 to 8"
    ):
        layer.decode(np.array([-1, 8]))
    with pytest.raises(ValueError, match=r"integers in `codes`.*float32"):
        layer.decode(np.zeros(2, "float32"))
    with pytest.raises(ValueError, match="no codebook yet"):
        VectorQuantizer(4).decode(np.zeros(2, "int32"))
    with pytest.raises(ValueError, match="known size of the last axis"):
        VectorQuantizer(4).build((None, None))
    with pytest.raises(ValueError, match="at least one vector"):
        layer.adapt(np.zeros((0, DIM), "float32"))
    with pytest.raises(ValueError, match="one component for each"):
        FiniteScalarQuantizer([3, 3]).build((None, 3))
    residual = ResidualVectorQuantizer(2, 4)
    residual.build((None, DIM))
    with pytest.raises(ValueError, match="at most 2"):
        residual.decode(np.zeros((1, 3), "int32"))
