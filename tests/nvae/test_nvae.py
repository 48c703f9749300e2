"""NVAE: the model, its training and its verbs (post 7574)."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from keras import ops
from kit import (
    TENSORFLOW,
    jax_only,
    lower_train_step,
    replicated,
    slow_on_jax,
    tensorflow_only,
    value,
)

from blogkeras import NVAE, NVAEConfig, backend
from blogkeras.nvae.presets import PRESETS
from blogkeras.state import StepSeed, stream_seed

TINY = NVAEConfig(
    (4, 4, 1),
    groups=(1, 1),
    channels=4,
    latent_channels=2,
    cells_per_block=1,
    cells_per_group=1,
    likelihood="bernoulli",
    kl_warmup_steps=10,
    spectral_start=0.1,
)
RNG = np.random.default_rng(0)
X = (RNG.random((16, 4, 4, 1)) < RNG.random((16, 1, 1, 1))).astype("float32")
# XLA compiles convolutions slowly on a CPU, and JAX has nothing else.
STEP = {"jit_compile": False} if TENSORFLOW else {"jit_compile": True}
# A model that makes a step or two is faster without a program of its own.
EAGER = {"run_eagerly": True}
# The fields of a model that compiles fast.
SMALL = {
    "groups": (1,),
    "channels": 2,
    "squeeze_excite": False,
    "spectral_weight": 0.0,
    "spectral_start": None,
}


def make(optimizer="adamax", seed=1, recompute=False, step=EAGER, **changes):
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(TINY, **changes)
    model = NVAE(config, recompute, seed, name="nvae")
    model.compile(optimizer, **step)
    return model


def fit(model, x=X, **kwargs):
    kwargs = {"batch_size": 8, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, **kwargs)


def weights(model):
    return [value(w) for w in model.weights]


def check_built(model):
    """As many parameters as counted; a penalty on every convolution."""
    count = sum(math.prod(w.shape) for w in model.trainable_variables)
    assert count == model.config.count_parameters()
    kernels = [w for w in model.trainable_variables if w.name == "direction"]
    penalized = [la for stack in model.penalty.stacks for la in stack]
    assert {id(la.direction) for la in penalized} == set(map(id, kernels))
    assert len(penalized) == len(kernels)
    gammas = [w for w in model.trainable_variables if w.name == "gamma"]
    assert {id(norm.gamma) for norm in model.norms} == set(map(id, gammas))


def test_built_as_counted():
    model = NVAE.from_preset("mnist_small")
    model.build()
    check_built(model)
    # Of the published modules: convolutions, their shapes, batch norms.
    assert len(model.convolutions) == 74
    assert len(model.penalty.stacks) == 35
    assert len(model.norms) == 50


@pytest.mark.verify
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"celeba_hq_256"}))
def test_large_presets_are_built_as_counted(name):
    model = NVAE.from_preset(name)
    model.build((None, *model.config.input_shape))
    check_built(model)
    if name == "mnist":
        assert len(model.convolutions) == 255
        assert len(model.norms) == 214


def test_flows_and_mixtures_are_built_as_counted():
    config = NVAEConfig(
        (8, 8, 3), groups=(1, 2), channels=6, num_flows=2, squeeze_excite=False
    )
    model = NVAE(config)
    model.build()
    check_built(model)


def test_a_preset_of_other_pictures():
    """Padded where height and width are the preset's, else as one says."""
    model = NVAE.from_preset("digits", (4, 8, 3), dtype="mixed_bfloat16")
    assert model.dtype_policy.name == "mixed_bfloat16"
    model.build()
    check_built(model)
    assert model.config.latent_shapes == ((1, 2, 4), (2, 4, 4), (2, 4, 4))
    for shape, changes, padding in (
        ((28, 28, 3), {}, 2),
        ((32, 32, 1), {}, 0),
        ((30, 30, 1), {"padding": 1}, 1),
    ):
        config = NVAE.from_preset("mnist_small", shape, **changes).config
        assert config.input_shape == shape
        assert config.padding == padding
        assert config.channels == 8


@pytest.fixture(scope="module")
def trained():
    # Plain gradients: few operations to trace and compile.
    model = make(
        keras.optimizers.SGD(1e-2),
        kl_warmup_steps=0,
        spectral_start=None,
        step=STEP,
    )
    fit(model, epochs=2)
    return model


