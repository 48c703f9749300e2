"""`SkipNonFinite`: a step with NaN changes nothing, others are plain steps."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import TENSORFLOW, replicated, slow_on_tensorflow, value

from blogkeras.optimizers import SkipNonFinite, copied_optimizer

NAN = np.float32("nan")
X, Y = toy.DENSE.copy(), toy.TARGETS.copy()
BROKEN = X.copy()
BROKEN[20, 1] = NAN  # the second of four batches


def optimizers():
    """Inner optimizers with every kind of state."""
    adam = keras.optimizers.Adam
    return {
        "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "decay": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
        "ema": lambda: adam(0.1, use_ema=True, ema_momentum=0.5),
        "accumulated": lambda: adam(0.1, gradient_accumulation_steps=2),
        "schedule": lambda: adam(
            keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
        ),
        "clipped": lambda: adam(0.1, global_clipnorm=1e-2),
    }


def model(optimizer, **kwargs):
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)]
    )
    network.compile(optimizer, "mse", **kwargs)
    return network


def fit(network, x, y=Y, epochs=1):
    network.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


@slow_on_tensorflow
@pytest.mark.parametrize("name", optimizers())
def test_a_step_with_nan_is_as_if_it_had_not_been(name):
    make = optimizers()[name]
    # The outside reference is the optimizer alone on the other batches.
    plain = model(make(), run_eagerly=True)
    rest = np.r_[0:16, 32:64]
    fit(plain, X[rest], Y[rest])
    guarded = model(SkipNonFinite(make()), run_eagerly=True)
    fit(guarded, BROKEN)
    assert toy.difference(toy.weights(plain), toy.weights(guarded)) == 0
    inner = guarded.optimizer.inner_optimizer
    for ours, theirs in zip(
        inner.variables, plain.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(value(ours), value(theirs))
    assert int(guarded.optimizer.skipped) == 1


@pytest.mark.parametrize("bad", [NAN, np.inf, -np.inf])
def test_under_xla(bad):
    x = X.copy()
    x[20, 1] = bad
    guarded = model(SkipNonFinite("adam"), jit_compile=True)
    fit(guarded, x)
    assert int(guarded.optimizer.skipped) == 1
    assert int(guarded.optimizer.iterations) == 3
    assert all(np.isfinite(w).all() for w in toy.weights(guarded))


def test_saved_and_resumed(tmp_path):
    guarded = model(SkipNonFinite("adam"), run_eagerly=True)
    fit(guarded, BROKEN)
    guarded.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, SkipNonFinite)
    assert int(loaded.optimizer.skipped) == 1
    loaded.run_eagerly = True
    for network in (guarded, loaded):
        fit(network, BROKEN)
        assert int(network.optimizer.skipped) == 2
    assert toy.difference(toy.weights(guarded), toy.weights(loaded)) == 0
    weights = guarded.optimizer.variables
    loaded.optimizer.set_weights([value(w) for w in weights])


def test_two_replicas_drop_the_step_together():
    guarded = replicated(
        lambda: model(SkipNonFinite("adam"), jit_compile=not TENSORFLOW)
    )
    fit(guarded, BROKEN)
    assert value(guarded.optimizer.skipped) == 1
    single = model(SkipNonFinite("adam"), run_eagerly=True)
    keras.distribution.set_distribution(None)
    fit(single, BROKEN)
    for ours, theirs in zip(
        toy.weights(guarded), toy.weights(single), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_lookup():
    toy.reset()
    network = keras.Sequential(
        [layers.Embedding(5, 1), layers.GlobalAveragePooling1D()]
    )
    network.compile(SkipNonFinite("adam"), "mse", run_eagerly=True)
    tokens = np.array([[1, 1, 2]], "int32")
    network.fit(tokens, np.array([[NAN]]), verbose=0)
    assert int(network.optimizer.skipped) == 1
    before = toy.weights(network)
    network.fit(tokens, np.array([[3.0]]), verbose=0)
    (after,) = toy.weights(network)
    assert np.isfinite(after).all()
    assert (after != before).any()


def test_float16_loss_scaling_around_it(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    guarded = model(SkipNonFinite("adam"), run_eagerly=True)
    fit(guarded, X)
    assert all(np.isfinite(w).all() for w in toy.weights(guarded))
    guarded.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.run_eagerly = True
    for network in (guarded, loaded):
        assert isinstance(network.optimizer.inner_optimizer, SkipNonFinite)
        fit(network, X)
    assert toy.difference(toy.weights(guarded), toy.weights(loaded)) == 0
    with pytest.raises(ValueError, match=r"LossScaleOptimizer\(SkipNonFin"):
        SkipNonFinite(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        )


class Weights(keras.callbacks.Callback):
    """The weights at the end of each epoch; stands behind `SwapEMAWeights`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(toy.weights(self.model))


