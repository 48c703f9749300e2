"""bert4keras's optimizers on Keras 3."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("bert4keras needs TensorFlow", allow_module_level=True)

import bert4keras_oracle as oracle

import blogkeras.bert4keras  # noqa: F401

# isort: split
from bert4keras import optimizers
from bert4keras.backend import keras as old


def test_trajectories_equal_reference():
    cases = oracle.optimizer_cases()
    assert len(cases) == 15
    for name, optimizer in cases.items():
        for key, value in oracle.run_optimizer(name, optimizer).items():
            np.testing.assert_allclose(
                value, oracle.reference()[key], rtol=0, atol=1e-6, err_msg=key
            )


def test_piecewise_linear_rate():
    linear = optimizers.extend_with_piecewise_linear_lr(optimizers.Adam)
    optimizer = linear(0.5, lr_schedule={4: 1.0, 8: 0.1})
    rates = []
    for step in range(11):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer._decayed_lr("float32")))
    expected = np.interp(range(11), [0, 4, 8], [0.0, 0.5, 0.05])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def quadratic(optimizer, steps, start=(1.0, -2.0)):
    """Minimizes x² + 4 y²; returns the weights after each step."""
    w = keras.Variable(list(start), name="w")
    trajectory = []
    for _ in range(steps):
        gradient = 2 * np.array([1.0, 4.0], "float32") * np.array(w)
        optimizer.apply_gradients([(keras.ops.convert_to_tensor(gradient), w)])
        trajectory.append(np.array(w))
    return np.array(trajectory)


def test_lookahead_averages_fast_and_slow_weights():
    adam = quadratic(optimizers.Adam(0.1), 1)
    lookahead = optimizers.extend_with_lookahead(optimizers.Lion)
    found = quadratic(lookahead(0.1, steps_per_slow_update=2), 5)
    fast = slow = np.array([1.0, -2.0])
    m, expected = np.zeros(2), []
    for step in range(5):
        gradient = np.array([2.0, 8.0]) * fast
        fast = fast - 0.1 * np.sign(0.95 * m + 0.05 * gradient)
        m = 0.98 * m + 0.02 * gradient
        if step % 2 == 0:
            fast = slow = slow + 0.5 * (fast - slow)
        expected.append(fast)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(adam[0] - [1.0, -2.0]).max() < 0.11


def counterparts():
    """What the docs name for new code, where the steps are the same."""
    adam = {"learning_rate": 0.01, "epsilon": 1e-6}
    decay = optimizers.extend_with_weight_decay(optimizers.Adam)
    lamb = optimizers.extend_with_layer_adaptation(optimizers.Adam)
    linear = optimizers.extend_with_piecewise_linear_lr(optimizers.Adam)
    k = keras.optimizers
    polynomial = k.schedules.PolynomialDecay(0.01, 8, 0.001)
    return {
        "Adam": (optimizers.Adam(**adam), k.Adam(**adam)),
        "AdamW": (
            decay(**adam, weight_decay_rate=0.1),
            k.AdamW(**adam, weight_decay=0.1),
        ),
        "Lion": (optimizers.Lion(0.01), k.Lion(0.01, 0.95, 0.98)),
        "Lamb": (lamb(**adam), k.Lamb(**adam)),
        "Adafactor": (
            optimizers.AdaFactor(0.01),
            k.Adafactor(0.01, relative_step=False),
        ),
        "schedule": (
            linear(**adam, lr_schedule={0: 1.0, 8: 0.1}),
            k.Adam(polynomial, epsilon=1e-6),
        ),
    }


def test_keras_3_takes_the_same_steps():
    for name, pair in counterparts().items():
        found, expected = (quadratic(optimizer, 12) for optimizer in pair)
        np.testing.assert_allclose(found, expected, atol=5e-6, err_msg=name)
        assert np.abs(found[-1] - found[0]).min() > 1e-3


STACKED = (
    "weight_decay",
    "layer_adaptation",
    "piecewise_linear_lr",
    "gradient_accumulation",
    "lookahead",
    "lazy_optimization",
    "parameter_wise_lr",
    "exponential_moving_average",
)


def stack(optimizer):
    for name in STACKED:
        optimizer = getattr(optimizers, f"extend_with_{name}")(optimizer)
    return optimizer


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Embedding(6, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(1, use_bias=False),
        ]
    )


X = np.random.default_rng(0).integers(0, 6, (24, 3))
Y = X.sum(1, keepdims=True).astype("float32")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("stack", {"jit_compile": True}),
        ("adafactor", {"jit_compile": False}),
        pytest.param(
            "adafactor", {"jit_compile": True}, marks=pytest.mark.verify
        ),
    ],
)
def test_compiled_fit_equals_eager_fit(kind, options):
    weights = []
    for how in (options, {"run_eagerly": True}):
        if kind == "stack":
            optimizer = stack(optimizers.Adam)(0.01, clipnorm=1.0)
        else:
            optimizer = optimizers.AdaFactor(0.01, min_dim_size_to_factor=2)
        model = small_model()
        model.compile(optimizer, "mse", **how)
        model.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for compiled, eager in zip(*weights, strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)
    assert np.abs(weights[0][0] - small_model().get_weights()[0]).max() > 1e-4


def test_compiled_model_saves_and_loads_with_its_optimizer(tmp_path):
    AdamEMA = optimizers.extend_with_exponential_moving_average(
        optimizers.extend_with_piecewise_linear_lr(optimizers.Adam), "AdamEMA"
    )
    model = small_model()
    model.compile(AdamEMA(0.01, lr_schedule={5: 1}, ema_momentum=0.9), "mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is AdamEMA
    assert loaded.optimizer.ema_momentum == 0.9
    for m in (model, loaded):
        m.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
        m.optimizer.apply_ema_weights()
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_optimizer_by_its_name():
    optimizers.extend_with_weight_decay(optimizers.Adam, "AdamNamed")
    model = small_model()
    model.compile("AdamNamed", "mse", run_eagerly=True)
    assert model.optimizer.weight_decay_rate == 0.01
    model.fit(X, Y, verbose=0)


def test_learning_rate_can_be_changed():
    optimizer = optimizers.Adam(0.1)
    optimizer.learning_rate = 0.2
    assert float(optimizer.lr) == pytest.approx(0.2)
    optimizer.lr = 0.3
    assert float(optimizer.learning_rate) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="piecewise_linear_lr"):
        optimizers.AdaFactor(0.1).learning_rate = 0.2


@pytest.mark.parametrize("adam", [old.optimizers.Adam, keras.optimizers.Adam])
def test_adam_of_keras_can_be_extended(adam, tmp_path):
    """In Keras 2.3.1 bert4keras's Adam is Keras's."""
    found = stack(adam)(lr=0.01, lr_schedule={2: 1})
    expected = stack(optimizers.Adam)(0.01, epsilon=1e-7, lr_schedule={2: 1})
    steps = [quadratic(optimizer, 6) for optimizer in (found, expected)]
    np.testing.assert_array_equal(*steps)
    AdamW = optimizers.extend_with_weight_decay(adam, "AdamW")
    assert AdamW.__name__ == "AdamW"
    config = AdamW(0.01, weight_decay_rate=0.1, epsilon=None).get_config()
    assert config["epsilon"] == 1e-7
    assert AdamW.from_config(config).get_config() == config


def test_other_optimizers_of_keras_cannot_be_extended():
    for cls in (old.optimizers.SGD, keras.optimizers.Nadam):
        with pytest.raises(ValueError, match=r"of bert4keras.* Received: .*"):
            optimizers.extend_with_weight_decay(cls)