@pytest.fixture
def eager(trained):
    """The trained model without programs for its verbs, on TensorFlow."""
    trained.run_eagerly = TENSORFLOW
    yield trained
    trained.run_eagerly = False
    trained._programs.clear()


@slow_on_jax
def test_training_moves_everything(trained):
    fresh = make(kl_warmup_steps=0, spectral_start=None)
    same = [
        w.path
        for w, before in zip(trained.weights, fresh.weights, strict=True)
        if (value(w) == value(before)).all()
    ]
    # The right singular vector of a single filter is 1 or −1.
    assert [p for p in same if not p.endswith("x1")] == ["nvae/draw_seed"]
    assert all(np.isfinite(w).all() for w in weights(trained))
    assert int(trained.draws.iterations) == 4


@slow_on_jax
def test_the_loss_is_its_parts():
    """Of one step without training: −log p, KL, penalties by SVD."""
    model = make(keras.optimizers.SGD(0.0))
    # β after four steps of ten; λ by it.
    beta = 0.4
    for _ in range(8):
        model.penalty()
    sigma = sum(
        np.linalg.svd(value(layer.matrix()), compute_uv=False)[0]
        for layer in model.convolutions
    )
    gamma = sum(abs(value(norm.gamma)).max() for norm in model.norms)
    weight = 0.1 ** (1 - beta) * 0.01**beta
    # The step's own draws again, with the batch's own statistics.
    model.draws.iterations.assign(4)
    outputs = model(X[:8], training=True)
    kl = value(outputs["kl"])
    size = abs(kl).mean(0) + 0.01
    size /= [1, 4]
    balance = size / size.mean()
    expected = (
        -value(outputs["log_likelihood"]).mean()
        + beta * (kl @ balance).mean()
        + weight * (sigma + gamma)
    )
    model.draws.iterations.assign(4)
    logs = model.train_on_batch(X[:8], return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=1e-3)
    assert logs["nelbo"] == pytest.approx(
        logs["reconstruction"] + logs["kl"], rel=1e-5
    )
    # In evaluation the loss is −ELBO.
    logs = model.evaluate(X, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(logs["nelbo"], rel=1e-5)


@slow_on_jax
def test_resumed_is_uninterrupted(tmp_path):
    model = make()
    fit(model, X[:8])
    model.save(tmp_path / "model.keras")
    fit(model, X[8:])
    expected = weights(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.config == model.config
    # Keras does not save how a model is run.
    loaded.run_eagerly = model.run_eagerly
    fit(loaded, X[8:])
    assert int(loaded.draws.iterations) == 2
    for ours, theirs in zip(weights(loaded), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@slow_on_jax
def test_other_seeds_draw_otherwise():
    first, second, again = (
        value(make(seed=seed)(X[:4])["kl"]) for seed in (1, 2, 1)
    )
    np.testing.assert_allclose(first, again, rtol=1e-5)
    assert abs(first - second).max() > 1e-4


@pytest.mark.skipif(not TENSORFLOW, reason="JAX's arrays are global")
def test_two_replicas_are_one():
    def train(step=STEP):
        model = make(keras.optimizers.SGD(1e-3), step=step, groups=(1,))
        return model, fit(model).history

    one, expected = train(EAGER)
    two, history = replicated(train)
    assert all(norm.synchronized for norm in two.norms)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=2e-4)
    for w, before in zip(two.weights, one.weights, strict=True):
        np.testing.assert_allclose(
            value(w), value(before), rtol=2e-3, atol=1e-5, err_msg=w.path
        )


@slow_on_jax
@pytest.mark.parametrize(("step", "changes"), [(EAGER, {}), (STEP, SMALL)])
def test_recomputed_is_the_same(step, changes):
    """With the state of batch norms; a compiled step, too."""
    # With plain gradients: Adamax makes much of those that are almost 0.
    plain, recomputed = (
        make(keras.optimizers.SGD(0.1), recompute=recompute, step=s, **changes)
        for recompute, s in ((False, EAGER), (True, step))
    )
    for model in (plain, recomputed):
        model.train_on_batch(X[:8])
    for ours, theirs in zip(weights(recomputed), weights(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@slow_on_jax
def test_each_batch_that_is_evaluated_draws_anew():
    """By its pictures and the seed, not by how much was trained."""
    model = make(groups=(1,), binarize="dynamic")

    def found(*rows):
        return value(model(X[[*rows]] / 2)["log_likelihood"])

    first = found(0, 1)
    assert abs(first[0] - found(0, 2)[0]) > 1e-3
    model.draws.iterations.assign(7)
    np.testing.assert_array_equal(found(0, 1), first)
    model.draws.seed.assign(2)
    assert abs(found(0, 1) - first).max() > 1e-3


@slow_on_jax
def test_moving_averages_of_weights_are_swapped_in():
    """Keras's callback; the averages by a model that makes the same steps."""
    plain = make(keras.optimizers.SGD(0.1), **SMALL)
    steps = []
    for x in (X[:8], X[8:]):
        plain.train_on_batch(x)
        steps.append([value(w) for w in plain.trainable_variables])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.75)
    model = make(optimizer, **SMALL)
    fit(model, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])
    for w, first, second in zip(model.trainable_variables, *steps, strict=True):
        # Keras's average begins with the weights after the first step.
        average = 0.75 * first + 0.25 * second
        np.testing.assert_allclose(value(w), average, rtol=1e-4, atol=1e-6)


@tensorflow_only
def test_data_sets_of_unknown_sizes():
    import tensorflow as tf

    model = make(step=STEP, **SMALL)
    expected = [value(model(x)["kl"]) for x in (X[:8], X[8:])]

    def unknown(x):
        return (
            tf.data.Dataset.from_tensor_slices(x)
            .batch(8)
            .map(lambda x: tf.py_function(lambda x: x, [x], tf.float32))
        )

    data = unknown(X)
    assert data.element_spec.shape.rank is None
    found = model.predict(data, verbose=0)["kl"]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4)
    # As many numbers, in another order, in a batch that is not looked at.
    turned = unknown(X).concatenate(unknown(X.reshape(16, 2, 8, 1)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible"):
        model.predict(turned, verbose=0)


@slow_on_jax
def test_weights_of_pictures():
    """A picture of weight 0 counts in no metric."""
    model = make()
    weight = np.asarray([1.0, 0.0] * 8, "float32")
    logs = model.evaluate(X, sample_weight=weight, verbose=0, return_dict=True)
    outputs = model.predict(X, verbose=0)
    nelbo = outputs["kl"].sum(1) - outputs["log_likelihood"]
    assert logs["nelbo"] == pytest.approx(nelbo[::2].mean(), rel=1e-5)
    # Keras divides by the number of rows.
    assert logs["loss"] == pytest.approx(nelbo[::2].sum() / 16, rel=1e-5)


@slow_on_jax
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_norm": False, "squeeze_excite": False},
        {"residual_posterior": False, "kl_balance": None},
        {"spectral_weight": 0.1, "spectral_start": 1.0},
        {"binarize": "dynamic", "kl_warmup_steps": 0},
        {
            "likelihood": "logistic_mixture",
            "num_mixtures": 2,
            "num_bits": 5,
            "num_flows": 1,
        },
        {"likelihood": "normal", "input_shape": (3, 5, 2), "padding": 0},
        {"input_shape": (2, 2, 1), "padding": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_train(changes):
    if changes.get("input_shape") == (3, 5, 2):
        with pytest.raises(ValueError, match="divisible by 4"):
            make(**changes)
        changes = {**changes, "input_shape": (4, 8, 2)}
    model = make(**{"spectral_weight": 0.0, "spectral_start": None, **changes})
    shape = model.config.input_shape
    x = RNG.random((4, *shape)).astype("float32")
    if model.config.likelihood == "bernoulli" and not model.config.binarize:
        x = np.rint(x)
    logs = model.train_on_batch(x, return_dict=True)
    assert all(map(math.isfinite, logs.values())), logs
    assert all(np.isfinite(w).all() for w in weights(model))
    assert model.sample(3).shape == (3, *shape)


@slow_on_jax
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = make(binarize="dynamic")
    logs = model.train_on_batch(X[:4], return_dict=True)
    assert all(map(math.isfinite, logs.values()))
    assert {w.dtype for w in model.trainable_variables} == {"float32"}
    outputs = model(X[:4])
    assert {
        keras.backend.standardize_dtype(x.dtype) for x in outputs.values()
    } == {"float32"}


@slow_on_jax
def test_gradients_skip_is_the_halls():
    from blogkeras import SkipNonFinite

    model = make(SkipNonFinite(keras.optimizers.Adamax(1e-3)))
    model.encoder.stem.bias.assign([math.inf] * 4)
    before = [value(w) for w in model.trainable_variables]
    model.train_on_batch(X[:4])
    assert int(model.optimizer.skipped) == 1
    for w, old in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(value(w), old)
    # Statistics are of the forward pass, which has been made.
    for norm in model.norms:
        for w in (norm.moving_mean, norm.moving_variance):
            assert np.isfinite(value(w)).all()


@jax_only
def test_the_step_lowers_for_a_tpu():
    model = NVAE(dataclasses.replace(TINY, num_flows=1), seed=0)
    model.compile("adamax", jit_compile=True)
    assert "convolution" in lower_train_step(model, X[:4])


# Verbs


def test_samples(trained):
    x = trained.sample(5, seed=3, batch_size=4)
    assert x.shape == (5, 4, 4, 1)
    assert x.dtype == "float32"
    assert x.min() >= 0
    assert x.max() <= 1
    assert len(np.unique(x)) > 40
    np.testing.assert_array_equal(x, trained.sample(5, seed=3, batch_size=4))
    assert abs(x - trained.sample(5, seed=4, batch_size=4)).max() > 0
    # At temperature 0 there is one picture.
    modes = trained.sample(5, 0.0, seed=3, batch_size=4)
    np.testing.assert_allclose(modes, np.broadcast_to(modes[:1], modes.shape))
    np.testing.assert_array_equal(
        modes, trained.sample(5, 0, seed=9, batch_size=4)
    )
    binary = trained.sample(5, output="sample", batch_size=4)
    assert set(np.unique(binary)) == {0.0, 1.0}


@slow_on_jax
def test_codes_and_back(eager):
    codes = eager.encode(X, batch_size=8)
    shapes = eager.config.latent_shapes
    for name in ("z", "mean", "scale"):
        assert [x.shape[1:] for x in codes[name]] == list(shapes)
        assert all(len(x) == 16 for x in codes[name])
    # At temperature 0, without flows, each group takes its mean.
    for z, mean in zip(codes["z"], codes["mean"], strict=True):
        np.testing.assert_array_equal(z, mean)
    decoded = eager.decode(codes["z"], batch_size=8)
    np.testing.assert_allclose(
        decoded, eager.reconstruct(X, 0.0, batch_size=8), atol=1e-5
    )
    # A posterior that follows its own draws has other means.
    drawn = eager.encode(X, 1.0, seed=1, batch_size=8)
    np.testing.assert_allclose(drawn["mean"][0], codes["mean"][0], atol=1e-5)
    assert abs(drawn["mean"][1] - codes["mean"][1]).max() > 1e-5
    noise = (drawn["z"][0] - drawn["mean"][0]) / drawn["scale"][0]
    assert abs(noise.std() - 1) < 0.3
    # From the same noise at a quarter of the temperature, a quarter as far.
    cool = eager.encode(X, 0.25, seed=1, batch_size=8)
    np.testing.assert_allclose(
        cool["z"][0],
        drawn["mean"][0] + noise * drawn["scale"][0] / 4,
        atol=1e-5,
    )


@slow_on_jax
def test_groups_given_and_drawn(eager):
    z = eager.encode(X[:8], batch_size=8)["z"]
    some = eager.decode(z[:1], seed=1, batch_size=8)
    np.testing.assert_allclose(
        some, eager.decode([z[0], None], seed=1, batch_size=8)
    )
    assert abs(some - eager.decode(z[:1], seed=2, batch_size=8)).max() > 0
    # Nothing given is sampling.
    np.testing.assert_array_equal(
        eager.decode([], num=8, seed=1, batch_size=8),
        eager.sample(8, seed=1, batch_size=8),
    )


@slow_on_jax
def test_between_pictures(eager):
    x = eager.interpolate(X[:2], X[2:4], num=5)
    assert x.shape == (2, 5, 4, 4, 1)
    for ends, at in ((X[:2], 0), (X[2:4], -1)):
        expected = eager.reconstruct(ends, 0.0)
        np.testing.assert_allclose(x[:, at], expected, atol=1e-5)
    z1, z2 = (eager.encode(ends)["z"] for ends in (X[:2], X[2:4]))
    mixed = [0.75 * a + 0.25 * b for a, b in zip(z1, z2, strict=True)]
    np.testing.assert_allclose(
        x[:, 1], eager.decode(mixed, output="mean"), atol=1e-5
    )


@slow_on_jax
def test_likelihood_against_single_draws(eager):
    """Its bounds from the outputs of the decoder, one after another."""
    k = 3
    found = eager.evaluate_likelihood(
        X[:4], k, per_image=True, seed=5, batch_size=4
    )
    weights, elbo = [], []
    for i in range(k):
        seed = StepSeed(stream_seed(ops.convert_to_tensor(5), i + 1), 0)
        outputs = eager.decoder.draw(
            4,
            lambda shape, seed=seed: keras.random.normal(shape, seed=seed),
            features=eager.encoder(X[:4], training=False),
            training=False,
        )
        logits = value(outputs["parameters"], "float64")
        log_x = (X[:4] * logits - np.logaddexp(0, logits)).sum((1, 2, 3))
        ratio = value(outputs["log_prior"]) - value(outputs["log_posterior"])
        weights.append(log_x + ratio.sum(1))
        elbo.append(log_x - value(outputs["kl"]).sum(1))
    expected = np.logaddexp.reduce(weights) - math.log(k)
    np.testing.assert_allclose(found["iwae"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["elbo"], np.mean(elbo, 0), rtol=1e-4)
    np.testing.assert_allclose(
        found["iwae_bits_per_dim"], -expected / math.log(2) / 16, rtol=1e-4
    )
    means = eager.evaluate_likelihood(X[:4], k, seed=5, batch_size=4)
    for name, x in means.items():
        np.testing.assert_allclose(x, found[name].mean(0), rtol=1e-5)


@slow_on_jax
def test_padding_is_no_part_of_the_likelihood(monkeypatch):
    """The pixels in the middle of the head's outputs, and no others."""
    model = make(padding=2, groups=(1,))
    seen = []

    def spy(layer, keep):
        call = layer.call

        def spied(x, *args, **kwargs):
            y = call(x, *args, **kwargs)
            tensor = x if keep == "input" else y
            # JAX also traces the loop over further samples.
            if backend.is_concrete(tensor):
                seen.append(value(tensor, "float64"))
            return y

        monkeypatch.setattr(layer, "call", spied)

    spy(model.encoder, "input")
    spy(model.decoder.head, "output")
    found = model.evaluate_likelihood(X[:4], 1, per_image=True)
    around = [(0, 0), (2, 2), (2, 2), (0, 0)]
    np.testing.assert_array_equal(seen[0], np.pad(X[:4], around))
    logits = seen[1][:, 2:6, 2:6]
    assert seen[1].shape == (4, 8, 8, 1)
    log_x = (X[:4] * logits - np.logaddexp(0, logits)).sum((1, 2, 3))
    elbo = log_x - found["kl"].sum(-1)
    np.testing.assert_allclose(found["elbo"], elbo, rtol=1e-5)
    np.testing.assert_allclose(
        found["elbo_bits_per_dim"], -elbo / math.log(2) / 16, rtol=1e-5
    )


@slow_on_jax
def test_pictures_are_binarized_once_whatever_the_batch():
    """As NumPy draws them from the seed."""
    model = make(binarize="dynamic", groups=(1,))
    grey = np.random.default_rng(0).random((3, 4, 4, 1)).astype("float32")
    binary = (np.random.default_rng(5).random(grey.shape) < grey) * 1.0
    results = [
        model.evaluate_likelihood(x, 2, per_image=True, seed=5)
        for x in (grey, binary)
    ]
    for name, x in results[0].items():
        np.testing.assert_array_equal(x, results[1][name])
    codes = [
        model.encode(x, seed=5, batch_size=2)["z"][0] for x in (grey, binary)
    ]
    np.testing.assert_array_equal(*codes)


def test_binary_pictures_have_the_frequencies_of_the_grey_ones():
    model = NVAE(dataclasses.replace(TINY, binarize="dynamic"))
    grey = np.linspace(0, 1, 16, dtype="float32").reshape(1, 4, 4, 1)
    seed = StepSeed(3, ops.convert_to_tensor(1))
    x = value(model._prepare(np.repeat(grey, 4000, 0), seed))
    assert set(np.unique(x)) == {0, 1}
    error = np.sqrt(grey * (1 - grey) / 4000)
    assert (abs(x.mean(0) - grey) <= 4 * error).all()


@pytest.mark.parametrize("bits", [5, 8])
def test_pictures_are_rounded_down_to_bits(bits):
    model = NVAE(NVAEConfig((16, 16, 1), num_bits=bits))
    levels = np.arange(256)
    x = (levels / 255).astype("float32").reshape(1, 16, 16, 1)
    expected = (levels >> (8 - bits)) / (2**bits - 1)
    np.testing.assert_allclose(
        value(model._prepare(x)).ravel(), expected, rtol=1e-6
    )


@slow_on_jax
def test_with_flows_one_draw_bounds_alike():
    """KL is the difference of log-densities then: IWAE-1 is the ELBO."""
    model = make(num_flows=1)
    bounds = model.evaluate_likelihood(X, 1, per_image=True)
    np.testing.assert_allclose(bounds["iwae"], bounds["elbo"], rtol=1e-5)
    codes = model.encode(X[:2], temperature=1.0)
    for z, mean in zip(codes["z"], codes["mean"], strict=True):
        assert abs(z - mean).max() > 0


@slow_on_jax
def test_recalibrated_statistics(monkeypatch):
    """Means and variances over all batches, computed here in NumPy."""
    model = make()
    fit(model, X[:8])
    norms = [norm for norm in model.norms if "/decoder/" in norm.path]
    assert len(norms) == 4 * 3
    seen = {id(norm): [] for norm in norms}
    before = [value(v) for v in model.weights]
    with backend.RecordingScope([(v, v.value) for v in model.variables]):
        for norm in norms:
            call = type(norm).call

            def spy(x, *args, norm=norm, call=call, **kwargs):
                seen[id(norm)].append(value(x, "float64"))
                return call(norm, x, *args, **kwargs)

            monkeypatch.setattr(norm, "call", spy)
        for i in range(3):
            seed = StepSeed(ops.convert_to_tensor(7), i)
            model.decoder.draw(
                6,
                lambda shape, seed=seed: keras.random.normal(shape, seed=seed),
                temperature=0.8,
                training=True,
            )
        monkeypatch.undo()
    for w, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(value(w), old)
    model.recalibrate_batch_norm(3, 0.8, batch_size=6, seed=7)
    for norm in norms:
        inputs = np.concatenate(seen[id(norm)])
        np.testing.assert_allclose(
            value(norm.moving_mean), inputs.mean((0, 1, 2)), atol=1e-4
        )
        np.testing.assert_allclose(
            value(norm.moving_variance), inputs.var((0, 1, 2)), rtol=1e-2
        )
        assert norm.momentum == 0.95


@slow_on_jax
@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.0])
def test_recalibrated_samples_are_finite(eager, temperature):
    """Whatever the statistics were before."""
    before = weights(eager)
    for norm in eager.norms:
        norm.moving_mean.assign(ops.full(norm.moving_mean.shape, math.nan))
        norm.moving_variance.assign(ops.zeros(norm.moving_variance.shape))
    try:
        eager.recalibrate_batch_norm(2, temperature, batch_size=4)
        assert np.isfinite(eager.sample(4, temperature, batch_size=4)).all()
    finally:
        for w, old in zip(eager.weights, before, strict=True):
            w.assign(old)


@slow_on_jax
def test_a_frozen_model_is_recalibrated_too(eager):
    before = weights(eager)
    found = []
    try:
        for trainable in (True, False):
            eager.trainable = trainable
            eager.recalibrate_batch_norm(2, batch_size=4, seed=0)
            assert {norm.trainable for norm in eager.norms} == {trainable}
            found.append(weights(eager))
            eager.set_weights(before)
    finally:
        eager.trainable = True
        eager.set_weights(before)
    for w, other in zip(*found, strict=True):
        np.testing.assert_array_equal(w, other)


def test_a_part_that_was_frozen_first_stays_frozen():
    model = NVAE(TINY)
    model.encoder.trainable = False
    model.compile("adamax", **EAGER)
    frozen = {id(v) for v in model.encoder.variables}
    trained = {id(v) for v in model.trainable_variables}
    assert trained
    assert not frozen & trained


@slow_on_jax
def test_recalibration_of_a_broken_model_says_so():
    model = make()
    model.decoder.start.assign(ops.full(model.decoder.start.shape, math.nan))
    before = weights(model)
    with pytest.raises(ValueError, match="finite"):
        model.recalibrate_batch_norm(1, batch_size=2)
    for w, old in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(w, old)


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_spectral_norms_are_the_svds(weight):
    """Before a step as well, and without a penalty."""
    model = NVAE(
        dataclasses.replace(
            TINY, groups=(1,), spectral_weight=weight, spectral_start=None
        )
    )
    norms = model.spectral_norms()
    assert len(norms) == len(model.convolutions)
    for layer in model.convolutions:
        expected = np.linalg.norm(value(layer.matrix()), 2)
        assert norms[layer.path] == pytest.approx(expected, rel=1e-4)


def test_compiling_says_where_the_penalty_is_not_annealed():
    with pytest.warns(UserWarning, match="spectral_start=0.1 has no effect"):
        make(kl_warmup_steps=0, groups=(1,))


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.fit(X * 255), "divide by 255"),
        (lambda m: m.fit((X * 255).astype("uint8")), "divide by 255"),
        (lambda m: m.fit(X / 2), "binarize='dynamic'"),
        (lambda m: m.evaluate_likelihood(X / 2), "binarize='dynamic'"),
        (lambda m: m.fit(X[..., 0]), "shape"),
        (lambda m: m.fit(X[:, :2]), r"\(n, 4, 4, 1\)"),
        (lambda m: m.encode(X * math.nan), "finite"),
        (lambda m: m.fit([(X, X)] and iter_batches(X * 2)), "divide by 255"),
        (lambda m: m.fit(X[:0]), "at least one picture"),
        (lambda m: m.fit(), "Expected pictures"),
        (lambda m: m.evaluate(None), "Expected pictures"),
        (lambda m: m.fit({"image": X}), "Expected pictures"),
        (lambda m: m({"image": X}), "one tensor"),
        (lambda m: m.fit(X, class_weight={0: 1.0}), "class_weight"),
        (lambda m: m.fit(X, sample_weight=np.ones((16, 4))), "one weight"),
        (lambda m: m.evaluate(X, sample_weight=np.ones(3)), "one weight"),
        (lambda m: m.fit(X, sample_weight=np.full(16, np.nan)), "finite"),
        (lambda m: m.train_on_batch(X, sample_weight=-np.ones(16)), "least 0"),
        (lambda m: m.predict(X * 255), "divide by 255"),
        (lambda m: m.train_on_batch(X * 255), "divide by 255"),
        (lambda m: m.test_on_batch(X / 2), "binarize='dynamic'"),
        (lambda m: m.fit(X for _ in range(0)), "at least one batch"),
        (lambda m: m.fit(({"image": X},) for _ in range(1)), "numbers in `x`"),
        (lambda m: m.fit(3), "Expected pictures"),
        (lambda m: m.fit((X, X)), "one tensor"),
        (lambda m: m.encode([[1.0], [1.0, 2.0]]), "numbers in `x`"),
        (lambda m: m.decode(["a"]), r"numbers in `z\[0\]`"),
        (lambda m: m.sample(4, temperature=[0.5, 0.6]), "number"),
        (lambda m: m.sample(0), "at least 1"),
        (lambda m: m.sample(4.0), "integer"),
        (lambda m: m.sample(4, temperature=-1), "at least 0"),
        (lambda m: m.sample(4, temperature=math.nan), "finite"),
        (lambda m: m.sample(4, output="median"), "'mean'"),
        (lambda m: m.sample(4, seed="1"), "seed"),
        (lambda m: m.sample(4, batch_size=0), "at least 1"),
        (lambda m: m.decode(np.zeros((4, 1, 1, 2))), "list"),
        (lambda m: m.decode([None] * 3), "at most 2 groups"),
        (lambda m: m.decode([np.zeros((4, 2, 2, 2))]), r"z\[0\]"),
        (
            lambda m: m.decode(
                [np.zeros((4, 1, 1, 2)), np.zeros((3, 2, 2, 2))]
            ),
            "one n for all",
        ),
        (lambda m: m.decode([np.zeros((4, 1, 1, 2))], num=3), "num=3"),
        (lambda m: m.interpolate(X[:2], X[:3]), "one shape"),
        (lambda m: m.interpolate(X[:2], X[:2], num=1), "at least 2"),
        (lambda m: m.evaluate_likelihood(X, 0), "at least 1"),
        (lambda m: m.evaluate_likelihood(X * 255), "divide by 255"),
        (lambda m: m.evaluate_likelihood(iter_batches(X)), "numbers in `x`"),
        (lambda m: m.encode(X, -1), "at least 0"),
        (lambda m: m.reconstruct(X, temperature=-1), "at least 0"),
        (lambda m: m.decode([], temperature=-1), "at least 0"),
        (lambda m: m.interpolate(X, X, temperature=-1), "at least 0"),
        (lambda m: m.compile("sgd", metrics=["mse"]), "no metrics"),
        (lambda m: m.compile("sgd", weighted_metrics=["mse"]), "no metrics"),
        (lambda m: m.recalibrate_batch_norm(0), "at least 1"),
        (lambda m: m.recalibrate_batch_norm(1, -0.1), "at least 0"),
        (lambda m: m.compile("sgd", "mse"), "no loss"),
        (lambda m: m.compile("sgd", loss_weights=[2.0]), "model.s own"),
        (lambda m: NVAE.from_preset("imagenet"), "'imagenet_32'"),
        (lambda m: NVAE.from_preset("mnist", (30, 30, 1)), "divisible by 8"),
        (lambda m: NVAE.from_preset("mnist", width=3), "NVAEConfig"),
        (lambda m: NVAE.from_preset("digits", dtype="float64"), "float32"),
        (lambda m: NVAE.from_preset("digits", 28), "tuple of 3 integers"),
        (lambda m: NVAE("mnist"), "from_preset"),
        (lambda m: NVAE(TINY, dtype="bfloat16"), "'mixed_bfloat16'"),
        (lambda m: dataclasses.replace(TINY, channels=1), "at least 2"),
        (lambda m: NVAE({"colours": 3}), "NVAEConfig"),
        (lambda m: NVAE(TINY, recompute=1), "True or False"),
        (lambda m: NVAE(TINY, seed=1.5), "seed"),
    ],
)
def test_bad_input(trained, call, message):
    with pytest.raises(ValueError, match=message):
        call(trained)