@pytest.mark.parametrize("around", ["loss scale", "several"])
def test_averages_are_swapped_inside_of_other_optimizers(around):
    """The averages by a model that makes the same steps."""
    if around == "several" and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("Keras 3.15 has MultiOptimizer")

    def make():
        return SkipNonFinite(
            keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        )

    optimizer, second = make(), make()
    if around == "loss scale":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 1.0)
    else:
        optimizer = keras.optimizers.MultiOptimizer(
            lambda v, first=optimizer: first if "kernel" in v.path else second
        )
    plain = model(keras.optimizers.SGD(0.1), run_eagerly=True)
    guarded = model(optimizer, run_eagerly=True)
    seen, steps = Weights(), []
    guarded.fit(
        *(X, Y),
        batch_size=64,
        epochs=2,
        verbose=0,
        callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True), seen],
    )
    for _ in range(2):
        plain.train_on_batch(X, Y)
        steps.append(toy.weights(plain))
    # Keras's average begins with the weights after the first step.
    averages = steps[0], [(a + b) / 2 for a, b in zip(*steps, strict=True)]
    for ours, theirs in zip(seen.seen, averages, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_learning_rate_is_the_inner_one():
    guarded = SkipNonFinite(keras.optimizers.SGD(0.5))
    assert float(guarded.learning_rate) == 0.5
    guarded.learning_rate = 0.25
    assert float(guarded.inner_optimizer.learning_rate) == 0.25
    scaled = keras.optimizers.SGD(0.5, loss_scale_factor=8.0)
    assert float(SkipNonFinite(scaled).scale_loss(ops.ones(()))) == 8


def test_what_is_excluded_from_decay_is_so_inside():
    guarded = SkipNonFinite(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    guarded.exclude_from_weight_decay(var_names=["bias"])
    kernel, bias = (keras.Variable([1.0], name=n) for n in ("kernel", "bias"))
    guarded.apply([ops.zeros(1), ops.zeros(1)], [kernel, bias])
    np.testing.assert_allclose(value(kernel), [0.95], rtol=1e-6)
    np.testing.assert_array_equal(value(bias), [1.0])


@pytest.mark.parametrize("bad", [None, 1, "no_such_optimizer", keras.Model])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=r"Expected a Keras|identifier"):
        SkipNonFinite(bad)
    with pytest.raises(ValueError, match="clipnorm"):
        SkipNonFinite("adam", clipnorm=1.0)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_copy_decays_the_same_weights(guarded):
    given = keras.optimizers.AdamW(0.1, weight_decay=0.5, clipnorm=1.0)
    given.exclude_from_weight_decay(var_names=["bias"])
    copy = copied_optimizer(
        SkipNonFinite(given, "guard") if guarded else given, learning_rate=0.2
    )
    if guarded:
        assert (type(copy), copy.name) == (SkipNonFinite, "guard")
        copy = copy.inner_optimizer
    assert copy is not given
    assert copy.clipnorm == 1
    kernel, bias = (keras.Variable([1.0], name=n) for n in ("kernel", "bias"))
    copy.apply([ops.zeros(1), ops.zeros(1)], [kernel, bias])
    np.testing.assert_allclose(value(kernel), [0.9], rtol=1e-6)
    np.testing.assert_array_equal(value(bias), [1.0])