def iter_batches(*batches):
    """A generator, as `fit` takes it."""
    for x in batches:
        yield (x,)


@slow_on_jax
def test_data_sets_are_looked_at():
    model = make()

    class Batches(keras.utils.PyDataset):
        def __init__(self, x):
            super().__init__()
            self.x = x

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return (self.x[8 * index : 8 * index + 8],)

    with pytest.raises(ValueError, match="divide by 255"):
        model.fit(Batches(X * 255), verbose=0)
    # Before a step, not after the first epoch.
    for data in (Batches(X * 255), (X * 255,), X * 255):
        with pytest.raises(ValueError, match="divide by 255"):
            model.fit(X, validation_data=data, verbose=0)
    assert int(model.draws.iterations) == 0
    model.fit(Batches(X), validation_data=(X[:4],), verbose=0)
    model.fit(iter_batches(X[:8]), steps_per_epoch=1, shuffle=False, verbose=0)
    assert int(model.draws.iterations) == 2
    later = iter_batches(X[:8], 255 * X[:8])
    with pytest.raises(ValueError, match="divide by 255"):
        model.fit(later, steps_per_epoch=2, shuffle=False, verbose=0)
    with pytest.raises(ValueError, match="at least one batch"):
        model.fit(iter_batches(), steps_per_epoch=1, verbose=0)
    codes = model.encode(X[:8])["z"]
    for z, same in zip(codes, model.encode(Batches(X))["z"], strict=True):
        np.testing.assert_array_equal(z, same)
    if TENSORFLOW:
        import tensorflow as tf

        labelled = tf.data.Dataset.from_tensor_slices((X, np.zeros(16)))
        some = labelled.batch(3).take(2)
        np.testing.assert_allclose(
            model.reconstruct(some, 0.0), model.reconstruct(X[:6], 0.0)
        )
        with pytest.raises(ValueError, match="ends"):
            model.evaluate_likelihood(labelled.batch(8).repeat())
        model.fit(labelled.batch(16), shuffle=False, verbose=0)
        with pytest.raises(ValueError, match="binarize"):
            model.fit(labelled.map(lambda x, y: (x / 2, y)).batch(8), verbose=0)


@pytest.mark.verify
def test_digits_learn():
    """Three seeds at the default learning rate, against independent pixels."""
    from sklearn.datasets import load_digits

    x = (load_digits().images[..., None] / 16).astype("float32")
    train, test = x[:1500], x[1500:]
    p = np.clip(train.mean(0), 1e-3, 1 - 1e-3)
    # Of the binary picture drawn with grey values as probabilities.
    independent = (
        (test * np.log(p) + (1 - test) * np.log(1 - p)).sum((1, 2, 3)).mean()
    )
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model = NVAE.from_preset("digits", seed=seed, kl_warmup_steps=100)
        model.compile(**STEP)
        model.fit(train, batch_size=64, epochs=20, verbose=0)
        bounds = model.evaluate_likelihood(test, 5)
        assert all(np.isfinite(w).all() for w in weights(model))
        assert bounds["elbo"] > independent
        assert bounds["iwae"] > bounds["elbo"]
